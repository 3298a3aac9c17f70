"""The house: one-way imports, no torch before it is asked for, nothing of a machine's in tracked files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sae_bias"
PACKAGES = [
    "core",
    "stats",
    "figures",
    "prompts",
    "models",
    "probe",
    "saes",
    "steering",
    "discovery",
    "measures",
    "runs",
    "report",
    "workflows",
    "integrations",
    "validation",
    "cli",
]
"""In the order the data flows."""
ONLY_IMPORTER = {"transformer_lens": "models", "sae_lens": "saes"}
FORBIDDEN_CALLS = re.compile(
    r"torch\.load\(|trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True|^\s*import pickle|from pickle"
)
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:home|Users|root|work|opt|mnt|media|srv)/[\w.-]+")
PIP_LINE = re.compile(
    r"^\s*(?:-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)\b|file:/|\s@\s|^-e ", re.M
)


def modules() -> dict[str, Path]:
    """Dotted name under sae_bias -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found.pop("")
    return found


MODULES = modules()


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(module, line) of every import that runs, those inside functions too; TYPE_CHECKING blocks left out."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        stack += ast.iter_child_nodes(node)


def own_imports(path: Path) -> set[tuple[str, int]]:
    """Modules of sae_bias that a file imports, without the package's name."""
    found = set()
    for name, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
        short = name.removeprefix("sae_bias.")
        if name.startswith("sae_bias.") and short in MODULES:
            found.add((short, line))
    return found


def wrong_way(module: str, path: Path) -> list[str]:
    """Imports of packages that stand to the right of the module's own."""
    here = PACKAGES.index(module.split(".")[0])
    return [
        f"line {line}: {name}"
        for name, line in own_imports(path)
        if PACKAGES.index(name.split(".")[0]) > here
    ]


def test_sixteen_packages_and_nothing_loose():
    assert {name.split(".")[0] for name in MODULES} == set(PACKAGES)
    assert [p.name for p in PACKAGE.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("module", MODULES)
def test_a_package_imports_itself_and_packages_to_its_left(module):
    assert wrong_way(module, MODULES[module]) == []


def test_the_check_sees_an_import_to_the_right(tmp_path):
    """Inside a function too; a TYPE_CHECKING block is not an import that runs."""
    file = tmp_path / "run.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sae_bias.workflows.sweep import Sweep\n"
        "def f():\n    from sae_bias.workflows.study import run_study\n    from sae_bias.core import errors\n"
    )
    assert len(wrong_way("probe.run", file)) == 1


@pytest.mark.parametrize("library", ONLY_IMPORTER)
def test_one_importer_a_library(library):
    importers = {
        module.split(".")[0]
        for module, path in MODULES.items()
        for name, _ in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] == library
    }
    assert importers <= {ONLY_IMPORTER[library]}


def test_import_order_of_the_command_line():
    """`import sae_bias` and `sae_bias.cli.main` bring in no torch, and neither does --help of any command."""
    code = (
        "import sys, sae_bias, sae_bias.cli.main as cli\n"
        "app = cli.build_app()\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'sae_lens', 'pandas', 'numpy', 'scipy', 'plotly'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve():
    import sae_bias

    missing = [name for name in sae_bias.__all__ if getattr(sae_bias, name, None) is None]
    assert missing == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sae_bias.nothing


def tracked() -> list[Path]:
    """Text files under version control (or, outside a checkout, of the source tree)."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    binary = {".safetensors", ".npz", ".png", ".svg", ".parquet", ".ico"}
    return [
        p for line in listed.stdout.splitlines() if (p := ROOT / line).is_file() and p.suffix not in binary
    ]


def test_no_machine_path_in_tracked_files():
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert found == []


def test_constraints_are_plain_pins():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not PIP_LINE.search(text)
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+(?:\.post\d+)?", pin) for pin in pins), (
        "no local suffix, no marker"
    )
    assert "torch==2.13.0" in pins


def test_the_makefile_leaves_pips_configuration_alone():
    for name in ("Makefile", ".ci/run", "pyproject.toml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(
            r"--index-url|--extra-index-url|--find-links|--trusted-host|PIP_[A-Z]+\s*[:?]?=|pip config", text
        ), name


def parsed() -> Iterator[tuple[str, ast.Module]]:
    yield from ((module, ast.parse(path.read_text(encoding="utf-8"))) for module, path in MODULES.items())


def long_functions(tree: ast.AST, most: int = 60) -> list[str]:
    """Functions of more lines than `most`, decorators and docstring counted."""
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        f.name
        for f in found
        if (f.end_lineno or 0) - min([f.lineno, *(d.lineno for d in f.decorator_list)]) + 1 > most
    ]


def test_no_function_is_longer_than_sixty_lines_but_commands():
    found = {m: long_functions(tree) for m, tree in parsed() if not m.startswith("cli")}
    assert {m: names for m, names in found.items() if names} == {}
    assert long_functions(ast.parse("def f():\n" + "    a = 1\n" * 60)) == ["f"]


def test_no_file_wide_pragma():
    pragma = re.compile(r"^\s*#\s*(?:pyright|mypy|ruff|flake8)\s*:|^\s*#\s*type:\s*ignore", re.M)
    assert [m for m, p in MODULES.items() if pragma.search(p.read_text(encoding="utf-8"))] == []


JOINTS = (
    "core.registry",
    "measures.base",
    "models.architectures",
    "report.sections",
    "runs.effect_lines",
    "runs.folder",
    "runs.summary",
    "saes.formats",
    "saes.ids",
    "steering.intervention",
    "steering.edits",
    "workflows.study",
    "workflows.study_file",
    "workflows.sweep_summary",
)
"""Where one package hands over to the next: seams to register at, a run folder, and the summary from measuring to terminal and report."""
UNTYPED = {
    "RunFolder.read_json",  # a file of anybody's
    "Run.manifest",
    "Run.model",
    "Block.__getitem__",  # a field by its name in the file; attributes are typed
    "Block.get",
    "Block.facts",
    "at_path",  # below a module of transformers
}


def untyped(tree: ast.Module) -> Iterator[str]:
    """Public functions, arguments and fields whose annotation says Any."""

    def says_any(node: ast.expr | None) -> bool:
        return node is not None and re.search(r"\bAny\b", ast.unparse(node)) is not None

    def look(body: list[ast.stmt], owner: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from look(node.body, f"{node.name}.")
            if isinstance(node, ast.AnnAssign) and says_any(node.annotation):
                yield owner + ast.unparse(node.target)
            if isinstance(node, ast.FunctionDef) and (
                not node.name.startswith("_") or node.name.startswith("__")
            ):
                a = node.args
                given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else [])]
                if says_any(node.returns) or any(says_any(arg.annotation) for arg in given):
                    yield owner + node.name

    yield from look(tree.body, "")


def test_no_joint_between_packages_is_untyped():
    found = {m: list(untyped(tree)) for m, tree in parsed() if m in JOINTS}
    assert {name for names in found.values() for name in names} == UNTYPED
    assert len(found) == len(JOINTS)
    broken = (
        "class A:\n    x: dict[str, Any]\n    def f(self, y: Any) -> int: ...\n    def _g(self) -> Any: ..."
    )
    assert list(untyped(ast.parse(broken))) == ["A.x", "A.f"]


def test_no_unsafe_loading():
    files = [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "experiments").rglob("*.py"),
        *(ROOT / "notebooks").rglob("*.ipynb"),
    ]
    found = [
        str(p.relative_to(ROOT))
        for p in files
        if any(map(FORBIDDEN_CALLS.search, p.read_text(encoding="utf-8").splitlines()))
    ]
    assert found == []


def test_every_command_of_the_readme_and_agents_exists():
    from sae_bias.cli.main import build_app

    known = {c.name for c in build_app().registered_commands}
    for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md"):
        blocks = re.findall(
            r"```(?:bash|sh|shell)\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S
        )
        used = set(re.findall(r"^\s*sae-bias ([a-z]+)", "\n".join(blocks), re.M))
        assert used <= known, name
