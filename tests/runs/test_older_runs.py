"""Run folders that version 0.1 wrote open, report, resume and verify."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

import sae_bias as sb
from sae_bias.models.fingerprint import model_digest
from sae_bias.runs.folder import RunFolder

RUNS = Path(__file__).resolve().parents[1] / "fixtures" / "runs_0_1"


@pytest.fixture(params=["small", "tour"])
def older(request, tmp_path) -> Path:
    return Path(shutil.copytree(RUNS / request.param, tmp_path / request.param))


def test_it_opens_and_reports(older):
    run = RunFolder(older)
    assert run.tables()
    assert all(len(run.read_table(name)) for name in run.tables())
    assert sb.write_report(older).stat().st_size > 10_000


def test_its_cells_are_read_again(older):
    run = RunFolder(older)
    for name in (p.stem for p in (older / "cells").glob("*.parquet")):
        assert isinstance(run.read_cell(name), pd.DataFrame)


def test_the_report_says_which_figures_have_changed_their_meaning(older):
    """A run that names no version of the definitions was made with the first."""
    page = sb.write_report(older).read_text()
    assert "version 1 of the definitions" in page
    assert "credited a bias turned round" in page


def _of_table(checks):
    return next(c for c in checks if "table made again" in c.what)


def test_verify_tells_changed_columns_from_wrong_ones(older):
    """The table made again has other figures in those columns alone, and that is no difference; a number made up still is."""
    checks = sb.verify_run(older, cells=0).checks
    assert _of_table(checks).status == "agrees"
    notes = [c for c in checks if c.what.startswith("definitions 1")]
    assert "specific_reduction" in notes[0].detail
    table = RunFolder(older).read_table("sweep")
    table.loc[0, "bias"] += 0.5
    table.to_parquet(older / "tables" / "sweep.parquet")
    assert _of_table(sb.verify_run(older, cells=0).checks).status == "differs"


def test_a_cell_of_an_older_format_is_measured_again(older):
    """Its name is a hash of inputs listed in another way, so its scores alone are compared."""
    if (
        model_digest(sb.load_model("organism:planted"))
        != RunFolder(older).read_json("manifest")["model"]["digest"]
    ):
        pytest.skip("the organism was trained anew since")
    again = sb.verify_run(older, cells=2)
    assert again.agrees, [c.row() for c in again.differing]
    assert again.n_cells == 2
