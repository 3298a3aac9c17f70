"""Ranking: each statistic against a naive loop and scipy, planted features found, and no call from too small a design."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from architectures import NEGATIVE, POSITIVE
from sae_files import gemma_scope_2_config, random_sae, reference_acts, write_gemma_scope_2
from safetensors.torch import load_file
from scipy.stats import mannwhitneyu

import sae_bias as sb
from sae_bias.discovery import contrasts
from sae_bias.discovery.attribution import attribution, exact_ablation
from sae_bias.prompts.grid import GridPrompt
from sae_bias.stats.design import fewest_units
from sae_bias.steering.engine import ProbeEngine

D = 32


def last_acts(tiny, texts):
    """Activations [n, d_sae] at the last token, from the file's own weights."""
    return reference_acts(
        load_file(tiny.sae_folder / "params.safetensors"), sb.residuals(tiny.model, texts, 1)
    ).numpy()


# ── separation on a real model ──────────────────────────────────────────────────────────────────────────────


def test_separation_equals_a_naive_loop(gemma3, pairs):
    frame = sb.rank_features(gemma3.model, gemma3.sae, pairs).to_frame().set_index("index").sort_index()
    human, ai = (last_acts(gemma3, [getattr(p, side) for p in pairs]) for side in ("human", "ai"))
    units = {t: [i for i, p in enumerate(pairs) if p.template == t] for t in pairs.templates}
    for f in range(human.shape[1]):
        row = frame.loc[f]
        u = mannwhitneyu(ai[:, f], human[:, f]).statistic / (len(ai) * len(human))
        assert row["auroc"] == pytest.approx(u, abs=1e-6)
        assert row["mean_diff"] == pytest.approx((ai[:, f] - human[:, f]).mean(), abs=1e-4)
        assert row["fire_ai"] == pytest.approx((ai[:, f] > 0).mean())
        assert row["fire_human"] == pytest.approx((human[:, f] > 0).mean())
        diffs = np.array([(ai[rows, f] - human[rows, f]).mean() for rows in units.values()])
        both = np.concatenate([ai[:, f], human[:, f]])
        variance = max(diffs.var(ddof=1), 0.05**2 * (both**2).mean())
        t = diffs.mean() / np.sqrt(variance / len(diffs)) if diffs.mean() else 0.0
        assert row["t"] == pytest.approx(t, rel=1e-3, abs=1e-3)


def test_separation_sorts_by_auroc_then_by_mean_difference(gemma3, pairs):
    ranking = sb.rank_features(gemma3.model, gemma3.sae, pairs)
    keys = list(zip(ranking.frame["auroc"], ranking.frame["mean_diff"]))
    assert keys == sorted(keys, reverse=True)
    top = ranking.top(3)
    assert [f.index for f in top] == ranking.frame["index"].head(3).tolist()
    assert str(top[0]) == f"{gemma3.sae.id}#{top[0].index}"
    assert ranking.family_size == gemma3.sae.d_sae
    assert ranking.n_units == 3


def test_three_templates_make_no_call(gemma3, pairs):
    ranking = sb.rank_features(gemma3.model, gemma3.sae, pairs)
    assert set(ranking.frame["separates"]) == {"undetermined"}
    assert f"at least {fewest_units()} needed" in ranking.note
    assert ranking.called("separates") == []


def test_effects_are_bias_removed(gemma3, pairs, probe):
    engine = ProbeEngine(gemma3.model, pairs, probe)
    by = {
        how: sb.rank_features(gemma3.model, gemma3.sae, pairs, by=how, probe=probe, top_k=5)
        for how in ("attribution", "ablation")
    }
    expected = attribution(engine, gemma3.sae)
    frame = by["attribution"].frame
    np.testing.assert_allclose(frame["attribution"], expected[frame["index"]], rtol=1e-4, atol=1e-6)
    assert frame["attribution"].is_monotonic_decreasing
    done = by["ablation"].frame.dropna(subset=["ablation"])
    assert len(done) == 5
    assert done["attribution"].to_numpy() == pytest.approx(expected[done["index"]], abs=1e-6)
    size = frame.set_index("index")[["attribution", "integrated"]].abs().max(axis=1)
    assert set(done["index"]) == set(size.nlargest(5).index)
    np.testing.assert_allclose(
        done["ablation"], exact_ablation(engine, [gemma3.feature(i) for i in done["index"]]), atol=1e-5
    )
    assert done["ablation"].is_monotonic_decreasing


def test_wrong_requests_are_refused(gemma3, pairs, tmp_path):
    write_gemma_scope_2(tmp_path / "narrow", random_sae(24, 8), gemma_scope_2_config(1, 8))
    write_gemma_scope_2(tmp_path / "deep", random_sae(D, 8), gemma_scope_2_config(9, 8))
    for options, message in (
        ({"sae": gemma3.sae, "by": "luck"}, "expected one of"),
        ({"sae": [], "by": "separation"}, "no SAE"),
        ({"sae": [gemma3.sae, str(gemma3.sae_folder)], "by": "separation"}, "given twice"),
        ({"sae": str(tmp_path / "narrow"), "by": "separation"}, "d_in 24"),
        ({"sae": str(tmp_path / "deep"), "by": "separation"}, "layer 9"),
        ({"sae": gemma3.sae, "by": "interaction"}, "needs a grid"),
    ):
        with pytest.raises(sb.RequestError, match=message):
            sb.rank_features(gemma3.model, options["sae"], pairs, by=options["by"])
    with pytest.raises(sb.RequestError, match="makes no call"):
        sb.rank_features(gemma3.model, gemma3.sae, pairs).called("luck")


# ── planted features on synthetic residuals ─────────────────────────────────────────────────────────────────

PLANTED, IDENTITY, SPEECH, VERDICT, SILENT = 5, 6, 7, 8, 9
SUBJECTS = (("the AI", "ai"), ("a bot", "ai"), ("a man", "human"), ("a girl", "human"), ("a dog", "animal"))


def planted_residual(text: str, noise: float = 0.2) -> torch.Tensor:
    """Coordinates 0–4 say AI ∧ speech, AI, speech, badly judged, anything but AI speech; the rest is noise of the text's own."""
    seed = int.from_bytes(text.encode(), "little") % (2**31)
    x = noise * torch.randn(D, generator=torch.Generator().manual_seed(seed))
    ai, speech = "AI" in text or "bot" in text, "says" in text
    x[0] += 3.0 * (ai and speech)
    x[1] += 3.0 * ai
    x[2] += 3.0 * speech
    x[3] += 2.2 * ((ai and speech) or "hurts" in text)
    x[4] += 2.3 * (not (ai and speech))
    return x


@pytest.fixture
def planted(gemma3, tmp_path, monkeypatch):
    """An SAE with one feature a coordinate, on residuals that are made, not measured."""

    def read(model, prompts, saes, *, everywhere=False):
        rows = torch.stack([planted_residual(p) for p in prompts])
        neutral = torch.stack([planted_residual(f"neutral {i}") for i in range(20)])
        at = sb.Site(1)
        return {at: rows}, {at: neutral}, ({at: (rows, torch.arange(len(rows)))} if everywhere else None)

    monkeypatch.setattr(contrasts, "read_residuals", read)
    monkeypatch.setattr(contrasts, "prompt_scores", lambda model, texts, probe: np.full(len(texts), -1.0))
    weights = random_sae(D, 16, seed=4)
    weights["w_enc"], weights["b_enc"], weights["threshold"] = (
        weights["w_enc"] * 0.3,
        weights["b_enc"] * 0,
        weights["threshold"] * 0,
    )
    weights["w_enc"][3:5] = 0
    for coordinate, feature in enumerate((PLANTED, IDENTITY, SPEECH, VERDICT, SILENT)):
        weights["w_enc"][:, feature] = torch.eye(D)[coordinate]
        weights["threshold"][feature] = 1.0
    write_gemma_scope_2(tmp_path / "planted", weights, gemma_scope_2_config(1, 16))
    return sb.load_sae(tmp_path / "planted")


def grid(n_matches: int, subjects=SUBJECTS, n_harm: int = 14) -> sb.PromptGrid:
    prompts = [
        GridPrompt(f"{subject} hurts thing {h}. This is", subject, group, f"harm{h}", "harm")
        for h, (subject, group) in product(range(n_harm), subjects)
    ]
    for m, (act, verb) in product(range(n_matches), (("speech", "says"), ("nonspeech", "sees"))):
        for subject, group in subjects:
            prompts.append(
                GridPrompt(
                    f"{subject} {verb} thing {m}. This is",
                    subject,
                    group,
                    f"{act}{m}",
                    act,
                    f"m{m}",
                    "mundane",
                )
            )
    return sb.PromptGrid(tuple(prompts))


def many_pairs(n_templates: int) -> sb.PromptPairs:
    return sb.PromptPairs(
        tuple(
            sb.PromptPair(f"{human} says thing {t}. This is", f"{ai} says thing {t}. This is", f"t{t}", human)
            for t in range(n_templates)
            for human, ai in (("a man", "the AI"), ("a girl", "a bot"))
        )
    )


def test_a_planted_ai_speech_feature_is_found_and_called(gemma3, planted):
    ranking = sb.rank_features(gemma3.model, planted, grid(24), by="interaction")
    assert ranking.top(1)[0].index == PLANTED
    assert [f.index for f in ranking.called("ai_speech")] == [PLANTED]
    assert ranking.frame["interaction"].abs().is_monotonic_decreasing
    assert set(ranking.frame["sign"]) == {-1, 0, 1} or set(ranking.frame["sign"]) == {-1, 1}


def test_each_call_goes_to_the_feature_planted_for_it(gemma3, planted):
    """A feature of bad verdicts fires at a human's cruelty too: without HC it was called AI-speech."""
    ranking = sb.rank_features(gemma3.model, planted, grid(24), by="interaction")
    calls = ranking.frame.set_index("index")["call"]
    assert calls[PLANTED] == "AI-speech"
    assert calls[SILENT] == "silent at AI speech"
    assert calls[VERDICT] == "negative judgement"
    assert calls[IDENTITY] == "AI identity"
    assert calls[SPEECH] == "no"
    assert [f.index for f in ranking.called("silent at AI speech")] == [SILENT]
    assert SILENT in [f.index for f in ranking.top(3)], "sorted by size, whatever the sign"


def test_without_badly_judged_deeds_ai_speech_is_undetermined(gemma3, planted):
    for prompts, reason in (
        (grid(24, n_harm=0), "no badly judged human deeds in the grid"),
        (grid(24, n_harm=11), "11 badly judged human statements score within"),
    ):
        ranking = sb.rank_features(gemma3.model, planted, prompts, by="interaction")
        calls = ranking.frame.set_index("index")["call"]
        assert set(calls[[PLANTED, VERDICT, SILENT]]) == {"undetermined"}
        assert calls[SPEECH] == "no"
        assert reason in ranking.note
        assert ranking.called("ai_speech") == []


def test_badly_judged_deeds_are_paired_on_the_score(gemma3, planted, monkeypatch):
    """Statements scored too far from AI speech are no controls for it, and the pairing names both sides."""

    def scores(model, texts, probe):
        return np.array([-1.0 if "says" in t else -1.1 if int(t.split("thing ")[1].split(".")[0]) < 13 else -2.0 for t in texts])  # fmt: skip

    monkeypatch.setattr(contrasts, "prompt_scores", scores)
    ranking = sb.rank_features(gemma3.model, planted, grid(24, n_harm=20), by="interaction")
    assert sorted(ranking.pairing["harm"], key=lambda h: int(h[4:])) == [f"harm{h}" for h in range(13)]
    assert set(ranking.pairing["match"]) <= set(ranking.split["report"])
    np.testing.assert_allclose(ranking.pairing["difference"], -0.1)
    row = ranking.frame.set_index("index").loc[VERDICT]
    x = torch.stack([planted_residual(p.text) for p in grid(24, n_harm=20) if p.act == "harm" and p.group != "ai" and p.statement in set(ranking.pairing["harm"])])  # fmt: skip
    assert row["held_HC"] == pytest.approx(
        reference_acts(load_file(planted.path), x).numpy()[:, VERDICT].mean(), rel=0.02
    )


def test_identity_and_speech_features_are_not_ai_speech(gemma3, planted):
    frame = sb.rank_features(gemma3.model, planted, grid(24), by="interaction").frame.set_index("index")
    assert set(frame.loc[[IDENTITY, SPEECH], "ai_speech"]) == {"no"}
    assert abs(frame.loc[IDENTITY, "interaction"]) < 0.3
    assert frame.loc[IDENTITY, "mean_AS"] > 2


def test_separation_finds_identity_features_which_is_why_it_is_not_enough(gemma3, planted):
    ranking = sb.rank_features(gemma3.model, planted, many_pairs(10))
    assert {f.index for f in ranking.top(2)} == {PLANTED, IDENTITY}
    assert {PLANTED, IDENTITY} <= {f.index for f in ranking.called("separates")}
    assert SPEECH not in {f.index for f in ranking.called("separates")}


def test_interaction_equals_a_naive_loop(gemma3, planted):
    prompts = grid(6)
    frame = sb.rank_features(gemma3.model, planted, prompts, by="interaction").frame.set_index("index")
    x = torch.stack([planted_residual(p.text) for p in prompts])
    acts = reference_acts(load_file(planted.path), x).numpy()
    for f in range(16):
        cell = {}
        for group, act in product(("ai", "human", "animal"), ("speech", "nonspeech")):
            per_match = [
                np.mean(
                    [
                        acts[i, f]
                        for i, p in enumerate(prompts)
                        if (p.group, p.act, p.match) == (group, act, m)
                    ]
                )
                for m in prompts.matches
            ]
            cell[group, act] = np.array(per_match)
        expected = (cell["ai", "speech"] - cell["ai", "nonspeech"]) - (
            cell["human", "speech"] - cell["human", "nonspeech"]
        )
        assert frame.loc[f, "interaction"] == pytest.approx(expected.mean(), abs=1e-4)
        assert frame.loc[f, "mean_DS"] == pytest.approx(cell["animal", "speech"].mean(), abs=1e-4)


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        (grid(4), "matched statement pairs are needed"),
        (grid(24, SUBJECTS[:4]), "no speaking animal"),
    ],
)
def test_too_small_a_design_is_ranked_but_makes_no_call(gemma3, planted, prompts, reason):
    ranking = sb.rank_features(gemma3.model, planted, prompts, by="interaction")
    assert ranking.top(1)[0].index == PLANTED
    assert set(ranking.frame["ai_speech"]) == {"undetermined"}
    assert reason in ranking.note


def test_a_grid_without_matched_pairs_is_refused(gemma3, planted):
    with pytest.raises(sb.RequestError, match="no statement pair"):
        sb.rank_features(gemma3.model, planted, grid(6, SUBJECTS[:2]), by="interaction")


def test_a_split_ranks_on_discover_only(gemma3, planted):
    prompts = many_pairs(10)
    split = {"discover": [f"t{i}" for i in range(6)], "report": [f"t{i}" for i in range(6, 10)]}
    whole = sb.rank_features(gemma3.model, planted, prompts.select(templates=split["discover"])).frame
    part = sb.rank_features(gemma3.model, planted, prompts, split=split).frame
    np.testing.assert_allclose(part["auroc"], whole["auroc"])
    assert sb.rank_features(gemma3.model, planted, prompts, split=split).n_units == 6


def test_two_saes_are_one_family(gemma3, planted, pairs):
    both = sb.rank_features(gemma3.model, [planted, gemma3.sae], many_pairs(10))
    alone = sb.rank_features(gemma3.model, planted, many_pairs(10))
    assert both.family_size == planted.d_sae + gemma3.sae.d_sae
    p = both.frame.set_index("feature")["p_fwer"]
    q = alone.frame.set_index("feature")["p_fwer"]
    assert (p[q.index] >= q - 1e-12).all(), "a larger family cannot make a corrected p smaller"


def test_nan_residuals_name_the_prompt(make_tiny, pairs):
    tiny = make_tiny("llama")
    model = tiny.fresh()
    token = next(iter(set(model.encode(pairs[2].human)) - set(model.encode(pairs[0].human))))
    model.hf.get_input_embeddings().weight[token] = float("nan")
    with pytest.raises(sb.RequestError, match="after layer 1 holds NaN or infinite values on 'Today"):
        sb.rank_features(model, tiny.sae, pairs)


def test_words_of_the_probe_reach_the_effect_rankings(gemma3, pairs):
    """by="attribution" uses the probe it is given: swapped word lists flip every sign."""
    one, other = (
        sb.rank_features(
            gemma3.model, gemma3.sae, pairs, by="attribution", probe=sb.Probe(*w)
        ).frame.set_index("index")["attribution"]
        for w in ((POSITIVE, NEGATIVE), (NEGATIVE, POSITIVE))
    )
    np.testing.assert_allclose(one.sort_index(), -other.sort_index(), atol=1e-5)
