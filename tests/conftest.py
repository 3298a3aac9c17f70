"""Fixtures shared by the tests: tiny models of every architecture, SAEs for them, and the real data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

HELPERS = Path(__file__).parent / "helpers"
# Scripts that tests start as processes of their own import the helpers too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models: a second thread only waits, here and in subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REAL_DATA = "SAE_BIAS_REAL_DATA"


def pytest_terminal_summary(terminalreporter):
    """Faults injected, inputs fuzzed, mutants killed: how much the trust tests of this run covered."""
    import tallies

    if tallies.lines():
        terminalreporter.section("counted")
        for line in tallies.lines():
            terminalreporter.line(line)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What the toolkit remembers between commands (passed gates, fetched columns) stays out of the user's cache."""
    home = os.environ.setdefault("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield home
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@dataclass(frozen=True, eq=False)
class Tiny:
    """One tiny random checkpoint on disk, an SAE for it, and both loaded."""

    name: str
    folder: Path
    sae_folder: Path

    @cached_property
    def model(self):
        """Loaded once and shared: a test leaves it as it found it."""
        import sae_bias as sb

        return sb.load_model(self.folder)

    def fresh(self):
        """A model of the test's own, to wrap or to damage."""
        import sae_bias as sb

        return sb.load_model(self.folder)

    def feature(self, index: int):
        import sae_bias as sb

        return sb.load_feature(f"{self.sae_folder}#{index}")

    @cached_property
    def sae(self):
        import sae_bias as sb

        return sb.load_sae(self.sae_folder)


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory):
    """Checkpoint and SAE of an architecture by name, made once a session."""
    import torch
    from architectures import ARCHITECTURES, PAIRS, SITE_LAYER, save_checkpoint, save_sae

    made: dict[str, Tiny] = {}

    def make(name: str) -> Tiny:
        if name not in made:
            import sae_bias as sb

            root = tmp_path_factory.mktemp(name)
            tiny = Tiny(name, save_checkpoint(root / "model", ARCHITECTURES[name]), root / "sae" / "layer_1")
            texts = [text for _, _, human, ai in PAIRS for text in (human, ai)]
            rows = sb.residuals(tiny.model, texts, SITE_LAYER, positions="all")
            save_sae(tiny.sae_folder, torch.cat([r[1:] for r in rows]))
            made[name] = tiny
        return made[name]

    return make


@pytest.fixture(
    params=[
        "gemma2", "gemma3", "gemma3_multimodal", "mistral", "qwen2", "gpt_neox", "llama", "gpt2", "gptj", "opt", "falcon", "phi3",
        "qwen3", "qwen3_5", "gemma4",
    ]
)  # fmt: skip
def tiny(request, make_tiny):
    """Each architecture."""
    return make_tiny(request.param)


@pytest.fixture
def gemma3(make_tiny):
    return make_tiny("gemma3")


@pytest.fixture
def gemma2(make_tiny):
    return make_tiny("gemma2")


@pytest.fixture(scope="session")
def pairs():
    """Six pairs, three templates × two entities, in words every tiny tokenizer knows."""
    from architectures import PAIRS

    import sae_bias as sb

    return sb.PromptPairs(tuple(sb.PromptPair(human, ai, t, e) for t, e, human, ai in PAIRS), name="tiny")


@pytest.fixture(scope="session")
def probe():
    from architectures import NEGATIVE, POSITIVE

    import sae_bias as sb

    return sb.Probe(POSITIVE, NEGATIVE)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real pretrained weights and texts; a test that needs it is skipped where it is absent."""
    named = os.environ.get(REAL_DATA)
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "SOURCE.md").is_file():
        pytest.skip(f"no real data at {folder}; set {REAL_DATA} to the folder that holds SOURCE.md")
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """`sae-bias demo` in an empty folder, as a user runs it, once a session: its run folder (not to be written in), what it printed,
    how often each text was tokenized and each SAE opened."""
    import contextlib
    import io
    import json
    from collections import Counter
    from types import SimpleNamespace

    from transformers import PreTrainedTokenizerBase

    from sae_bias.cli.main import main
    from sae_bias.saes import load
    from sae_bias.saes.formats import gemma_scope

    folder, printed, texts, opened = tmp_path_factory.mktemp("demo"), io.StringIO(), Counter(), Counter()
    call, read = PreTrainedTokenizerBase.__call__, gemma_scope.read_encoder_file
    load._OPEN.clear()  # what other tests opened

    def tokenizer(self, text=None, *args, **kwargs):
        texts[text] += 1
        return call(self, text, *args, **kwargs)

    def read_encoder_file(path, **kwargs):
        opened[path] += 1
        return read(path, **kwargs)

    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        patch.setattr(PreTrainedTokenizerBase, "__call__", tokenizer)
        patch.setattr(gemma_scope, "read_encoder_file", read_encoder_file)
        assert main(["demo", "--json"]) == 0
    path = folder / "runs" / "demo"
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return SimpleNamespace(
        path=path,
        summary=summary,
        report=path / "report.html",
        printed=printed.getvalue(),
        texts=texts,
        opened=opened,
    )
