"""The notebooks run from an empty folder without a network, use public names only, and carry clean outputs."""

import ast
import json
import re
from pathlib import Path

import pytest

import sae_bias as sb
from sae_bias.models.catalog import organism_names

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
REAL = [p for p in NOTEBOOKS if p.stem.startswith("06")]
"""What needs a pretrained model and an SAE trained on it (experiments/gemma_3_270m): executed by hand."""
MOST_BYTES = 1_500_000
OTHERS = {
    "torch",
    "ipywidgets",
    "json",
    "re",
    "threading",
    "http.server",
    "pandas",
    "numpy",
    "importlib.util",
}
"""What a notebook may import beside the package: the standard library and what the package itself needs."""


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code(path):
    return ["".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "code"]


def outputs(path):
    return [o for c in read(path)["cells"] for o in c.get("outputs", [])]


def test_they_are_numbered():
    numbers = [p.stem[:2] for p in NOTEBOOKS]
    assert numbers[:5] == ["01", "02", "03", "04", "05"] and len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_opens_with_a_question_and_names_the_model_in_one_line(path):
    first = "".join(read(path)["cells"][0]["source"])
    assert first.startswith(f"# {path.stem[:2]} · ")
    assert first.splitlines()[0].endswith("?")
    named = [line for cell in code(path) for line in cell.splitlines() if line.startswith("MODEL = ")]
    if path in REAL:
        assert len(named) == 1 and named[0].startswith('MODEL = "gemma-3-270m-q4"')
        return
    assert named == [
        'MODEL = "organism:planted"  # a bundled calibration organism; on a GPU: "google/gemma-3-12b-it"'
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_uses_public_names_only(path):
    for cell in code(path):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.Import):
                named = [(a.name, a.asname) for a in node.names]
                assert all(pair == ("sae_bias", "sb") or pair[0] in OTHERS for pair in named), named
            elif isinstance(node, ast.ImportFrom):
                assert node.module in OTHERS, node.module
            elif (
                isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sb"
            ):
                assert node.attr in sb.__all__, node.attr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_its_outputs_are_there_and_hold_nothing_of_the_machine(path):
    assert path.stat().st_size < MOST_BYTES
    cells = [c for c in read(path)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    text = json.dumps(outputs(path))
    assert not re.search(r"/(?:home|root|work|tmp|Users|private)/", text)
    assert not re.search(r"\b127\.0\.0\.1:\d+|it/s\]|s/it\]", text)
    assert "widget-view" not in text
    assert not [o for o in outputs(path) if o["output_type"] == "error" or o.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_figure_has_a_picture_for_places_that_draw_no_plotly(path):
    for output in outputs(path):
        data = output.get("data", {})
        if "application/vnd.plotly.v1+json" in data:
            assert data["image/png"]


def test_there_are_a_slider_and_colored_tokens():
    suppress = next(p for p in NOTEBOOKS if p.stem.startswith("03"))
    assert any("FloatSlider" in cell for cell in code(suppress))
    html = ["".join(o.get("data", {}).get("text/html", "")) for o in outputs(suppress)]
    assert any("background:rgba" in h for h in html)


def execute(path, folder, monkeypatch):
    """Run a notebook in an empty folder with the hub off, as a kernel of this very Python."""
    for name in ("nbclient", "ipykernel", "ipywidgets"):
        pytest.importorskip(name)
    if "planted" not in organism_names():
        pytest.skip("organism:planted is not installed")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(folder / name.lower()))
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    printed = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert not [o for o in printed if o["output_type"] == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p not in REAL], ids=lambda p: p.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    execute(path, tmp_path, monkeypatch)
