"""Run folders that version 0.1 wrote open, report, resume and verify."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

import sae_bias as sb
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
