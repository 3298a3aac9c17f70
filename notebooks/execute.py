"""Run the notebooks and keep their outputs: `python notebooks/execute.py [NAME.ipynb ...]`, all of them by default.

Each runs in an empty folder (`runs/` of the repository, where there is one, is linked into it). Outputs are cleaned of what would differ from one run to the next (timings, progress bars, widget
ids), and every plotly figure gets a PNG beside it, drawn by an installed Chromium, for places such as GitHub that draw no plotly.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
SLIDER = "*(A slider stands here while the notebook runs: moving it runs the probe again.)*"
WIDTH = 860


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook, executed in an empty folder, with clean outputs."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        if (runs := HERE.parent / "runs").is_dir():  # what another command trained, such as an SAE
            (Path(folder) / "runs").symlink_to(runs)
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", record_timing=False,
            resources={"metadata": {"path": folder}},
        )  # fmt: skip
        client.execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = joined([clean(o) for o in cell.outputs if o.get("name") != "stderr"])
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """What was printed in one piece; the kernel cuts it where it happens to."""
    kept: list[Any] = []
    for output in outputs:
        if kept and output["output_type"] == kept[-1]["output_type"] == "stream":
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def clean(output: Any) -> Any:
    """One output without widget ids; the slider leaves a line in its place."""
    data = output.get("data", {})
    if WIDGET in data:
        output["data"] = {"text/markdown": SLIDER, "text/plain": SLIDER.strip("*")}
    return output


def add_pictures(notebooks: list[nbformat.NotebookNode]) -> None:
    """A PNG beside every plotly figure; without a Chromium the figures stay as they are."""
    sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))
    import browser
    from plotly.offline import get_plotlyjs

    found = [
        o for n in notebooks for c in n.cells for o in c.get("outputs", []) if PLOTLY in o.get("data", {})
    ]
    if browser.missing() or not found:
        print(f"no pictures: {browser.missing() or 'no figures'}")
        return
    with browser.chromium() as driver, tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        script = get_plotlyjs().replace("</script", "<\\/script")
        page.write_text(f"<!doctype html><meta charset=utf-8><script>{script}</script>", encoding="utf-8")
        driver.get(page.as_uri())
        for output in found:
            output["data"]["image/png"] = picture(driver, output["data"][PLOTLY])


def picture(driver: Any, figure: dict[str, Any]) -> str:
    """One figure as PNG, base64."""
    height = (figure["layout"].get("height")) or 450
    url = driver.execute_async_script(
        "const done = arguments[arguments.length - 1], f = JSON.parse(arguments[0]);"
        "Plotly.toImage(f, {format: 'png', width: arguments[1], height: arguments[2], scale: 1.3}).then(done)",
        json.dumps({"data": figure["data"], "layout": figure["layout"]}), WIDTH, height,
    )  # fmt: skip
    return url.split(",", 1)[1]


def main() -> None:
    paths = [Path(p) for p in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    notebooks = []
    for path in paths:
        print(path.name)
        notebooks.append(run(path))
        nbformat.write(notebooks[-1], path)
    add_pictures(notebooks)
    for path, notebook in zip(paths, notebooks, strict=True):
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
