"""The pages a user copies from: every block parses, and every offline block of README and docs runs as written.

A block under `<!-- needs: … -->` wants weights, keys, a network or a cluster; it is parsed only. The two `make` commands are run by
hand in a fresh clone.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")])
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[^>]*?) -->\s*)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    page: str
    number: int
    language: str
    text: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.number}:{self.language or 'text'}"


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    name = str(page.relative_to(ROOT))
    return [Block(name, i, m["language"], m["text"], m["needs"]) for i, m in enumerate(found)]


ALL = [block for page in PAGES for block in blocks(page)]
OFFLINE = [b for b in ALL if b.page.startswith(("README.md", "docs/")) and b.needs is None]


def commands(text: str) -> list[list[str]]:
    """The sae-bias commands of a shell block, as argument lists."""
    lines = text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for part in re.findall(r"(?:^|\$\()\s*(sae-bias [^|)#]*(?:#\d[^|)#]*)*)", line):
            found.append(shlex.split(part.split(" #")[0].strip())[1:])
    return found


def test_the_pages_hold_blocks():
    assert len(OFFLINE) >= 5
    assert any(b.needs for b in ALL)
    assert {"python", "bash", "yaml"} <= {b.language for b in OFFLINE}


@pytest.mark.parametrize("block", ALL, ids=str)
def test_every_block_parses(block):
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text)
    elif block.language in ("bash", ""):
        done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    else:
        pytest.fail(f"a block in {block.language!r}: say how it is checked")


@pytest.mark.parametrize(
    "block", [b for b in ALL if "sae-bias " in b.text and b.language in ("bash", "")], ids=str
)
def test_every_command_line_is_one_that_sae_bias_takes(block):
    """Each command exists and takes the options written there; nothing is run."""
    import typer

    from sae_bias.cli.main import build_app

    app = typer.main.get_command(build_app())
    for args in commands(block.text):
        if args == ["--help"]:
            continue
        context = app.make_context("sae-bias", [args[0], "--help-is-not-asked"], resilient_parsing=True)
        command = app.get_command(context, args[0])
        assert command is not None, f"no command {args[0]}"
        command.make_context(args[0], list(args[1:]), parent=context)


def test_yaml_of_one_s_own_question_loads(tmp_path):
    import sae_bias as sb

    for block in OFFLINE:
        if block.language == "yaml" and "templates" in block.text:
            (tmp_path / "mine.yaml").write_text(block.text, encoding="utf-8")
            assert len(sb.load_pairs(tmp_path / "mine.yaml")) >= 4


def _environment() -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def scripts(page: str) -> list[list[str]]:
    """What a reader of `page` types: its Python blocks as one session, then each shell block."""
    mine = [b for b in OFFLINE if b.page == page]
    python = "\n".join(b.text for b in mine if b.language == "python")
    shell = [b.text for b in mine if b.language == "bash" and "make " not in b.text]
    return [
        *([[sys.executable, "-c", python]] if python else []),
        *(["bash", "-euo", "pipefail", "-c", s] for s in shell),
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", sorted({b.page for b in OFFLINE if b.language in ("python", "bash")}))
def test_the_offline_blocks_run_as_written(page, tmp_path):
    """In one empty folder, as a reader would."""
    for command in scripts(page):
        done = subprocess.run(
            command, cwd=tmp_path, env=_environment(), text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert done.stdout


def test_the_grid_of_the_guide_loads(tmp_path):
    import sae_bias as sb

    (text,) = [b.text for b in OFFLINE if b.language == "yaml" and "statements" in b.text]
    (tmp_path / "grid.yaml").write_text(text, encoding="utf-8")
    assert len(sb.load_grid(tmp_path / "grid.yaml")) == 6
