"""Sweeps: what a cell is, what is run together, what a table says, and that a resumed sweep has the same bits."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np
import pandas as pd
import pytest
import torch
from passes import layer_tokens

import sae_bias as sb
from sae_bias.runs.folder import RunFolder
from sae_bias.stats.reduction import NOT_DISTINGUISHABLE
from sae_bias.steering import runner as runner_module
from sae_bias.steering import shared as shared_module
from sae_bias.steering.banks import bank_items
from sae_bias.steering.engine import ProbeEngine
from sae_bias.workflows.best_strength import choose_strength
from sae_bias.workflows.cells import Cell, Plan
from sae_bias.workflows.sweep import cell_rows, collect, merge_run
from sae_bias.workflows.sweep_work import LocalWorkers, Work

F, G = 3, 5
STRENGTHS = [0.0, -0.5, -1.0, -2.0]
COLUMNS = [
    "cell",
    "intervention",
    "feature",
    "strength",
    "positions",
    "split",
    "n_pairs",
    "bias",
    "ci_low",
    "ci_high",
    "change",
    "mean_abs_change",
]


@pytest.fixture
def edits(gemma3):
    feature = gemma3.feature(F)
    return [sb.Clamp(feature, v) for v in STRENGTHS] + [sb.Ablate(gemma3.feature(G))]


# --- the table ---


def test_a_sweep_is_the_base_and_its_cells(gemma3, pairs, probe, edits):
    frame = sb.run_sweep(gemma3.model, pairs, sb.Sweep(edits), probe=probe).to_frame()
    assert list(frame.columns[: len(COLUMNS)]) == COLUMNS
    assert list(frame["kind"]) == ["base"] + ["candidate"] * len(edits)
    assert set(frame["split"]) == {"all"}
    assert frame["bias"][0] == pytest.approx(sb.run_probe(gemma3.model, pairs, probe).bias, rel=1e-5)
    for row, edit in zip(frame.iloc[1:].itertuples(), edits):
        with sb.intervene(gemma3.model, edit):
            after = sb.run_probe(gemma3.model, pairs, probe)
        assert row.bias == pytest.approx(after.bias, rel=1e-4, abs=1e-5)
        assert row.change == pytest.approx(row.bias - frame["bias"][0])
    assert not any(word in " ".join(frame.columns) for word in ("path", "host", "second", "time"))


def test_several_strengths_in_one_pass_equal_one_at_a_time(tiny, pairs, probe, monkeypatch):
    """Stacked cells, each changing other rows, against each cell alone."""
    cells = [[sb.Clamp(tiny.feature(F), v)] for v in STRENGTHS] + [
        [sb.Ablate(tiny.feature(i))] for i in range(G, G + 6)
    ]
    cells.insert(2, [])
    together = ProbeEngine(tiny.model, pairs, probe).run_many(cells)
    monkeypatch.setattr(runner_module, "STACK", 1)
    alone = ProbeEngine(tiny.model, pairs, probe).run_many(cells)
    for (a, receipt_a), (b, receipt_b) in zip(together, alone):
        np.testing.assert_allclose(a.values_ai, b.values_ai, rtol=1e-4, atol=2e-4)
        assert receipt_a.rows() == receipt_b.rows()


def test_stacked_passes_stay_within_the_token_budget(gemma3, pairs, probe, monkeypatch):
    seen: list[int] = []
    plain = shared_module.run_packed
    monkeypatch.setattr(
        shared_module,
        "run_packed",
        lambda model, packed, kept: (seen.append(packed.tokens.numel()), plain(model, packed, kept))[1],
    )
    engine = ProbeEngine(gemma3.model, pairs, probe)
    one = engine.engine.runner.reads.n_tokens
    monkeypatch.setattr(runner_module, "STACK_TOKENS", {"cpu": 2 * one})
    engine.run_many([[sb.Steer(gemma3.feature(F), float(v))] for v in range(1, 8)])
    assert one < max(seen) <= 2 * one
    assert 7 * len(engine.engine.runner.reads.tree) <= sum(seen) <= 1.1 * 7 * one


def _table(rows):
    """A sweep's table of two splits: `rows` are (cell, SR on tune, SR on report, β, KL_off)."""
    out = []
    for cell, tune, report, beta, off in rows:
        common = {
            "cell": cell, "kind": "candidate", "rule": cell, "strength": -1.0, "outside_observed": False, "beta": beta, "kl_off": off,
            "red_reason": "", "specific_reason": "", "spec_low": report - 0.1, "spec_high": report + 0.1,
        }  # fmt: skip
        out += [common | {"split": "tune", "specific_reduction": tune}, common | {"split": "report", "specific_reduction": report}]  # fmt: skip
    return pd.DataFrame(out)


def test_the_strength_is_chosen_by_specific_reduction_and_reported_held_out():
    """The largest SR on tune among those that keep β ≥ 0.7 and KL_off ≤ 0.05: not the largest SR of all."""
    table = _table(
        [
            ("flat", 0.9, 0.9, 0.6, 0.0),
            ("costly", 0.9, 0.9, 0.9, 0.06),
            ("good", 0.8, 0.7, 0.9, 0.01),
            ("less", 0.5, 0.9, 1.0, 0.0),
        ]
    )
    best = choose_strength(table, "tune", "report")
    assert (best.cell, best.in_sample, best.held_out) == ("good", 0.8, 0.7)
    assert (best.held_out_low, best.held_out_high) == pytest.approx((0.6, 0.8))
    assert "in-sample" in repr(best)


def test_rounding_does_not_choose_between_two_names_of_one_edit():
    """Ablating and clamping to 0 are one edit; a batch of another shape puts either a millionth ahead."""
    first, second = ("ablate", 0.8, 0.7, 0.9, 0.01), ("clamp to 0", 0.8 + 1e-6, 0.7, 0.9, 0.01)
    assert choose_strength(_table([first, second]), "tune", "report").cell == "ablate"
    assert (
        choose_strength(_table([first, ("better", 0.81, 0.7, 0.9, 0.01)]), "tune", "report").cell == "better"
    )


def test_an_edit_that_turns_the_bias_round_is_not_chosen():
    """0.2 of the bias left is better than −0.9 of it: an overshoot is a bias too."""
    bank = list(np.random.default_rng(0).normal(0, 2, len(bank_items()[0])))
    facts = {"bank": bank, "kl_off": 0.0}
    left = {"base": 1.0, "most gone": 0.2, "turned round": -0.9}
    cells = {name: _cell_frame([k, 1.1 * k, 0.9 * k, 1.05 * k], facts) for name, k in left.items()}
    splits = {"tune": ["t0", "t1"], "report": ["t0", "t1"]}
    rows = cell_rows([_facts(n) for n in cells], cells, splits, costs=True)
    best = choose_strength(rows, "tune", "report")
    assert (best.cell, best.held_out) == ("most gone", pytest.approx(0.8))


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (_table([("a", 0.4, 0.4, 0.69, 0.0), ("b", 0.5, 0.5, -0.3, 0.0)]), "no strength keeps β ≥ 0.7 (the most is 0.69)"),
        (_table([("a", 0.4, 0.4, 0.9, 0.2)]), "KL_off ≤ 0.05 (the least is 0.2)"),
        (_table([("a", np.nan, np.nan, 0.9, 0.0)]).assign(red_reason=NOT_DISTINGUISHABLE), NOT_DISTINGUISHABLE),
        (_table([("a", 0.4, 0.4, 0.9, 0.0)]).drop(columns="specific_reduction"), "needs costs"),
        (_table([("a", 0.4, 0.4, 0.9, np.nan)]), "KL_off was not measured"),
    ],
)  # fmt: skip
def test_no_strength_is_named_where_none_is_best(table, why):
    best = choose_strength(table, "tune", "report")
    assert best.cell == ""
    assert why in best.reason
    assert "undefined" in repr(best)


def test_best_strength_needs_both_splits(gemma3, pairs, probe, edits):
    splits = {"tune": ["survive", "deleted"], "report": ["hello"]}
    result = sb.run_sweep(gemma3.model, pairs, sb.Sweep(edits, splits=splits), probe=probe)
    assert result.best_strength().reason
    with pytest.raises(sb.SaeBiasError, match="has no split"):
        sb.run_sweep(gemma3.model, pairs, sb.Sweep(edits[:1]), probe=probe).best_strength()


def test_a_split_without_templates_is_refused(gemma3, pairs, probe, edits):
    with pytest.raises(sb.SaeBiasError, match="split 'report' holds none"):
        sb.run_sweep(gemma3.model, pairs, sb.Sweep(edits[:1], splits={"report": ["nowhere"]}), probe=probe)


def test_values_outside_the_observed_range_are_flagged(gemma3, pairs, probe):
    feature = gemma3.feature(F)
    cells = [
        sb.Clamp(feature, 0.0),
        sb.Clamp(feature, -1.0),
        sb.Clamp(feature, 1e4),
        sb.Ablate(feature),
        sb.Scale(feature, 9.0),
    ]
    frame = sb.run_sweep(gemma3.model, pairs, sb.Sweep(cells), probe=probe).to_frame()
    assert list(frame["outside_observed"]) == [False, False, True, True, False, False]


def test_wrong_way_share_counts_pairs_made_worse():
    base = _cell_frame([1.0, 1.0, 1.0, 1.0], {})
    after = _cell_frame([0.5, 1.5, 0.5, 2.5], {})
    listed = [_facts("base"), _facts("edit")]
    row = cell_rows(listed, {"base": base, "edit": after}, {"all": ["t0", "t1"]}, costs=False).iloc[1]
    assert (row["wrong_way_share"], row["mean_abs_change"], row["change"]) == (0.5, 0.75, 0.25)


def test_specific_reduction_of_each_split_from_the_stored_scores():
    """A cell that halves every score, the banks' too, reduces by half and specifically by nothing."""
    bank = list(np.random.default_rng(0).normal(0, 2, len(bank_items()[0])))
    base = _cell_frame([1.0, 1.1, 0.9, 1.05], {"bank": bank})
    flat = _cell_frame([0.5, 0.55, 0.45, 0.525], {"bank": [s / 2 for s in bank]})
    kept = _cell_frame([0.5, 0.55, 0.45, 0.525], {"bank": bank})
    cells = {"base": base, "flat": flat, "kept": kept}
    rows = cell_rows([_facts(n) for n in cells], cells, {"all": ["t0", "t1"]}, costs=True).set_index("cell")
    assert rows.loc["flat", "specific_reduction"] == pytest.approx(0.0, abs=1e-9)
    assert rows.loc["kept", "specific_reduction"] == pytest.approx(0.5)
    assert rows.loc["flat", "reduction"] == rows.loc["kept", "reduction"] == pytest.approx(0.5)
    assert rows.loc["kept", "bank_changed_ai"] == 0.0
    assert rows.loc["kept", "spec_low"] <= 0.5 <= rows.loc["kept", "spec_high"]
    assert rows["did_specific_reduction"].isna().all()
    for frame, left in (
        (base, 0.0),
        (flat, 0.0),
        (kept, 0.3),
    ):  # 0.5 of 1.0 are left, 0.2 of them beyond the twins
        frame.attrs["twins"] = [b * left / 0.5 for b in frame["bias"]]
    rows = cell_rows([_facts(n) for n in cells], cells, {"all": ["t0", "t1"]}, costs=True).set_index("cell")
    assert rows.loc["kept", ["specific_reduction", "did_specific_reduction"]].tolist() == pytest.approx(
        [0.5, 0.8]
    )
    assert rows.loc["kept", "did_spec_low"] <= 0.8 <= rows.loc["kept", "did_spec_high"]


def _cell_frame(bias: list[float], facts: dict) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "template": ["t0", "t0", "t1", "t1"],
            "entity": ["e0", "e1"] * 2,
            "score_human": bias,
            "score_ai": 0.0,
            "bias": bias,
        }
    )
    frame.attrs = facts
    return frame


def _facts(name: str) -> dict:
    kind = "base" if name == "base" else "candidate"
    return {
        "cell": name,
        "intervention": "ablate",
        "rule": "",
        "feature": "f",
        "strength": None,
        "positions": "all",
        "kind": kind,
        "label": "",
    }


# --- what a cell is ---


def test_a_cells_name_covers_what_determines_its_numbers(gemma3, gemma2, pairs, probe, tmp_path):
    """Another model, pairs, word list, score, strength or positions: another cell. The same request: the same."""

    def name(model=gemma3.model, pairs=pairs, probe=probe, edit=None, costs=False):
        edit = edit or sb.Clamp(gemma3.feature(F), -1.0)
        return sb.run_sweep(model, pairs, sb.Sweep([edit], costs=costs), probe=probe).frame["cell"][1]

    base = name()
    assert name() == base
    f = gemma3.feature(F)
    others = [
        name(pairs=pairs.select(templates=["survive", "deleted"])),
        name(probe=sb.Probe(["natural"], ["wrong"])),
        name(probe=sb.Probe(probe.positive, probe.negative, "logodds")),
        name(edit=sb.Clamp(f, -1.5)),
        name(edit=sb.Clamp(f, -1.0, positions="last")),
        name(edit=sb.Clamp(f, -1.0, when="always")),
        name(edit=sb.Clamp(gemma3.feature(G), -1.0)),
        name(model=gemma2.model, edit=sb.Clamp(gemma2.feature(F), -1.0)),
    ]
    assert len({base, *others}) == len(others) + 1


def test_a_changed_weight_makes_another_cell(gemma3):
    from dataclasses import replace

    feature = gemma3.feature(F)
    other = replace(feature, w_dec=feature.w_dec * 1.0001)
    assert sb.Ablate(feature).key() == sb.Ablate(str(feature.ref)).key()
    assert sb.Ablate(feature).key() != sb.Ablate(other).key()


def test_the_grid_is_the_product_and_has_units(gemma3):
    f = gemma3.feature(F)
    sweep = sb.Sweep.grid(["clamp", "scale", "ablate"], [f], [0.5, -1.0], ["all", "last"], unit=4.0)
    kinds = [(e.kind, e.strength, e.positions) for e in sweep.interventions]
    assert ("clamp", 2.0, "all") in kinds
    assert ("clamp", -4.0, "last") in kinds
    assert ("scale", 0.5, "all") in kinds
    assert len(kinds) == 2 * (2 + 2 + 1)
    with pytest.raises(sb.SaeBiasError, match="needs strengths"):
        sb.Sweep.grid(["clamp"], [f])


def test_several_edits_are_one_cell(gemma3, pairs, probe):
    two = (sb.Ablate(gemma3.feature(F)), sb.Ablate(gemma3.feature(G)))
    frame = sb.run_sweep(
        gemma3.model, pairs, sb.Sweep([two, Cell(two[:1], "direction", "one")]), probe=probe
    ).frame
    assert list(frame["intervention"]) == ["none", "ablate + ablate", "ablate"]
    assert list(frame["kind"]) == ["base", "candidate", "direction"]


# --- resuming ---


def test_a_resumed_sweep_recomputes_nothing_and_has_the_same_bits(
    gemma3, pairs, probe, tmp_path, monkeypatch
):
    feature = gemma3.feature(F)
    sweep = sb.Sweep([sb.Clamp(feature, -0.1 * k) for k in range(12)])
    whole = sb.run_sweep(gemma3.model, pairs, sweep, probe=probe, out=tmp_path / "whole").frame
    parts = tmp_path / "parts"
    first = sb.run_sweep(gemma3.model, pairs, sweep, probe=probe, out=parts).frame
    for k, cell in enumerate((parts / "cells").glob("*.parquet")):
        if k % 3 == 0:
            cell.unlink()
    again = sb.run_sweep(gemma3.model, pairs, sweep, probe=probe, out=parts).frame
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    pd.testing.assert_frame_equal(whole, again, check_exact=True)
    pd.testing.assert_frame_equal(collect(parts).frame, again, check_exact=True)

    def never(*args, **kwargs):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr("sae_bias.workflows.sweep_work.ProbeEngine", never)
    pd.testing.assert_frame_equal(
        sb.run_sweep(gemma3.model, pairs, sweep, probe=probe, out=parts).frame, again
    )


def test_a_changed_input_is_never_mixed_with_old_results(gemma3, pairs, probe, tmp_path):
    edits = [sb.Clamp(gemma3.feature(F), -1.0)]
    fewer = pairs.select(templates=["survive", "deleted"])
    sb.run_sweep(gemma3.model, pairs, sb.Sweep(edits), probe=probe, out=tmp_path)
    sb.run_sweep(gemma3.model, fewer, sb.Sweep(edits), probe=probe, out=tmp_path)
    alone = sb.run_sweep(gemma3.model, fewer, sb.Sweep(edits), probe=probe).frame
    pd.testing.assert_frame_equal(collect(tmp_path).frame, alone, check_exact=True)
    folder = RunFolder(tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 4
    manifest = folder.read_json("manifest")
    assert manifest["prompts"]["pairs"]["digest"] == fewer.digest
    assert [e["prompts"]["pairs"]["digest"] for e in manifest["earlier"]] == [pairs.digest]


def test_shards_join_to_the_unsharded_sweep(gemma3, pairs, probe, tmp_path):
    """Each shard its own folder; merged, the table has the bits of a run that was never cut."""
    sweep = sb.Sweep(
        [sb.Clamp(gemma3.feature(F), -0.1 * k) for k in range(20)],
        splits={"a": ["survive"], "b": ["deleted", "hello"]},
    )
    whole = sb.run_sweep(gemma3.model, pairs, sweep, probe=probe).frame
    moved = []
    for i in (1, 2):
        sb.run_sweep(gemma3.model, pairs, sweep, probe=probe, out=tmp_path, shard=(i, 2))
        n, result = merge_run(tmp_path)
        moved.append(n)
        assert (result is None) == (i == 1)
    assert moved == [11, 10]
    assert result is not None
    pd.testing.assert_frame_equal(result.frame, whole, check_exact=True)
    pd.testing.assert_frame_equal(RunFolder(tmp_path).read_table("sweep"), whole, check_exact=True)
    assert merge_run(tmp_path)[0] == 0


def _twenty(gemma3):
    return sb.Sweep([sb.Clamp(gemma3.feature(F), -0.1 * k) for k in range(20)], costs=True)


@pytest.mark.parametrize("n", [1, 8, 9, 40, 99])
def test_groups_are_of_about_one_size_and_an_even_number(gemma3, pairs, n):
    """Two processes share 40 cells 20 to 20; five groups of eight would leave one of them 24."""
    sweep = sb.Sweep([sb.Clamp(gemma3.feature(F), -0.1 * (k + 1)) for k in range(n)])
    base, *groups = Plan(sweep, gemma3.model, pairs, ()).groups()
    assert base == [0]
    assert [i for group in groups for i in group] == list(range(1, n + 1))
    sizes = [len(group) for group in groups]
    assert max(sizes) <= min(8, min(sizes) + 1)
    assert len(groups) == 1 or abs(sum(sizes[::2]) - sum(sizes[1::2])) <= 1


def test_local_workers_give_the_same_bits_and_run_no_prompt_of_the_base_again(gemma3, pairs, probe, tmp_path):
    with layer_tokens(gemma3.model) as alone:
        whole = sb.run_sweep(gemma3.model, pairs, _twenty(gemma3), probe=probe).frame
    with layer_tokens(gemma3.model) as here:
        shared = sb.run_sweep(
            gemma3.model, pairs, _twenty(gemma3), probe=probe, out=tmp_path, executor=LocalWorkers(2).run
        )
    pd.testing.assert_frame_equal(shared.frame, whole, check_exact=True)
    assert here.tokens <= alone.tokens
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_lost_worker_leaves_what_is_finished(gemma3, pairs, probe, tmp_path, monkeypatch):
    own, whole = os.getpid(), sb.run_sweep(gemma3.model, pairs, _twenty(gemma3), probe=probe).frame
    run = Work.run

    def lost(self, group):
        if 9 in group and os.getpid() != own:
            os._exit(9)
        return run(self, group)

    with monkeypatch.context() as patch, pytest.raises(sb.MissingError, match="run the same command again"):
        patch.setattr(Work, "run", lost)
        sb.run_sweep(
            gemma3.model, pairs, _twenty(gemma3), probe=probe, out=tmp_path, executor=LocalWorkers(2).run
        )
    again = sb.run_sweep(gemma3.model, pairs, _twenty(gemma3), probe=probe, out=tmp_path)
    pd.testing.assert_frame_equal(again.frame, whole, check_exact=True)


def test_shards_of_different_sweeps_are_not_merged(gemma3, pairs, probe, tmp_path):
    f = gemma3.feature(F)
    sb.run_sweep(gemma3.model, pairs, sb.Sweep([sb.Clamp(f, -1.0)]), probe=probe, out=tmp_path, shard=(1, 2))
    sb.run_sweep(gemma3.model, pairs, sb.Sweep([sb.Clamp(f, -2.0)]), probe=probe, out=tmp_path, shard=(2, 2))
    with pytest.raises(sb.SaeBiasError, match="different sweeps"):
        merge_run(tmp_path)
    assert not (tmp_path / "cells").exists()


def test_the_run_folder_is_readable_with_pandas_alone(gemma3, pairs, probe, edits, tmp_path):
    sb.run_sweep(gemma3.model, pairs, sb.Sweep(edits), probe=probe, out=tmp_path)
    table = pd.read_parquet(tmp_path / "tables" / "sweep.parquet")
    for row in table.itertuples():
        cell = pd.read_parquet(tmp_path / "cells" / f"{row.cell}.parquet")
        assert row.bias == pytest.approx(cell["bias"].mean(), abs=1e-12)
        assert cell.attrs["rule"] == row.rule


# --- what is measured beside the bias ---


def test_costs_and_collapse_of_a_tiny_model(gemma3, pairs):
    """Every cost column of a candidate is a number, a control's is not measured."""
    pytest.importorskip("sae_bias.measures.costs")
    probe = sb.Probe(["natural"], ["wrong"])
    try:
        probe.vocabulary(gemma3.model, ["a human says hello. This is"])
        cells = [Cell((sb.Ablate(gemma3.feature(F)),)), Cell((sb.Ablate(gemma3.feature(G)),), "control", "c")]
        frame = sb.run_sweep(gemma3.model, pairs, sb.Sweep(cells, costs=True), probe=probe).frame
    except sb.RequestError as error:
        pytest.skip(f"the tiny tokenizer cannot read the bundled texts: {error}")
    candidate, control = frame.iloc[1], frame.iloc[2]
    known = ("kl_neutral", "kl_ai_speech", "kl_valence", "kl_off", "kl_worst", "cost", "nll_neutral", "beta")
    assert np.isfinite([candidate[c] for c in known]).all()
    assert candidate["cost"] == max(candidate["kl_worst"], 1 - candidate["beta"])
    assert np.isnan(control["kl_neutral"])
    assert np.isfinite(control["beta"])
    assert candidate["fired_neutral"] >= 0


@torch.no_grad()
def test_the_base_run_keeps_the_site(gemma3, pairs, probe):
    """With the sites known, no layer runs twice for the base."""
    runner = ProbeEngine(gemma3.model, pairs, probe, sites=[gemma3.feature(F).site])
    with layer_tokens(gemma3.model, (0, 1)) as count:
        runner.run([sb.Ablate(gemma3.feature(F))])
    assert not count.by_layer, "the upstream layers ran again"
