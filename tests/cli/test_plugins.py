"""An SAE format, an intervention and a behavior from a module outside the package, found by entry point, run through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = '''
from dataclasses import dataclass

from sae_bias.saes.formats import register_format
from sae_bias.saes.formats.gemma_scope import read_encoder_file
from sae_bias.saes.sae import Sae, SaeInfo
from sae_bias.core.site import Site
from sae_bias.measures.behavior import register_behavior
from sae_bias.steering.intervention import FeatureEdit, register_edit


@register_format("mine")
class Mine:
    weights = ("mine.safetensors",)

    @staticmethod
    def matches(folder):
        return (folder / "mine.safetensors").is_file()

    @staticmethod
    def open(folder, sae_id):
        layer = int((folder / "layer.txt").read_text())
        return Sae(sae_id, read_encoder_file(folder / "mine.safetensors"), SaeInfo(Site(layer)), folder / "mine.safetensors")


@register_edit("halve")
@dataclass(frozen=True)
class Halve(FeatureEdit):
    """a' = a / 2."""

    def new_acts(self, acts, context):
        return acts / 2

    def describe(self):
        return "halve (a' = a / 2)"


@register_behavior("asked_of_ai")
def asked_of_ai(prompt, text):
    return None if "tea" in prompt else "AI" in prompt
'''


@pytest.fixture
def plugin(tmp_path):
    """The environment of a process in which a distribution with this plugin is installed."""
    folder = tmp_path / "site"
    info = folder / "somebody-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "somebody.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sae_bias.plugins]\nsomebody = somebody\n")
    here = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), here])}


COMMANDS = """
import json, sys
from sae_bias.cli.main import main
sys.exit(max(map(main, json.loads(sys.argv[1]))))
"""


def run_commands(env, *commands: tuple[object, ...]) -> str:
    """What commands print that run in one process, one after another."""
    given = json.dumps([[str(a) for a in argv] for argv in commands])
    done = subprocess.run([sys.executable, "-c", COMMANDS, given], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_format_and_an_edit_of_somebody_elses_are_swept_and_verified(plugin, gemma3, pairs, tmp_path):
    from architectures import NEGATIVE, POSITIVE, SITE_LAYER
    from safetensors.torch import load_file, save_file

    sae = tmp_path / "sae"
    sae.mkdir()
    save_file(load_file(gemma3.sae_folder / "params.safetensors"), sae / "mine.safetensors")
    (sae / "layer.txt").write_text(str(SITE_LAYER))
    rows = "".join(f"{p.human},{p.ai},{p.template},{p.entity}\n" for p in pairs)
    (tmp_path / "pairs.csv").write_text("human,ai,template,entity\n" + rows)
    (tmp_path / "words.yaml").write_text(
        f"positive: {json.dumps(list(POSITIVE))}\nnegative: {json.dumps(list(NEGATIVE))}\n"
    )

    out = tmp_path / "run"
    swept = (
        "sweep", gemma3.folder, f"{sae}#3", "--edit", "halve,scale", "--strengths", "0.5", "--pairs", tmp_path / "pairs.csv",
        "--words", tmp_path / "words.yaml", "--controls", 0, "--no-costs", "--out", out, "--json",
    )  # fmt: skip
    found, verified = run_commands(plugin, swept, ("verify", out)).split("\n", 1)
    found = json.loads(found)
    bias = {cell["intervention"]: cell["bias"] for cell in found["cells"]}
    assert bias["halve"] == pytest.approx(bias["scale"], abs=1e-9)
    assert bias["halve"] != bias["none"]
    rules = [cell["rule"] for cell in found["cells"]]
    assert "halve (a' = a / 2)" in rules
    assert "agree" in verified


def test_a_behavior_of_somebody_elses_is_named_by_a_command_and_by_a_study(plugin, gemma3, tmp_path):
    texts = {
        "positive": ["An AI says yes.", "The AI says hello."],
        "negative": ["A dog says yes.", "A human wants tea."],
    }
    rows = [{"text": t, "label": side} for side, some in texts.items() for t in some]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    small = {"behavior": "asked_of_ai", "max_new_tokens": 1, "controls": 0, "capability": False}
    feature = f"{gemma3.sae_folder}#3"
    study = {
        "name": "tea",
        "model": str(gemma3.folder),
        "contrast": "texts.jsonl",
        "features": [feature],
        **small,
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    dose = (
        "dose", gemma3.folder, "--contrast", tmp_path / "texts.jsonl", "--feature", feature, "--edit", "ablate",
        "--behavior", small["behavior"], "--max-new-tokens", 1, "--controls", 0, "--no-capability", "--json",
    )  # fmt: skip
    run = ("run", tmp_path / "study.yaml", "--out", tmp_path / "run")
    found = json.loads(run_commands(plugin, dose, run).split("\n", 1)[0])
    rates = {
        row["side"]: (row["rate"], row["n"], row["unscored"])
        for row in found["strengths"]
        if row["kind"] == "base"
    }
    assert rates["positive"] == (1.0, 2, 0) and rates["negative"] == (0.0, 1, 1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["behavior"]["behavior"] == "asked_of_ai"


def test_without_the_plugin_the_edit_is_refused_with_the_names_there_are(gemma3):
    line = [
        sys.executable,
        "-m",
        "sae_bias.cli",
        "sweep",
        str(gemma3.folder),
        f"{gemma3.sae_folder}#3",
        "--edit",
        "halve",
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected one of ablate, scale, clamp" in done.stderr
