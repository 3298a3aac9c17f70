"""A report section from another distribution: registered by its entry point, drawn by `sae-bias report`."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
from run_fixture import build_run

from sae_bias.report.page import write_report

HELPERS = Path(__file__).resolve().parents[1] / "helpers"


def install(folder: Path) -> None:
    """What pip leaves of a distribution with one entry point."""
    info = folder / "rivers-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rivers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sae_bias.plugins]\nrivers = section_plugin\n")


def report(run: Path, *paths: Path) -> str:
    known = [*map(str, paths), str(HELPERS.parents[1])]
    subprocess.run(
        [sys.executable, "-m", "sae_bias.cli", "report", str(run), "--format", "md"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(known)},
        check=True,
        capture_output=True,
    )
    return (run / "report.md").read_text(encoding="utf-8")


def test_a_plugins_section_stands_in_the_report(tmp_path):
    """After the built-in groups, made of the plugin's own table; without the plugin the table is left alone."""
    run = build_run(tmp_path / "run")
    rivers = pd.DataFrame({"river": ["Elbe", "Danube"], "km": [1094.0, 2850.0]})
    rivers.to_parquet(run / "tables" / "rivers.parquet")
    assert "Rivers" not in write_report(run, format="md").read_text(encoding="utf-8")
    install(tmp_path / "site")
    text = report(run, tmp_path / "site", HELPERS)
    assert "The longest is the Danube, 2,850 km." in text
    assert text.index("## Every candidate feature") < text.index("## Rivers")
