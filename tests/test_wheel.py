"""What `pip install sae-bias` brings: the whole package with its types and data, within size limits, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Wheel and sdist, by the backend that `python -m build` calls."""
    pytest.importorskip("hatchling")
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    place = str(tmp_path_factory.mktemp("dist"))
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=place, versions=["standard"])
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=place, versions=["standard"])
    return {"wheel": Path(wheel), "sdist": Path(sdist)}


@pytest.fixture(scope="module")
def entries(built) -> dict[str, int]:
    """Name in the wheel -> compressed bytes."""
    with zipfile.ZipFile(built["wheel"]) as archive:
        return {i.filename: i.compress_size for i in archive.infolist() if not i.is_dir()}


def test_the_wheel_is_small_and_smaller_still_without_the_organisms(entries):
    """25 MB with the organisms' weights and tokenizers, 3 MB without them."""
    organisms = sum(size for name, size in entries.items() if "/data/organisms/" in name)
    assert sum(entries.values()) <= 25 * MIB
    assert sum(entries.values()) - organisms <= 3 * MIB


def test_the_wheel_holds_every_tracked_file_of_the_package_and_nothing_else(entries):
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "sae_bias"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    shipped = {name for name in entries if ".dist-info/" not in name}
    assert shipped == {name for name in tracked if (ROOT / name).is_file()}
    assert {"sae_bias/py.typed", "sae_bias/__init__.pyi"} <= shipped
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in entries)


def test_nothing_that_trains_is_shipped(entries):
    assert not any(
        name.startswith(("experiments/", "organisms/", "tests/", "notebooks/")) for name in entries
    )


def test_the_sdist_holds_what_builds_the_wheel_and_no_run_folder(built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "sae_bias/__init__.pyi"} <= names
    assert not any(name.startswith(("runs/", ".venv/", "dist/", "build/")) for name in names)


@pytest.mark.slow
def test_twine_accepts_both(built):
    pytest.importorskip("twine")
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.values())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_wheel_runs_the_demo_in_an_empty_folder(built, tmp_path):
    """Unpacked away from the checkout, as pip does it; the dependencies are this environment's."""
    site = tmp_path / "site"
    with zipfile.ZipFile(built["wheel"]) as archive:
        archive.extractall(site)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    code = "import sae_bias; print(sae_bias.__file__); from sae_bias.cli.main import main; raise SystemExit(main(['demo']))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.startswith(str(site))
    assert list(empty.rglob("report.html"))


# ── dependencies


def pins(name: str) -> dict[str, str]:
    """Package -> version of a constraint set."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if "==" in line]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def test_both_constraint_sets_hold_every_dependency_within_its_range():
    """The newest set is the one tested here; the oldest has each dependency at (or, where another one needs it, above) its lower bound."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    for text in project["dependencies"]:
        wanted = Requirement(text)
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        assert wanted.specifier.contains(newest[name]), text
        assert wanted.specifier.contains(oldest[name]), text
    lowest = {name: oldest[name] for name in ("torch", "typer", "numpy", "pandas", "scipy", "sae-lens")}
    assert lowest == {
        "torch": "2.7.0",
        "typer": "0.20.0",
        "numpy": "1.26.0",
        "pandas": "2.2.0",
        "scipy": "1.13.0",
        "sae-lens": "6.54.0",
    }


def test_no_dependency_names_a_gpu_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["dependencies"], *pins("constraints.txt"), *pins("constraints-oldest.txt")]
    assert [name for name in named if re.match(r"(nvidia|cuda|triton)", name)] == []


def test_the_version_is_one():
    import sae_bias

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == sae_bias.__version__ == citation["version"]
