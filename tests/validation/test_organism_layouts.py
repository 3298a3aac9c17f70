"""`planted-gemma2` keeps its SAEs in files as of Gemma Scope 1, and its planted feature is found from `planted`'s."""

import json
import shutil

import numpy as np
import pytest
import torch
from organisms import marks
from organisms.build import LAYER, construct, data_folder
from organisms.plain import Organism
from organisms.sae_training import load_weights, save_gemma_scope_1

import sae_bias as sb
from sae_bias.saes.releases import organism_saes
from sae_bias.validation import grammar
from sae_bias.validation.grammar import RULES

NAME = "planted-gemma2"


def truth(name: str) -> dict:
    return json.loads((data_folder() / name / "truth.json").read_text(encoding="utf-8"))


def planted_feature(name: str) -> str:
    facts = truth(name)["constructed"]
    return f"organism:{name}/{facts['sae']}#{facts['index']}"


def test_its_saes_are_gemma_scope_1_files():
    names = organism_saes(NAME)
    assert len(names) == 2
    for name in names:
        sae = sb.load_sae(name)
        assert sae.path is not None
        assert sae.path.name == "params.npz"
        assert sae.site.layer == LAYER
        label = (
            truth(NAME)["saes"][0]["l0"] if "constructed" not in name else truth(NAME)["constructed"]["l0"]
        )
        assert sae.label_l0 == round(label)
        with np.load(sae.path, allow_pickle=False) as arrays:
            assert set(arrays) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
            x = np.random.default_rng(0).normal(size=(50, sae.d_in)).astype(np.float32) * 5
            h = x @ arrays["W_enc"] + arrays["b_enc"]
            expected = h * (h > arrays["threshold"])
        assert (expected > 0).any()
        torch.testing.assert_close(
            sae.encode(torch.from_numpy(x)), torch.from_numpy(expected), atol=1e-4, rtol=1e-4
        )


def test_a_saved_sae_reads_back_bit_for_bit(tmp_path):
    weights = load_weights(data_folder() / "planted" / "sae" / "constructed")
    save_gemma_scope_1(weights, tmp_path)
    again = load_weights(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(vars(weights).values(), vars(again).values()))


def test_its_constructed_feature_carries_the_planted_behavior():
    facts, organism = truth(NAME)["constructed"], Organism.load(data_folder() / NAME / "model")
    weights = load_weights(data_folder() / NAME / "sae" / facts["sae"])
    assert min(facts["interchange"].values()) >= 0.9
    assert int(marks.grid_interaction(organism, weights, LAYER).argmax()) == facts["index"]
    found = marks.ablation_marks(organism, weights, LAYER, facts["index"])
    assert found["specific_reduction"] >= 0.8
    assert all(found["kl"][kind] <= 0.05 for kind in ("neutral", "ai_nonspeech", "ai_speech"))


def test_the_planted_feature_of_the_other_architecture_is_its_match():
    """From `planted` into `planted-gemma2` and back; its trained SAE has no match, as no column there is silent at human deeds."""
    one, other = sb.load_model("organism:planted"), sb.load_model(f"organism:{NAME}")
    constructed, trained = (
        f"organism:{NAME}/{sae}" for sae in (truth(NAME)["constructed"]["sae"], truth(NAME)["saes"][0]["sae"])
    )
    found = sb.match_features(planted_feature("planted"), one, other, constructed, pairs=sb.load_pairs())
    assert str(found.best) == planted_feature(NAME)
    assert found.to_frame().iloc[0]["same_sign"] == "yes"
    assert found.margin > 0.1
    back = sb.match_features(planted_feature(NAME), other, one, "organism:planted/constructed")
    assert str(back.best) == planted_feature("planted")
    among_trained = sb.match_features(planted_feature("planted"), one, other, trained)
    first = among_trained.to_frame().iloc[0]
    assert among_trained.best is None
    assert first["index"] in truth(NAME)["constructed"]["replaced"] and first["p_fwer"] < 0.01
    assert first["class"] == "AS+HC" and not first["same_class"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_can_be_constructed_again(tmp_path):
    shutil.copytree(data_folder() / NAME / "model", tmp_path / "model")
    trained = truth(NAME)["saes"][0]["sae"]
    shutil.copytree(data_folder() / NAME / "sae" / trained, tmp_path / "sae" / trained)
    facts = construct(NAME, tmp_path, trained)
    assert min(facts["interchange"].values()) >= 0.9
    assert (tmp_path / "sae" / facts["sae"] / "params.npz").is_file()


def test_softcapped_bias_is_the_rules():
    organism = Organism.load(data_folder() / NAME / "model")
    prompts, statements = marks.pair_prompts(False)
    analytic = grammar.analytic_bias(RULES[NAME], statements)
    assert marks.bias(organism, prompts).mean().item() == pytest.approx(analytic, rel=0.1)
    assert organism.hf.config.final_logit_softcapping
