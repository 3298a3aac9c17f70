"""The pages under docs/ are what code and notebooks cite: every citation resolves to a heading."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CITATION = re.compile(r"docs/[\w/-]+\.md(?:#[\w-]+)?")
LINK = re.compile(r"\]\(([^()\s]+)\)")
SPECIFICATION = re.compile(r"METHOD §|PUBLISHED [A-C]\d?\b|\([AB]\d{1,2}\)|\bas METHOD|shared/[A-Z]+\.md")
"""Names of documents that a reader of the repository does not have."""


def _reference():
    """The module that generates the reference pages."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = _reference()


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs both make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+?)\s*$", text, re.M)
    found = [re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles]
    assert len(found) == len(set(found)), f"{page}: two headings with one anchor"
    return set(found)


def tracked() -> list[Path]:
    """Text files of the repository in which somebody may cite a page."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kinds = {".py", ".pyi", ".md", ".yaml", ".ipynb", ".toml", ".sbatch", ".j2"}
    return [ROOT / line for line in listed.splitlines() if Path(line).suffix in kinds]


def test_every_citation_of_a_page_resolves():
    seen = set()
    for path in tracked():
        if path == Path(__file__).resolve() or not path.exists():
            continue
        for citation in CITATION.findall(path.read_text(encoding="utf-8")):
            page, _, anchor = citation.partition("#")
            where = f"{path.relative_to(ROOT)} cites {citation}"
            assert (ROOT / page).is_file(), where
            assert not anchor or anchor in slugs(ROOT / page), where
            seen.add(citation)
    assert len(seen) > 30


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: str(p.relative_to(DOCS)))
def test_every_link_between_pages_resolves(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if other.parent == DOCS / "reference":
            assert f"reference/{other.name}" in REFERENCE.PAGES, f"{page.name}: {target}"
            continue
        assert other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in slugs(other), f"{page.name}: {target}"


def test_nothing_cites_a_document_the_repository_does_not_have():
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked()
        if path != Path(__file__).resolve() and path.exists()
        for match in SPECIFICATION.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


# ── reference


def test_every_public_name_has_a_docstring_and_a_group():
    import sae_bias as sb

    home = REFERENCE.homes()
    assert set(home) == set(sb.__all__) - {"__version__"}
    assert [name for name, module in home.items() if not REFERENCE.docstring(name, module)] == []


def test_every_command_option_study_field_and_figure_is_described():
    page = REFERENCE.commands_page()
    for name, command in REFERENCE.commands().items():
        assert f"## sae-bias {name}\n" in page
        assert REFERENCE.examples(command.epilog or ""), f"{name} has no example"
        assert [p.name for p in command.params if not p.hidden and not p.help and p.name != "help"] == []
    study = REFERENCE.nodes(ROOT / "sae_bias" / "workflows" / "study_file.py")["Study"]
    assert len(REFERENCE.fields(study)) > 20
    assert "| |" not in REFERENCE.figures_page()


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_no_other_host(tmp_path):
    pytest.importorskip("mkdocs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"""(?:src|<link[^>]*href)=["']https?://(?!squidfunk)""", text), page
