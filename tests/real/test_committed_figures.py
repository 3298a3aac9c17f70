"""The committed figures of the real models are what the toolkit measures today (`make slow PART=real`).

`bias.csv` needs the packaged model alone. What needs a trained SAE is measured again where the run folder is on this machine.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import sae_bias as sb
from sae_bias.models.gguf.packaged import PACKAGED

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
MODELS = {"gemma_3_270m": "gemma-3-270m-q4", "smollm2_135m": "smollm2-135m-instruct-q4"}
QUESTIONS = {"survival": None, "treatment": "treatment"}
RUNS = [f"{name}{question}" for name in MODELS for question in ("", "_treatment")]
CLOSE = 5e-4  # nats; float32 sums in another order


def committed(name):
    path = ROOT / "experiments" / name / "results" / "bias.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["question"])


CASES = [(name, question) for name in MODELS for question in committed(name)["question"].unique()]


@pytest.mark.parametrize(("name", "question"), CASES)
def test_bias_and_its_interval(name, question):
    if not PACKAGED[MODELS[name]].is_installed:
        pytest.skip(PACKAGED[MODELS[name]].pip)
    found = sb.run_probe(sb.load_model(MODELS[name]), sb.load_pairs(QUESTIONS[question]), controls=True)
    stats = {
        "bias": found.stat,
        "mundane twins": found.control.stat,
        "difference in differences": found.did.stat,
    }
    rows = committed(name).query("question == @question").set_index("quantity")
    assert set(rows.index) == set(stats)
    for quantity, row in rows.iterrows():
        stat = stats[quantity]
        assert (row["mean"], row["low"], row["high"]) == pytest.approx(
            (stat.mean, stat.ci_low, stat.ci_high), abs=CLOSE
        )
        assert (row["n_pairs"], row["n_templates"], row["n_entities"]) == (
            stat.n,
            stat.n_templates,
            stat.n_entities,
        )


@pytest.mark.parametrize("run", RUNS)
def test_a_run_folder_measures_again(run):
    folder = ROOT / "runs" / run
    if not (folder / "manifest.json").is_file():
        pytest.skip(f"no {folder.name}: sae-bias run makes it")
    found = sb.verify_run(folder)
    assert found.agrees, str(found)
