"""One seeded split of templates: rank, sweep, compare and fit share it, and a feature takes it along."""

from __future__ import annotations

import json
import warnings

import pytest

import sae_bias as sb
from sae_bias.cli.main import main
from sae_bias.runs.manifest import split_of
from sae_bias.stats.design import split_templates
from sae_bias.workflows.fit import fit_split

PLANTED, SAE = "organism:planted", "organism:planted/resid_post/layer_3_width_512_l0_small"


def command(capsys, *args):
    """The JSON a command printed, and what it said on standard error."""
    code = main([*args, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out), captured.err


def test_the_split_is_of_whole_templates_by_name_and_seed():
    pairs = sb.load_pairs()
    families = {p.template: p.family for p in pairs}
    assert pairs.split(3) == split_templates(pairs.templates, {"discover": 0.4, "tune": 0.2, "report": 0.4}, 3, families=families)  # fmt: skip
    assert pairs.split(3) == fit_split(pairs, 3)
    assert pairs.split(3) != pairs.split(4)
    parts = [set(part) for part in pairs.split().values()]
    assert set.union(*parts) == set(pairs.templates)
    assert sum(map(len, parts)) == len(pairs.templates)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """A ranking's run folder, under a seed of its own."""
    out = tmp_path_factory.mktemp("split") / "ranked"
    args = ["rank", PLANTED, SAE, "--by", "attribution", "--top", "1", "--seed", "3", "--out", str(out), "--quiet"]  # fmt: skip
    assert main(args) == 0
    return out


def test_a_sweep_takes_the_split_of_the_ranking(ranked, tmp_path, capsys):
    pairs = sb.load_pairs()
    assert split_of(ranked, pairs) == pairs.split(3)
    args = ["sweep", PLANTED, f"{SAE}#0", "--edit", "ablate", "--controls", "0", "--no-costs"]
    found, said = command(capsys, *args, "--split", str(ranked), "--out", str(tmp_path / "a"))
    kept = json.loads((tmp_path / "a" / "manifest.json").read_text())["split"]
    assert {k: tuple(v) for k, v in kept.items()} == pairs.split(3)
    assert "not that of --seed 0" in said
    rows = {row["split"]: row["n_pairs"] for row in found["cells"]}
    assert rows == {name: 8 * len(pairs.split(3)[name]) for name in ("tune", "report")}
    _, said = command(capsys, *args, "--split", str(ranked), "--seed", "3")
    assert "seed" not in said
    alone, _ = command(capsys, *args)
    assert {r["split"]: r["n_pairs"] for r in alone["cells"]} == {k: 8 * len(pairs.split()[k]) for k in ("tune", "report")}  # fmt: skip


def test_two_splits_in_one_folder_are_refused(ranked, tmp_path, capsys):
    args = ["sweep", PLANTED, f"{SAE}#0", "--edit", "ablate", "--controls", "0", "--no-costs", "--out", str(tmp_path / "b")]  # fmt: skip
    command(capsys, *args)
    assert main([*args, "--split", str(ranked)]) == 2
    assert "another split" in capsys.readouterr().err
    assert main([*args, "--split", str(tmp_path)]) == 2
    assert "holds no split" in capsys.readouterr().err


def test_a_feature_takes_the_split_of_its_ranking_along():
    model, pairs = sb.load_model(PLANTED), sb.load_pairs()
    split = pairs.split(3)
    feature = sb.rank_features(model, SAE, pairs, by="separation", split=split).top(1)[0]
    assert feature.split == split
    assert feature == sb.FeatureRef.parse(str(feature)), "the same feature, however it was found"
    swept = sb.run_sweep(model, pairs, sb.Sweep([sb.Ablate(feature)]))
    counts = swept.frame.groupby("split")["n_pairs"].first().to_dict()
    assert counts == {name: 8 * len(split[name]) for name in ("tune", "report")}
    with pytest.warns(UserWarning, match="discovered its feature"):
        sb.run_sweep(model, pairs, sb.Sweep([sb.Ablate(feature)], splits={"tune": split["report"], "report": split["discover"]}))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb.run_sweep(model, pairs, sb.Sweep([sb.Ablate(feature)], splits={"tune": split["tune"], "report": split["report"]}))  # fmt: skip


def test_the_default_ranking_is_by_interaction_with_effects(capsys):
    found, _ = command(capsys, "rank", PLANTED, SAE, "--top", "3")
    assert found["by"] == "interaction"
    first = found["features"]
    sizes = [abs(row["interaction"]) for row in first]
    assert sizes == sorted(sizes, reverse=True)
    assert all(
        row[c] is not None for row in first for c in ("attribution", "integrated", "ablation", "resampling")
    )
    model, pairs = sb.load_model(PLANTED), sb.load_pairs()
    mine = pairs.select(templates=pairs.split()["discover"])
    base = sb.run_probe(model, mine)
    with sb.intervene(model, sb.Ablate(first[0]["feature"])):
        after = sb.run_probe(model, mine)
    assert first[0]["ablation"] == pytest.approx(base.did.mean - after.did.mean, abs=1e-4)
