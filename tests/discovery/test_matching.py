"""Matching across models: a feature finds itself, its copy under another index and model, and nothing among noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_1, write_gemma_scope_2
from scipy.stats import spearmanr

import sae_bias as sb
from sae_bias.discovery.matching import _groups, _permuted, _ranks, cell_class, match_features, same_sign
from sae_bias.discovery.tables import feature_acts
from sae_bias.stats.clustered import clustered_mean

LAYER = 3


@pytest.fixture(scope="module")
def bank():
    wanted = ("ai", "chatbot", "human", "person", "dog")
    grid = [
        p for p in sb.load_grid() if p.subject in wanted and (p.match or p.statement.startswith("published"))
    ]
    return sb.PromptGrid(tuple(grid[::3] + grid[1::3]), name="bank")


def planted(tiny, bank, folder, index, gemma_scope_1=False):
    """An SAE one feature of which reads AI speech off the last token as well as a linear reading can."""
    x = sb.residuals(tiny.model, [p.text for p in bank], LAYER)
    wanted = torch.tensor([2.0 if (p.group, p.act) == ("ai", "speech") else -1.0 for p in bank])
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), wanted).solution
    weights = random_sae(32, 96, seed=index)
    weights["w_enc"] *= 0.2
    weights["w_enc"][:, index], weights["b_enc"][index], weights["threshold"][index] = (
        solution[:-1],
        solution[-1],
        0.3,
    )
    if gemma_scope_1:
        return write_gemma_scope_1(folder / f"layer_{LAYER}/width_96/average_l0_9", weights)
    return write_gemma_scope_2(folder / f"layer_{LAYER}", weights, gemma_scope_2_config(LAYER, 96))


def test_a_feature_finds_itself(gemma3, bank, tmp_path, pairs, probe):
    folder = planted(gemma3, bank, tmp_path, 5)
    found = match_features(
        f"{folder}#5", gemma3.model, gemma3.model, str(folder), bank, pairs=pairs, probe=probe
    )
    assert str(found.best) == f"{folder}#5"
    first = found.to_frame().iloc[0]
    assert first["rho"] == pytest.approx(1.0)
    assert first["mutual"]
    assert first["same_class"]
    assert first["same_sign"] in ("yes", "undetermined"), "the same feature in the same model"
    assert first["removed_low"] <= first["removed"] <= first["removed_high"]
    assert [first[f"removed_original{end}"] for end in ("", "_low", "_high")] == [
        first[f"removed{end}"] for end in ("", "_low", "_high")
    ]
    assert found.margin == pytest.approx(first["rho"] - found.to_frame()["rho"].iloc[1])


def test_rho_is_spearmans(gemma3, bank, tmp_path):
    folder = planted(gemma3, bank, tmp_path, 5)
    found = match_features(f"{folder}#5", gemma3.model, gemma3.model, str(folder), bank)
    texts = [p.text for p in bank]
    own = feature_acts(gemma3.model, texts, sb.load_feature(f"{folder}#5"))
    for row in found.to_frame().head(4).to_dict("records"):
        other = feature_acts(gemma3.model, texts, sb.load_feature(row["feature"]))
        assert row["rho"] == pytest.approx(spearmanr(own, other)[0], abs=1e-4)


def test_the_same_reading_is_found_in_another_architecture(make_tiny, bank, tmp_path):
    a, b = make_tiny("gpt_neox"), make_tiny("llama")
    first, second = (
        planted(a, bank, tmp_path / "a", 5),
        planted(b, bank, tmp_path / "b", 40, gemma_scope_1=True),
    )
    found = match_features(f"{first}#5", a.model, b.model, [str(second)], bank)
    assert found.candidates["index"].iloc[0] == 40
    assert found.candidates["mutual"].iloc[0]
    assert found.margin > 0.03


def test_the_planted_feature_is_found_in_the_other_organism():
    """Beyond what subjects, and what statements, have in common; in the same cells, HC among them; with a sign told from 0."""
    import json

    from sae_bias.models.catalog import organism_folder

    truth = [json.loads((organism_folder(o) / "truth.json").read_text())["constructed"]["index"] for o in ("planted", "planted-gemma2")]  # fmt: skip
    other = "organism:planted-gemma2/constructed/layer_3/width_512/average_l0_18"
    pairs = sb.load_pairs().select(entities=sb.load_pairs().entities[:6])
    found = match_features(
        f"organism:planted/constructed#{truth[0]}", sb.load_model("organism:planted"), sb.load_model("organism:planted-gemma2"), other,
        n_permutations=200, pairs=pairs,
    )  # fmt: skip
    first = found.to_frame().iloc[0]
    assert str(found.best) == f"{other}#{truth[1]}"
    assert first["p_fwer"] == pytest.approx(1 / 201)
    assert first["class"] == found.profile_class == "AS"
    assert first["same_sign"] == "yes"
    assert first["removed_low"] > 0 < first["removed_original_low"]


def test_noise_has_no_match(make_tiny, bank, tmp_path):
    a, b = make_tiny("gpt_neox"), make_tiny("llama")
    first = planted(a, bank, tmp_path, 5)
    other = write_gemma_scope_2(
        tmp_path / f"other/layer_{LAYER}", random_sae(32, 64, 8), gemma_scope_2_config(LAYER, 64)
    )
    found = match_features(f"{first}#5", a.model, b.model, str(other), bank)
    assert found.best is None
    assert found.verdict.startswith("no match")


def test_the_class_names_the_cells_that_are_on(bank):
    speech = np.array([float(p.act == "speech") for p in bank])
    identity = np.array([float(p.group == "ai") for p in bank])
    assert cell_class(speech * identity, bank) == "AS"
    assert cell_class(identity, bank) == "AS+AN"
    assert cell_class(speech, bank) == "AS+HS+DS"
    assert cell_class(0 * speech, bank) == "silent"
    whole = sb.load_grid()
    bad = [float(p.act == "harm" or (p.group, p.act) == ("ai", "speech")) for p in whole]
    assert cell_class(np.array(bad), whole) == "AS+HC"


def test_a_profile_is_permuted_within_each_subject_and_within_each_statement(bank):
    """Sums over each label stay, whatever is drawn: what subjects (or statements) have in common cannot make a match."""
    target = np.arange(len(bank), dtype=float)
    for labels in _groups(bank):
        drawn = _permuted(target, labels, 5, np.random.default_rng(0))
        assert not np.array_equal(drawn[0], target)
        for label in set(labels):
            place = [i for i, given in enumerate(labels) if given == label]
            np.testing.assert_array_equal(
                np.sort(drawn[:, place], axis=1), np.tile(np.sort(target[place]), (5, 1))
            )


def test_two_features_that_share_subjects_only_do_not_match(gemma3, bank, tmp_path):
    """Both fire by who speaks (other reading within a subject): a free permutation calls that a match, one within subjects does not."""
    rng, subjects = np.random.default_rng(1), [p.subject for p in bank]
    level = {s: 10.0 * i for i, s in enumerate(dict.fromkeys(subjects))}
    first, second = (np.array([level[s] for s in subjects]) + rng.uniform(0, 1, len(bank)) for _ in range(2))
    (a,), (b,) = (_ranks(x[:, None]).T for x in (first, second))
    within = _permuted(a, subjects, 999, rng) @ b
    free = _permuted(a, [""] * len(bank), 999, rng) @ b
    assert (free >= a @ b).mean() < 0.01 < 0.05 < (within >= a @ b).mean()


def test_a_sign_is_shared_only_where_both_intervals_leave_out_zero():
    up, down, open_ = (clustered_mean(np.array(x), list("abcdefgh"), None) for x in ([1.0, 1.1] * 4, [-1.0, -1.1] * 4, [1.0, -1.0] * 4))  # fmt: skip
    assert same_sign(up, up) == same_sign(down, down) == "yes"
    assert same_sign(up, down) == "no"
    few = clustered_mean(np.array([1.0, 1.1, 1.0, 1.1, 1.0]), list("abcde"), None)
    assert few.ci_low > 0 and same_sign(up, open_) == same_sign(up, few) == "undetermined", (
        "five templates make no call"
    )


def test_bad_requests_are_refused(gemma3, bank, tmp_path):
    folder = planted(gemma3, bank, tmp_path, 5)
    narrow = write_gemma_scope_2(tmp_path / "n" / "layer_1", random_sae(24, 8), gemma_scope_2_config(1, 8))
    with pytest.raises(sb.RequestError, match="another model"):
        match_features(f"{folder}#5", gemma3.model, gemma3.model, str(narrow), bank)
    with pytest.raises(sb.RequestError, match="twice"):
        match_features(f"{folder}#5", gemma3.model, gemma3.model, [str(folder), str(folder)], bank)
    weights = random_sae(32, 8)
    weights["threshold"] = torch.full((8,), 1e9)
    silent = write_gemma_scope_2(tmp_path / "s" / "layer_1", weights, gemma_scope_2_config(1, 8))
    with pytest.raises(sb.RequestError, match="same activation on all"):
        match_features(f"{silent}#1", gemma3.model, gemma3.model, str(folder), bank)
    none = match_features(f"{folder}#5", gemma3.model, gemma3.model, str(silent), bank)
    assert none.best is None
    assert "silent" in none.verdict
