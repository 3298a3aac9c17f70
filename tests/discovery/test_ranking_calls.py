"""What a ranking adds to its statistics: leave-one-out, families, twins, one table of every call, the joint curve, figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2
from scipy.stats import spearmanr

import sae_bias as sb
from sae_bias.core.text import bracket
from sae_bias.discovery import contrasts
from sae_bias.discovery.attribution import attribution_agreement
from sae_bias.discovery.effects import effect_sentence
from sae_bias.prompts.grid import GridPrompt
from sae_bias.saes.neighbors import decoder_directions, decoder_families
from sae_bias.saes.stream import acts_blocks, live_blocks

D, PLANTED, LOPSIDED = 32, 2, 6
AI, HUMAN, ANIMAL = ("an AI", "a bot", "the AI"), ("a man", "a girl", "a nurse"), ("a dog", "a cat")


def residual(text: str) -> torch.Tensor:
    seed = int.from_bytes(text.encode(), "little") % (2**31)
    x = 0.1 * torch.randn(D, generator=torch.Generator().manual_seed(seed))
    ai, speech = "AI" in text or "bot" in text, "says" in text
    x[0] += 3.0 * (ai and speech)
    x[1] += 9.0 * ("bot" in text and speech)  # one subject alone
    return x


@pytest.fixture
def made(gemma3, tmp_path, monkeypatch):
    def read(model, prompts, saes, *, everywhere=False):
        rows = torch.stack([residual(p) for p in prompts])
        neutral = torch.stack([residual(f"neutral {i}") for i in range(20)])
        layers = set(saes)
        owner = torch.arange(len(rows))
        return (
            dict.fromkeys(layers, rows),
            dict.fromkeys(layers, neutral),
            dict.fromkeys(layers, (rows, owner)) if everywhere else None,
        )

    monkeypatch.setattr(contrasts, "read_residuals", read)
    monkeypatch.setattr(contrasts, "prompt_scores", lambda model, texts, probe: np.zeros(len(texts)))
    weights = random_sae(D, 24, seed=4)
    weights["w_enc"], weights["b_enc"] = weights["w_enc"] * 0.2, weights["b_enc"] * 0
    for coordinate, index in enumerate((PLANTED, LOPSIDED)):
        weights["w_enc"][:, index], weights["threshold"][index] = torch.eye(D)[coordinate], 1.0
    return sb.load_sae(write_gemma_scope_2(tmp_path / "made", weights, gemma_scope_2_config(1, 24)))


def a_grid(n: int = 16, subjects=(AI, HUMAN, ANIMAL)) -> sb.PromptGrid:
    groups = ("ai", "human", "animal")
    return sb.PromptGrid(
        tuple(
            GridPrompt(f"{s} {verb} thing {m}. This is", s, group, f"{act}{m}", act, f"m{m}", "mundane")
            for m in range(n)
            for act, verb in (("speech", "says"), ("nonspeech", "sees"))
            for group, names in zip(groups, subjects)
            for s in names
        )
        + tuple(
            GridPrompt(f"{s} hurts thing {h}. This is", s, group, f"harm{h}", "harm")
            for h in range(14)
            for group, names in zip(groups, subjects)
            for s in names
        )
    )


def some_pairs(n: int = 10) -> sb.PromptPairs:
    entities = list(zip(HUMAN, AI))
    return sb.PromptPairs(
        tuple(
            sb.PromptPair(f"{h} says thing {t}. This is", f"{a} says thing {t}. This is", f"t{t}", h)
            for t in range(n)
            for h, a in entities
        )
    )


def row(ranking, index):
    return ranking.to_frame().set_index("index").loc[index]


def test_a_call_that_hangs_on_one_subject_does_not_survive_leaving_it_out(gemma3, made):
    ranking = sb.rank_features(gemma3.model, made, a_grid(), by="interaction")
    assert row(ranking, PLANTED)["ai_speech"] == "yes"
    assert row(ranking, PLANTED)["survives_loo"] == "yes"
    assert row(ranking, LOPSIDED)["interaction"] > row(ranking, PLANTED)["interaction"] / 2
    assert row(ranking, LOPSIDED)["survives_loo"] == "no"


def test_separation_is_held_against_every_entity_too(gemma3, made):
    ranking = sb.rank_features(gemma3.model, made, some_pairs())
    assert row(ranking, PLANTED)["separates"] == row(ranking, PLANTED)["survives_loo"] == "yes"
    assert row(ranking, LOPSIDED)["separates"] == "yes"
    assert row(ranking, LOPSIDED)["survives_loo"] == "no"
    one = sb.rank_features(gemma3.model, made, some_pairs().select(entities=[HUMAN[0]]))
    assert set(one.frame["survives_loo"]) == {"undetermined"}


def test_held_out_conditions_are_those_of_the_report_statements(gemma3, made):
    grid = a_grid()
    names = list(dict.fromkeys(p.match for p in grid))
    split = {"discover": names[:9], "report": names[9:]}
    ranking = sb.rank_features(gemma3.model, made, grid, by="interaction", split=split)
    held = [
        i for i, p in enumerate(grid) if p.match in split["report"] and (p.group, p.act) == ("ai", "speech")
    ]
    acts = made.encode(torch.stack([residual(grid[i].text) for i in held])).numpy()
    assert row(ranking, PLANTED)["held_AS"] == pytest.approx(acts[:, PLANTED].mean(), rel=1e-5)
    assert set(ranking.frame["split"]) == {"discover"}
    pairs = some_pairs()
    ranking = sb.rank_features(gemma3.model, made, pairs, split={"discover": pairs.templates[:6], "report": pairs.templates[6:]})  # fmt: skip
    assert ranking.n_units == 6
    assert row(ranking, PLANTED)["held_auroc"] > 0.6


def test_one_table_carries_every_statistic_and_call(gemma3, made):
    grid, pairs = a_grid(), some_pairs()
    ranking = sb.rank_features(gemma3.model, made, grid, by="interaction", pairs=pairs, max_view=True)
    expected = {"auroc", "mean_diff", "fire_diff", "t", "p_fwer", "q_bh", "t_separation", "p_fwer_separation", "interaction", "held_bound", "interaction_max", "auroc_max", "separates", "ai_speech", "causal_ai_speech", "family", "family_size", "twin", "density", "dense", "dead", "split"}  # fmt: skip
    assert expected <= set(ranking.frame.columns)
    alone = sb.rank_features(gemma3.model, made, pairs)
    both = row(ranking, PLANTED)
    assert both["auroc"] == row(alone, PLANTED)["auroc"]
    assert both["p_fwer_separation"] == row(alone, PLANTED)["p_fwer"]
    assert set(alone.frame["ai_speech"]) == {"undetermined"}
    assert row(ranking, 0)["causal_ai_speech"] == "no"
    assert both["causal_ai_speech"] == "undetermined"
    assert both["interaction_max"] == pytest.approx(both["interaction"])


def test_too_few_statements_say_how_many_are_needed(gemma3, made):
    ranking = sb.rank_features(gemma3.model, made, a_grid(5), by="interaction")
    assert set(ranking.frame["ai_speech"]) == {"undetermined"}
    assert "at least 12" in ranking.note
    assert ranking.top(1)[0].index in (PLANTED, LOPSIDED)


def test_twins_and_families_are_named(gemma3, pairs, tmp_path):
    weights = random_sae(D, 60, seed=1)
    weights["w_dec"][8] = weights["w_dec"][3] + 0.01
    turned = {k: v.flip(-1) if k == "w_enc" else v.flip(0) if k != "b_dec" else v for k, v in weights.items()}
    for name, w in (("layer_1_l0_60", weights), ("layer_1_l0_60_seed_1", turned)):
        write_gemma_scope_2(tmp_path / name, w, gemma_scope_2_config(1, 60))
    ranking = sb.rank_features(gemma3.model, [str(tmp_path / "layer_1_l0_60"), str(tmp_path / "layer_1_l0_60_seed_1")], pairs)  # fmt: skip
    assert ranking.family_size == 120
    live = ranking.frame[~ranking.frame["dead"]]
    first = live.iloc[0]
    assert first["family"] == first["feature"]
    assert live["family_size"].min() >= 2  # each has its twin in the other SAE
    assert first["twin"].endswith(f"#{59 - first['index']}")
    assert first["twin_cosine"] == pytest.approx(1.0, abs=1e-5)


def test_families_use_the_decoder_rows_of_the_right_sae(gemma3, tmp_path):
    saes = {}
    for seed in (1, 2):
        weights = random_sae(D, 20, seed=seed)
        sae = sb.load_sae(write_gemma_scope_2(tmp_path / f"s{seed}", weights, gemma_scope_2_config(1, 20)))
        saes[str(sae.id)] = sae
    refs = [sb.FeatureRef(s.id, i) for i in (7, 3) for s in saes.values()]
    rows = decoder_directions(saes, refs)
    for ref, direction in zip(refs, rows):
        w = saes[str(ref.sae)].feature(ref.index).w_dec
        assert torch.allclose(direction, w / w.norm(), atol=1e-6)
    assert decoder_families(rows).tolist() == [0, 1, 2, 3]


def test_live_blocks_hold_what_whole_blocks_hold(gemma3, gemma2):
    for tiny in (gemma3, gemma2):
        x = torch.cat(sb.residuals(tiny.model, ["an AI says hello.", "a dog wants tea."], 1, positions="all"))
        whole = torch.cat([a for _, a, _ in acts_blocks(tiny.sae, x)], dim=1).double().numpy()
        got = np.zeros_like(whole)
        for block in live_blocks(tiny.sae, x, x):
            got[:, block.index] = block.acts
            assert np.allclose(block.density, (block.acts > 0).mean(0))
        assert np.allclose(got, whole, atol=1e-6)


def test_agreement_is_over_the_features_that_matter():
    attributed, exact = np.array([1.0, 0.5, 0.2, 0.001, np.nan]), np.array([0.9, 0.6, 0.1, 0.002, 1.0])
    agreement = attribution_agreement(attributed, exact, bias=1.0)
    assert agreement.n == 3
    assert agreement.rho == spearmanr(attributed[:3], exact[:3])[0]
    assert agreement.slope == pytest.approx(np.polyfit(attributed[:3], exact[:3], 1)[0])
    assert np.isnan(attribution_agreement(attributed[:2], exact[:2], 1.0).rho)


def test_ablation_brings_the_joint_curve_and_the_agreement(gemma3, pairs, probe):
    ranking = sb.rank_features(gemma3.model, gemma3.sae, pairs, by="ablation", probe=probe, top_k=12)
    assert ranking.cumulative["k"].tolist() == list(range(1, len(ranking.cumulative) + 1))
    first = ranking.cumulative.iloc[0]
    assert first["feature"] == str(ranking.top(1)[0])
    assert first["change"] == pytest.approx(ranking.frame["ablation"].iloc[0], abs=1e-4)
    assert ranking.agreement.n <= 12
    assert "Spearman" in ranking.note
    split = {"discover": pairs.templates[:2], "report": pairs.templates[2:]}
    held = sb.rank_features(gemma3.model, gemma3.sae, pairs, by="ablation", probe=probe, top_k=6, split=split)
    assert set(held.cumulative["split"]) == {"report"}
    assert (
        f"unsteered bias {sb.run_probe(gemma3.model, pairs, probe).bias:+.4f} on 3 templates;" in ranking.note
    )
    on_two = sb.run_probe(gemma3.model, pairs.select(templates=split["discover"]), probe).bias
    assert f"unsteered bias {on_two:+.4f} on 2 discover templates;" in held.note
    told = held.frame.dropna(subset=["ablation"]).iloc[0]
    assert told["ablation_low"] < told["ablation"] < told["ablation_high"]
    assert f"nats {bracket(told['ablation_low'], told['ablation_high'])}" in effect_sentence(told)


@pytest.mark.parametrize("by", ["separation", "attribution", "ablation", "interaction"])
def test_every_ranking_draws_itself(gemma3, pairs, probe, by):
    prompts = a_grid() if by == "interaction" else pairs
    ranking = sb.rank_features(gemma3.model, gemma3.sae, prompts, by=by, probe=probe, top_k=8)
    assert ranking.plot().data
    assert ranking._repr_html_().startswith("<p>")
    assert by in repr(ranking)
