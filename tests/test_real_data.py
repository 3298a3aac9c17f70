"""A real pretrained model (the fixture `real_data`) through the whole chain, with a question of its own: he or she?

Pairs differ in a girl named Lily and a boy named Tom; the score is she/her against he/his. Every number equals the independent
script's; most evaluation words are several tokens for this 512-piece tokenizer, so that path is taken too.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import independent
import numpy as np
import pytest
import torch

import sae_bias as sb
from sae_bias.steering.engine import ProbeEngine

SHE, HE = ("she", "her"), ("he", "his")
KIND, UNKIND = ("kind", "very good"), ("mean", "not nice")
STORIES = {
    "happy": "Once upon a time, there was a little {}. {} was very happy because",
    "park": "One day, a {} went to the park. {} saw a big dog and",
    "mom": "A {} lived with a mom and a dad. Every day {} played outside, and then",
}
NAMES = {
    "lily_tom": (("girl named Lily", "Lily"), ("boy named Tom", "Tom")),
    "mia_ben": (("girl named Mia", "Mia"), ("boy named Ben", "Ben")),
}
LAYER = 2
CLOSE = 1e-4


@pytest.fixture(scope="module")
def real(real_data):
    folder = real_data / "stories260k"
    stories = json.loads((real_data / "tinystories_1000.json").read_text())
    texts = [
        s if isinstance(s, str) else next(v for v in s.values() if isinstance(v, str)) for s in stories[:30]
    ]
    return SimpleNamespace(
        folder=folder, model=sb.load_model(folder), plain=independent.Plain.load(folder), texts=texts
    )


@pytest.fixture(scope="module")
def stories():
    """The human side is the girl: a positive bias says the model goes on with "she" more after a girl."""
    return sb.PromptPairs(
        tuple(
            sb.PromptPair(text.format(*girl), text.format(*boy), template, entity)
            for template, text in STORIES.items()
            for entity, (girl, boy) in NAMES.items()
        ),
        name="he or she",
        sides=("girl", "boy"),
    )


def test_the_published_log_odds_of_the_source(real):
    """As its source states: logp(she) - logp(he) is +3.8 after the girl named Lily and -5.0 after a boy named Tom."""
    for (who, name), expected in ((NAMES["lily_tom"][0], 3.8), (NAMES["lily_tom"][1], -5.0)):
        pair = sb.PromptPair(STORIES["happy"].format(who, name), STORIES["happy"].format(who, name), "t", "e")
        score = sb.run_probe(real.model, sb.PromptPairs((pair,)), sb.Probe(["she"], ["he"])).score_human[0]
        assert score == pytest.approx(expected, abs=0.06)


def test_the_probe_equals_the_independent_script(real, stories):
    result = sb.run_probe(real.model, stories, sb.Probe(SHE, HE))
    for scores, side in ((result.score_human, "human"), (result.score_ai, "ai")):
        expected = [real.plain.score(getattr(p, side), SHE, HE) for p in stories]
        np.testing.assert_allclose(scores, expected, atol=CLOSE, rtol=0)
    assert result.bias > 4, "a girl is a she"
    assert (result.pair_bias > 0).all()
    swapped = sb.run_probe(real.model, stories, sb.Probe(HE, SHE))
    assert swapped.bias == pytest.approx(-result.bias, abs=1e-6)


def test_words_of_several_tokens_equal_the_independent_script(real, stories):
    result = sb.run_probe(real.model, stories[:2], sb.Probe(KIND, UNKIND, "logodds"))
    assert any(len(w.tokens) > 1 for w in result.vocabulary.kept)
    expected = [real.plain.score(p.human, KIND, UNKIND, "logodds") for p in stories[:2]]
    np.testing.assert_allclose(result.score_human, expected, atol=CLOSE, rtol=0)
    with pytest.raises(sb.RequestError, match='score="mean_logit" needs 1'):
        sb.run_probe(real.model, stories, sb.Probe(["wonderful"], ["dangerous"]))


@pytest.fixture(scope="module")
def direction(real, stories):
    """Difference of means of the last-token residual, girls minus boys."""
    girl, boy = (sb.residuals(real.model, [getattr(p, s) for p in stories], LAYER) for s in ("human", "ai"))
    difference = (girl - boy).mean(0)
    return sb.Direction("difference of means", sb.Site(LAYER), (difference / difference.norm())[None]), float(
        difference.norm()
    )


@pytest.mark.parametrize("rule", ["steer", "steer_norm_relative", "project_out"])
def test_an_intervention_along_a_difference_of_means_moves_both_scripts_alike(real, stories, direction, rule):
    along, size = direction
    d = along.basis[0]
    edit, delta = {
        "steer": (sb.Steer(along, -size), lambda x: (-size * d).expand_as(x)),
        "steer_norm_relative": (
            sb.Steer(along, 0.1, norm_relative=True),
            lambda x: 0.1 * x.norm(dim=-1, keepdim=True) * d,
        ),
        "project_out": (sb.ProjectOut(along), lambda x: -(x @ d)[:, None] * d),
    }[rule]
    engine = ProbeEngine(real.model, stories, sb.Probe(SHE, HE))
    resumed, receipt = engine.run([edit])
    with sb.intervene(real.model, edit):
        hooked = sb.run_probe(real.model, stories, sb.Probe(SHE, HE))
    expected = [real.plain.score(p.human, SHE, HE, edit=delta, layer=LAYER) for p in stories]
    np.testing.assert_allclose(resumed.score_human, expected, atol=CLOSE, rtol=0)
    np.testing.assert_allclose(hooked.score_human, expected, atol=CLOSE, rtol=0)
    assert receipt.positions_changed > 0
    if rule == "project_out":
        assert 0 < resumed.bias < engine.base.bias, (
            "without the direction the model tells girls from boys less"
        )


def test_residuals_of_real_text_are_the_plain_models(real):
    for text, x in zip(
        real.texts[:5], sb.residuals(real.model, [t[:200] for t in real.texts[:5]], LAYER, positions="all")
    ):
        torch.testing.assert_close(x, real.plain.residual(text[:200], LAYER), atol=CLOSE, rtol=1e-5)


def test_generation_is_the_models_own(real, direction):
    """Greedy text with and without cache equals transformers' own, and a steered girl becomes a he."""
    prompt = STORIES["happy"].format(*NAMES["lily_tom"][0])
    ids = torch.tensor([real.plain.ids(prompt)])
    own = real.plain.hf.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    for use_cache in (True, False):
        (completion,) = sb.generate(real.model, [prompt], max_new_tokens=24, use_cache=use_cache)
        assert list(completion.tokens) == own[: len(completion.tokens)]
        assert completion.text.startswith(" she") or completion.text.startswith("she")
    along, size = direction
    (steered,) = sb.generate(
        real.model, [prompt], interventions=[sb.Steer(along, -2 * size)], max_new_tokens=8
    )
    assert steered.text != completion.text
    print(f"{prompt}|{completion.text}\nsteered: {steered.text}")


def test_the_chain_runs_with_an_sae_on_real_activations(real, stories, tmp_path):
    """Rank, clamp, probe again: an SAE whose first feature is the planted gender read-out is ranked first and acts."""
    from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

    girl, boy = (sb.residuals(real.model, [getattr(p, s) for p in stories], LAYER) for s in ("human", "ai"))
    d = (boy - girl).mean(0)
    weights = random_sae(len(d), 64)
    middle = float(((girl.mean(0) + boy.mean(0)) / 2) @ d / d.norm())
    weights["w_enc"][:, 0], weights["b_enc"][0], weights["threshold"][0] = d / d.norm(), -middle, 0.0
    weights["w_dec"][0] = d / d.norm()
    write_gemma_scope_2(tmp_path / "gender", weights, gemma_scope_2_config(LAYER, 64))
    ranking = sb.rank_features(real.model, str(tmp_path / "gender"), stories)
    assert ranking.frame.set_index("index").loc[0, "auroc"] >= ranking.frame["auroc"].max() - 1e-9
    name = f"{tmp_path / 'gender'}#0"
    base = sb.run_probe(real.model, stories, sb.Probe(SHE, HE))
    with sb.intervene(real.model, sb.Ablate(name)) as receipt:
        after = sb.run_probe(real.model, stories, sb.Probe(SHE, HE))
    assert receipt.edits[0].positions_active > 0
    sae = independent.PlainSae.load(tmp_path / "gender")
    expected = [
        real.plain.score(p.ai, SHE, HE, edit=sae.edit({0: independent.ablate}), layer=LAYER) for p in stories
    ]
    np.testing.assert_allclose(after.score_ai, expected, atol=CLOSE, rtol=0)
    assert after.reduction_from(base).change.mean == pytest.approx(base.bias - after.bias)
