"""Run folders in, one self-contained HTML file (or Markdown appendix) out; nothing is measured or fetched.

Every figure is drawn from a table of the run folder (`manifest.json`, `summary.json`,
`tables/*.parquet`), stands above that table, and opens with one sentence in plain words. Text from
prompts and models stays text: jinja2 escapes it in the page, `script_json` in the data blocks,
`figures.style.plain` in the figures, and the page's own policy (a hash for each of its two scripts, no
connections) stops whatever else would run or load.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from plotly.offline import get_plotlyjs

from sae_bias.core import text as fmt
from sae_bias.core.errors import RequestError
from sae_bias.core.files import writing_whole
from sae_bias.core.labels import columns_of
from sae_bias.core.versions import DEFINITIONS, changed_since, definitions_of
from sae_bias.figures import published as published_figures
from sae_bias.figures.style import bias_axis
from sae_bias.report import words
from sae_bias.report.parts import Section, Table, table_of
from sae_bias.report.sections import calibration as calibration_sections
from sae_bias.report.sections import sections
from sae_bias.report.sections.behavior import judge_sentence
from sae_bias.report.sections.published import model_rows
from sae_bias.runs.folder import Run, read_run, reading
from sae_bias.runs.summary import Effect, ReductionFigure

ORGANISM_BANNER = (
    "The model measured here is a calibration organism: a tiny model trained so that its double standard is"
    " known. Nothing here is a finding about Gemma."
)
CALLED = {
    "ai_speech": "answers to AI speech",
    "silent": "is silent at AI speech",
    "separates": "separates the two sides",
    "most_causal": "not called AI-speech; removes most",
    "undetermined": "undetermined: too small a design",
    "none": "none is called AI-speech",
}
STAND_IN_BANNER = "Tiny random models stood in for the models named: this run tests the plumbing, and no figure in it means anything."
TEMPLATES = Path(str(files("sae_bias") / "data"))


def write_report(*runs: str | Path, out: str | Path | None = None, format: str = "html") -> Path:
    """Write one report over `runs`, side by side where there are several, and return its path.

    `out` is a file or a folder; by default `report.html` (or `.md`) in the run's own folder, and
    `comparison.html` beside the first run where there are several. Raises RequestError for a folder that
    is not a run, MissingError for a full disk; nothing half-written is left.
    """
    if not runs:
        raise RequestError(
            "write_report needs at least one run folder, none was given. Try write_report('runs/demo')."
        )
    if format not in ("html", "md"):
        raise RequestError(f"format={format!r} is not known; expected 'html' or 'md'.")
    loaded = [read_run(run) for run in runs]
    render = _html if format == "html" else _markdown
    name = f"report.{format}" if len(runs) == 1 else f"comparison.{format}"
    own = loaded[0].folder if len(runs) == 1 else loaded[0].folder.resolve().parent
    target = own / name if out is None else Path(out) / name if Path(out).is_dir() else Path(out)
    with reading(f"what {', '.join(str(run) for run in runs)} holds"):
        text = render(loaded)
    with writing_whole(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return target


# ── the page
def _html(runs: Sequence[Run]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )  # fmt: skip
    plotly_js = get_plotlyjs().replace("</script", "<\\/script")
    page_js = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    views = [_view(run, f"run{i}-" if len(runs) > 1 else "") for i, run in enumerate(runs, start=1)]
    return environment.get_template("report.html.j2").render(
        title=views[0]["question"] if len(runs) == 1 else f"{len(runs)} runs side by side",
        tag="h2" if len(runs) == 1 else "h3",
        runs=views,
        beside=_beside(runs),
        plotly_js=plotly_js,
        page_js=page_js,
        hashes=[_csp_hash(plotly_js), _csp_hash(page_js)],
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def _csp_hash(script: str) -> str:
    """The content-security-policy source that lets exactly this script run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _view(run: Run, prefix: str) -> dict[str, Any]:
    """All that the template shows of one run."""
    copies = {"copies": "left out here; in the run folder's manifest.json"}  # of prompts and words: long
    manifest = run.manifest | (copies if "copies" in run.manifest else {})
    return {
        "id": prefix,
        "name": run.name,
        "banner": STAND_IN_BANNER if run.stand_ins else ORGANISM_BANNER if run.organism else "",
        "sides": run.sides,
        "grid": "ranking" in run.tables,
        "model": run.model.get("label") or run.model.get("name") or "a model that the manifest does not name",
        "question": run.summary.question or "What was measured",
        "command": run.manifest.get("command") or "",
        "created": run.manifest.get("created") or "",
        "tiles": _tiles(run),
        "findings": _findings(run),
        "sections": [replace(s, anchor=prefix + s.anchor) for s in sections(run)],
        "facts": _facts(run),
        "truth": _truth(run),
        "notes": [*(str(note) for note in run.summary.notes), *_definitions(run)],
        "manifest": json.dumps(manifest, indent=2, ensure_ascii=False),
    }


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures on top: name, value, how sure. Only what the summary speaks of."""
    s, tiles = run.summary, []
    if s.difference_in_differences:
        did = s.difference_in_differences
        tiles.append(("Beyond mundane content", f"{fmt.number(did.mean)} nats", fmt.interval(did)))
    if s.bias:
        tiles.append(("Bias", f"{fmt.number(s.bias.mean)} nats", fmt.interval(s.bias)))
    if s.feature:
        name = f"#{s.feature.index}" if s.feature.id else "none"
        tiles.append(("Feature", name, CALLED.get(s.feature.called or "", fmt.NOT_MEASURED)))
    if s.reduction and fmt.is_number(s.reduction.change):
        ends = Effect(ci_low=s.reduction.change_low, ci_high=s.reduction.change_high)
        tiles.append(("Bias removed", f"{fmt.number(s.reduction.change)} nats", fmt.interval(ends)))
    if s.reduction:
        share = fmt.UNDEFINED if s.reduction.bounded is False else fmt.percent(s.reduction.estimate)
        name = "As a share" if fmt.is_number(s.reduction.change) else "Bias removed"
        tiles.append((name, share, fmt.interval(s.reduction, share=True)))
    if s.specific_reduction:
        specific = s.specific_reduction
        tiles.append(("Specific", fmt.percent(specific.estimate), fmt.interval(specific, share=True)))
        if fmt.is_number(specific.beta):
            tiles.append(("β", fmt.number(specific.beta), "share of ordinary evaluation that is left"))
    costs = {k: c.kl_mean for k, c in (s.costs or {}).items() if fmt.is_number(c.kl_mean)}
    if costs:
        worst = max(costs, key=lambda k: costs[k])
        where = fmt.COST_KINDS.get(worst, worst) if costs[worst] else "on every text measured"
        tiles.append(("Cost", f"{fmt.number(costs[worst])} KL", f"nats a token, {where}"))
    return tiles


def _findings(run: Run) -> list[tuple[str, str]]:
    """What was found, how sure it is and what it cost, a sentence each."""
    s, said = run.summary, []
    if s.difference_in_differences:
        said.append(("Found", words.primary_sentence(s.difference_in_differences, run.sides)))
    if s.bias:
        said.append(("Bias" if said else "Found", words.bias_sentence(s.bias, run.sides)))
    said += [("Read with care", f"{line[:1].upper()}{line[1:]}.") for line in words.cautions(s)]
    said += [*calibration_sections.findings(s.calibration), *model_rows(run)]
    if s.control_bias:
        sentence = words.control_bias_sentence(s.control_bias, s.difference_in_differences, run.sides)
        said.append(("Compared with", sentence))
    if s.feature:
        said.append(("Feature", words.feature_sentence(s.feature)))
    if s.reduction:
        sentence = words.reduction_sentence(s.reduction, s.specific_reduction, s.did, s.shift)
        said.append(("Suppressed", sentence))
    if s.controls:
        said.append(("How sure", words.control_sentence(s.controls)))
    if s.costs:
        said.append(("Cost", words.cost_sentence(s.costs)))
    if s.generations and s.generations.steered:
        said.append(("Texts", words.text_sentence(s.generations)))
    if "judge_parts" in run.tables:
        said.append(("Judges", judge_sentence(run.tables["judge_parts"])))
    if s.scenarios:
        said.append(("Scenarios", words.scenario_sentence(s.scenarios)))
    if s.identity:
        said.append(("Identity", words.identity_sentence(s.identity)))
    return said


def _truth(run: Run) -> list[tuple[str, str]]:
    """What was planted in an organism; an ordinary model has no such block."""
    return [
        (str(k).replace("_", " "), fmt.number(v) if not isinstance(v, dict | list) else json.dumps(v))
        for k, v in run.summary.truth.items()
    ]


def _definitions(run: Run) -> list[str]:
    """Which figures of an older run have changed their meaning since it was made."""
    version = definitions_of(run.manifest)
    said = "; ".join(f"{name}: {how}" for name, how in changed_since(version).items())
    made = f"Made with version {version} of the definitions; today's is {DEFINITIONS}."
    return [f"{made} These figures have changed their meaning: {said}."] if said else []


def _facts(run: Run) -> list[tuple[str, str]]:
    """The manifest's main lines, for a reader who will not open it."""
    m, model, gate = run.manifest, run.model, run.manifest.get("gate") or {}
    layers = model.get("n_layers") and f"{model['n_layers']} layers"
    facts = [
        ("command", m.get("command")),
        ("model", model.get("label") or model.get("name")),
        ("terms", (model.get("gguf") or {}).get("terms")),
        ("architecture", _joined(model.get("architecture"), layers)),
        ("precision and device", _joined(model.get("dtype"), model.get("device"))),
    ]
    for s in m.get("saes") or []:
        of = f"layer {s.get('layer')}, width {s.get('width')}, L0 {fmt.number(s.get('l0'))}"
        facts.append(("SAE", f"{s.get('id')} ({of})"))
    for name, p in (m.get("prompts") or {}).items():
        if isinstance(p, dict):
            facts.append((name, f"{p.get('name')}, {p.get('n')} prompts, digest {str(p.get('digest'))[:12]}"))
    facts += [(f"{split} split", f"{len(ids)} templates") for split, ids in (m.get("split") or {}).items()]
    cards = sorted(p.name for p in (run.folder / "cards").glob("*.html"))
    facts.append(("feature dashboards", cards and f"{', '.join(cards)} (in cards/ of the run folder)"))
    if gate:
        error, fvu, l0, label = (
            fmt.number(gate.get(k)) for k in ("residual_max_rel_error", "fvu", "l0", "label_l0")
        )
        found = f"residual error {error}, unexplained variance {fvu}, L0 {l0} (label {label})"
        facts.append(("fidelity gate", f"{gate.get('status')}: {found}"))
    facts += [
        ("seed", m.get("seed")),
        ("created", m.get("created")),
        ("versions", _joined(*(f"{k} {v}" for k, v in (m.get("versions") or {}).items()))),
    ]
    seconds = (f"{k} {fmt.number(v)} s" for k, v in run.summary.seconds.items())
    facts.append(("time", _joined(*seconds)))
    return [(name, str(value)) for name, value in facts if value not in (None, "", [])]


def _joined(*parts: Any) -> str:
    return ", ".join(str(p) for p in parts if p not in (None, ""))


def _beside(runs: Sequence[Run]) -> list[Section]:
    """Several runs on one axis; nothing for a single run."""
    if len(runs) < 2:
        return []
    rows = pd.DataFrame([_row(run) for run in runs])
    columns = columns_of(
        "run; model; bias; bias_low: from; bias_high: to; removed; removed_low: removed from; removed_high: removed to; "
        "specific; kl_worst: KL, worst text; feature; organism: calibration organism"
    )
    shown = {c: label for c, label in columns.items() if rows[c].notna().any()}
    stands = (
        " Runs on a calibration organism are not findings about a public model."
        if rows["organism"].any()
        else ""
    )
    one_question = len({run.sides for run in runs}) == 1  # others share only their sign
    bias = (
        bias_axis(runs[0].sides)
        if one_question
        else "bias in nats (right of 0: the second side judged worse)"
    )
    found = []
    for key, anchor, title, says in (
        ("bias", "beside", "The bias in every run", "Each with its 95% interval."),
        ("removed", "beside-removed", "The share removed in every run", "Each with Fieller's 95% interval."),
    ):
        known = rows[rows[key].notna()]
        if known.empty:
            continue
        ends = {key: "mean", f"{key}_low": "ci_low", f"{key}_high": "ci_high"}
        part = known[["run", *ends]].rename(columns=ends)
        axis = bias if key == "bias" else "share of the bias removed"
        figure = published_figures.compare_runs(part, title=title, axis=axis, share=key == "removed")
        table = table_of(rows, shown, missing=fmt.NOT_MEASURED) if not found else None
        found.append(Section(anchor, title, says + stands, figure, table, open_table=True))
    return found


def _row(run: Run) -> dict[str, Any]:
    """One run's line in the table of several."""
    s = run.summary
    costs = [c.kl_mean for c in (s.costs or {}).values() if fmt.is_number(c.kl_mean)]
    bias, cut = s.bias or Effect(), s.reduction or ReductionFigure()
    specific = s.specific_reduction.estimate if s.specific_reduction else None
    figures = {
        "bias": bias.mean, "bias_low": bias.ci_low, "bias_high": bias.ci_high, "removed": cut.estimate, "removed_low": cut.ci_low,
        "removed_high": cut.ci_high, "specific": specific, "kl_worst": max(costs, default=None),
    }  # fmt: skip
    known = {k: float(v) if fmt.is_number(v) else float("nan") for k, v in figures.items()}
    of = {
        "model": run.model.get("name"),
        "organism": run.organism,
        "feature": s.feature.id if s.feature else None,
    }
    return {"run": run.name, **of, **known}


# ── Markdown
def _markdown(runs: Sequence[Run]) -> str:
    """A paper appendix: the same sentences and tables, without figures."""
    blocks = [_md_section(s) for s in _beside(runs)]
    for run in runs:
        view = _view(run, "")
        blocks += [f"# {_md(view['question'])}", f"Run `{run.name}`, model {_md(view['model'])}."]
        blocks += [f"> **{view['banner']}**"] if view["banner"] else []
        blocks += ["\n".join(f"- **{name}.** {_md(sentence)}" for name, sentence in view["findings"])]
        blocks += [_md_section(s) for s in view["sections"]]
        blocks += [
            "## Methods and manifest",
            "\n".join(f"- {_md(name)}: {_md(value)}" for name, value in view["facts"]),
        ]
        notes = "\n".join(f"- {_md(note)}" for note in view["notes"])
        blocks += [f"## Notes\n\n{notes}"] if notes else []
    return "\n\n".join(block for block in blocks if block) + "\n"


def _md(text: object) -> str:
    """`text` on one line, with nothing that Markdown or HTML would obey."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + c if c in "\\`*_[]|#" else c for c in line)


def _md_section(section: Section) -> str:
    parts = [f"## {_md(section.title)}", _md(section.takeaway)]
    parts += [_md_table(section.table)] if section.table else []
    for side in section.sides:
        left, right = ("".join(piece.text for piece in side_) for side_ in (side.left, side.right))
        first, second = section.side_names
        parts.append(f"- {_md(side.head)}\n  - {first}: {_md(left)}\n  - {second}: {_md(right)}")
    return "\n\n".join(parts)


def _md_table(table: Table, most: int = 40) -> str:
    lines = [
        "| " + " | ".join(_md(label) for label, _ in table.columns) + " |",
        "|" + "".join("---:|" if kind == "num" else "---|" for _, kind in table.columns),
    ]
    lines += ["| " + " | ".join(_md(cell.text) for cell in row) + " |" for row in table.rows[:most]]
    hidden = len(table.rows) - most + table.left_out
    return "\n".join(lines) + (f"\n\n{hidden:,} more rows in `{table.source}`." if hidden > 0 else "")
