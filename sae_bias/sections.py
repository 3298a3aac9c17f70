"""The sections of a report, each made from one table of a run folder, left out where that is absent."""

# pandas' stubs make a union of every column read: these checks would flag each `frame["x"]`.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from sae_bias import behavior_sections, plots, wording
from sae_bias.errors import RequestError
from sae_bias.report_parts import Run, Section, Sides, Table, table_of


def sections(run: Run) -> list[Section]:
    """Every section whose table the run has, in reading order."""
    built = []
    for name, build in _SECTIONS:
        if not _present(run, name):
            continue
        try:
            built.append(build(run))
        except KeyError as error:
            have = ", ".join(map(str, run.tables[name].columns))
            raise RequestError(
                f"{run.folder / 'tables' / name}.parquet has no column {error}; it has {have}. Run the"
                " command that wrote it again."
            ) from error
    return built


def _present(run: Run, table: str) -> bool:
    return table in run.tables and not (table == "comparison" and run.organism)


def _table(
    run: Run,
    name: str,
    columns: dict[str, str],
    frame: pd.DataFrame | None = None,
    *,
    missing: str = wording.UNDEFINED,
) -> Table:
    return table_of(
        run.tables[name] if frame is None else frame,
        columns,
        source=f"{run.folder.name}/tables/{name}.parquet",
        missing=missing,
    )


def _bias(run: Run) -> Section:
    pairs, bias = run.tables["pairs"], run.part("bias")
    means = pairs.groupby("template")["bias"].mean()
    share = f"{int((means > 0).sum())} of {len(means)} templates lean against the AI."
    takeaway = (
        f"{share} The overall mean is {wording.number(bias.get('mean'))} nats ({wording.interval(bias)})."
        if bias
        else share
    )
    columns = {
        "template": "template",
        "human": "human prompt",
        "ai": "AI prompt",
        "split": "split",
        "score_human": "human score",
        "score_ai": "AI score",
        "bias": "bias",
        "control_bias": "mundane bias",
    }
    how = (
        "One row a template, averaged over its subjects; the line is its 95% interval, the band the interval"
        " of the overall mean."
    )
    return Section(
        "bias",
        "The bias, template by template",
        takeaway,
        plots.bias_by_template(pairs, bias),
        _table(run, "pairs", columns),
        how_to_read=how,
    )


def _spread(run: Run) -> Section:
    pairs = run.tables["pairs"]
    takeaway = wording.control_bias_sentence(run.part("control_bias"), run.part("difference_in_differences"))
    rows = (
        pairs[[c for c in ("bias", "control_bias") if c in pairs]].describe().T.reset_index(names="measure")
    )
    table = _table(
        run,
        "pairs",
        {
            "measure": "measure",
            "count": "pairs",
            "mean": "mean",
            "std": "SD",
            "min": "least",
            "50%": "median",
            "max": "most",
        },
        rows,
    )
    return Section(
        "spread",
        "Spread over pairs, and the mundane control",
        takeaway,
        plots.bias_distribution(pairs),
        table,
    )


def _words(run: Run) -> Section:
    words = run.tables["words"].sort_values("diff", ascending=False)
    top = ", ".join(f"“{w}”" for w in words["word"].head(3))
    excluded = (run.manifest.get("words") or {}).get("excluded") or []
    note = (
        f" Left out because they are several tokens for this model: {', '.join(map(str, excluded))}."
        if excluded
        else ""
    )
    table = _table(run, "words", {"word": "word", "side": "side", "diff": "contribution"}, words)
    return Section(
        "words",
        "The words that carry it",
        f"The three words that add most are {top}.{note}",
        plots.word_contributions(words),
        table,
    )


def _levels(run: Run) -> Section:
    frame = run.tables["levels"]
    mean = frame.groupby("kind")["score"].mean()
    said = [
        f"{name} {wording.number(mean[k])}"
        for k, name in (("human", "human subjects"), ("ai", "AI subjects"), ("neutral", "neutral subjects"))
        if k in mean
    ]
    takeaway = (
        f"Mean score in nats: {', '.join(said)}. Neutral subjects show how much is a penalty for AI and how"
        " much a bonus for humans."
    )
    table = _table(
        run,
        "levels",
        {"subject": "subject", "kind": "kind", "score": "score", "ci_low": "from", "ci_high": "to"},
    )
    return Section("levels", "How every subject is judged", takeaway, plots.levels(frame), table)


def _ranking(run: Run) -> Section:
    calls = plots.calls_of(run.tables["ranking"])
    frame = run.tables["ranking"].assign(
        call=calls.map({k: v[0] for k, v in plots.CALLS.items()}), order=calls.map({"ai_speech": 0}).fillna(1)
    )
    frame = frame.sort_values(["order", "interaction"], ascending=[True, False], na_position="last")
    counts = calls.value_counts()
    dead = int(frame["dead"].fillna(False).astype(bool).sum()) if "dead" in frame else 0
    answers, separates, open_ = (int(counts.get(k, 0)) for k in ("ai_speech", "separates", "undetermined"))
    takeaway = (
        f"{len(frame):,} features: called AI-speech {answers:,}, separating AI from human {separates:,},"
        f" undetermined {open_:,}, never active {dead:,}. Telling AI from human is easy, because the words"
        " differ; answering to speech is the harder test."
    )
    columns = {
        "feature": "feature",
        "call": "called",
        "causal_ai_speech": "causal",
        "layer": "layer",
        "interaction": "interaction",
        "auroc": "AUROC",
        "mean_ai": "mean, AI",
        "mean_human": "mean, human",
        "t": "t",
        "p_fwer": "family-wise p",
        "q_bh": "q",
        "attribution": "attribution",
        "ablation": "ablation",
        "fire_ai": "fires, AI",
        "fire_human": "fires, human",
        "dense": "dense",
        "dead": "dead",
        "reason": "remark",
    }
    how = (
        "Up: fires more for AI speech than other AI text, beyond what speech does for humans. Right: higher"
        " on AI than on human prompts."
    )
    return Section(
        "features",
        "Every candidate feature",
        takeaway,
        plots.ranked_features(frame),
        _table(run, "ranking", columns, frame),
        open_table=True,
        how_to_read=how,
    )


def _activation(run: Run) -> Section:
    frame, feature = run.tables["activation"], run.part("feature").get("id")
    chosen = (
        frame[frame["feature"] == feature]
        if feature in set(frame["feature"])
        else frame[frame["feature"] == frame["feature"].iloc[0]]
    )
    mean = chosen.groupby(["group", "act"])["activation"].mean()
    said = [
        f"{label} {wording.number(mean[key])}"
        for key, label in (
            (("ai", "speech"), "an AI speaks"),
            (("ai", "nonspeech"), "an AI does something else"),
            (("human", "speech"), "a human speaks"),
            (("animal", "speech"), "an animal speaks"),
        )
        if key in mean
    ]
    columns = {
        "subject": "subject",
        "statement": "statement",
        "act": "act",
        "content": "content",
        "activation": "activation",
    }
    takeaway = f"Mean activation: {'; '.join(said)}." if said else "Where the feature is active."
    return Section(
        "activation",
        "Where the feature fires",
        takeaway,
        plots.activation_heatmap(frame, feature=feature),
        _table(run, "activation", columns, chosen),
    )


def _rejected(run: Run) -> Section:
    frame = run.tables["rejected"]
    return Section(
        "rejected",
        "Candidates that were rejected",
        f"{len(frame):,} candidates looked right at first and were set aside, for the reasons below.",
        table=_table(run, "rejected", {"feature": "feature", "reason": "reason"}),
        open_table=True,
    )


def _sweep(run: Run) -> Section:
    best = run.part("best_strength")
    inside, held = best.get("in_sample") or {}, best.get("held_out") or {}
    takeaway = (
        wording.reduction_sentence(run.part("reduction"), {})
        if run.part("reduction")
        else "How the bias moves with the strength of the intervention."
    )
    if inside and held:
        takeaway += (
            f" Best strength on the tune split: {wording.number(inside.get('strength'))}, removing"
            f" {wording.percent(inside.get('reduction'))} there and {wording.percent(held.get('reduction'))}"
            f" on templates held out{_beyond(run, inside.get('strength'))}."
        )
    columns = {
        "intervention": "intervention",
        "strength": "strength",
        "kind": "kind",
        "split": "split",
        "positions": "positions",
        "n_pairs": "pairs",
        "bias": "bias",
        "ci_low": "from",
        "ci_high": "to",
        "reduction": "removed",
        "mean_abs_change": "mean |change|",
        "kl_neutral": "KL neutral",
        "kl_ai_nonspeech": "KL AI, no speech",
        "kl_ai_speech": "KL AI speech",
        "outside_observed": "outside observed",
        "label": "what",
    }
    how = (
        "Solid: templates held out, with their 95% interval. Dotted: the templates on which a strength may be"
        " chosen."
    )
    return Section(
        "sweep",
        "Turning the feature down",
        takeaway,
        plots.sweep_curve(run.tables["sweep"]),
        _table(run, "sweep", columns),
        how_to_read=how,
    )


def _beyond(run: Run, strength: Any) -> str:
    """Says so where the best strength lies outside the activations that the feature ever took."""
    frame = run.tables["sweep"]
    if "outside_observed" not in frame or not wording.is_number(strength):
        return ""
    cells = frame[(frame["kind"] == "candidate") & (frame["strength"] == strength)]
    return (
        "; this strength lies outside the activations observed"
        if cells["outside_observed"].fillna(False).astype(bool).any()
        else ""
    )


def _frontier(run: Run) -> Section:
    costs = run.part("costs")
    rows = pd.DataFrame(
        [{"text": wording.TEXT_KINDS.get(k, k), **v} for k, v in costs.items() if isinstance(v, Mapping)]
    )
    table = (
        _table(run, "sweep", {"text": "text", "kl_mean": "mean KL", "kl_p95": "95th percentile"}, rows)
        if len(rows)
        else None
    )
    takeaway = f"{wording.cost_sentence(costs)} An intervention is better the further up and left it stands."
    return Section("cost", "What it costs", takeaway, plots.frontier(run.tables["sweep"]), table)


def _controls(run: Run) -> Section:
    part, reduction = run.part("controls"), run.part("reduction").get("estimate")
    figure = plots.controls_histogram(run.tables["controls"], reduction, part.get("percentile95"))
    table = _table(run, "controls", {"control": "control", "kind": "kind", "reduction": "removed"})
    return Section(
        "controls", "Would any feature have done it?", wording.control_sentence(part), figure, table
    )


def _cumulative(run: Run) -> Section:
    frame = run.tables["cumulative"]
    split = "report" if "report" in set(frame["split"]) else frame["split"].iloc[0]
    rows = frame[frame["split"] == split].sort_values("k")
    parts = []
    for sae, part in rows.groupby(rows["sae"] if "sae" in rows else [""] * len(rows), sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        many = (
            f" and the best {int(last['k'])} together {wording.percent(last['reduction'])}"
            if len(part) > 1
            else ""
        )
        where = f" of {sae}" if sae else ""
        parts.append(
            f"the best feature{where} removes {wording.percent(first['reduction'])} of the bias{many}"
        )
    takeaway = f"On {split} templates, {'; '.join(parts)}."
    return Section(
        "together",
        "One feature, or a family?",
        takeaway,
        plots.cumulative_ablation(frame),
        _table(
            run,
            "cumulative",
            {"k": "features", "feature": "last added", "split": "split", "reduction": "removed"},
        ),
    )


def _ladder(run: Run) -> Section:
    takeaway = (
        "From what any edit at this place could do, through what the feature is needed for, to how its effect"
        " travels to the answer."
    )
    return Section(
        "ladder",
        "How the feature causes it",
        takeaway,
        plots.ladder(run.tables["ladder"]),
        _table(
            run,
            "ladder",
            {"rung": "rung", "value": "nats", "ci_low": "from", "ci_high": "to", "note": "meaning"},
        ),
    )


def _examples(run: Run) -> Section:
    frame = run.tables["examples"]
    nearer = int((frame["bias_after"].abs() < frame["bias_before"].abs()).sum())
    columns = {
        "human": "human prompt",
        "ai": "AI prompt",
        "before_human": "human, before",
        "before_ai": "AI, before",
        "after_human": "human, after",
        "after_ai": "AI, after",
        "bias_before": "bias before",
        "bias_after": "bias after",
    }
    takeaway = f"In {nearer} of {len(frame)} example pairs the bias is nearer to 0 after the intervention."
    return Section(
        "examples",
        "Example pairs, before and after",
        takeaway,
        plots.before_after(frame),
        _table(run, "examples", columns),
    )


def _generations(run: Run) -> Section:
    frame = run.tables["generations"].fillna({"unsteered": "", "steered": ""})
    sides = [
        Sides(str(r["prompt"]), *_changed(str(r["unsteered"]), str(r["steered"])))
        for r in frame.head(100).to_dict("records")
    ]
    same = int((frame["unsteered"] == frame["steered"]).sum())
    takeaway = (
        f"{len(frame) - same} of {len(frame)} continuations change under the intervention; changed words are"
        " underlined."
    )
    table = behavior_sections.text_table(run)
    return Section("generations", "What the model writes", takeaway, table=table, sides=sides)


def _comparison(run: Run) -> Section:
    frame = run.tables["comparison"]
    measured = int(frame["measured"].notna().sum())
    takeaway = (
        f"{measured} of {len(frame)} published figures were re-measured in this run; the others are marked"
        " “not re-measured here”."
    )
    columns = {
        "name": "figure",
        "published": "published",
        "measured": "measured",
        "ci_low": "from",
        "ci_high": "to",
        "verdict": "verdict",
    }
    return Section(
        "published",
        "Beside the published figures",
        takeaway,
        plots.comparison(frame),
        _table(run, "comparison", columns, missing="not re-measured here"),
    )


_SECTIONS: tuple[tuple[str, Callable[[Run], Section]], ...] = (
    ("pairs", _bias),
    ("pairs", _spread),
    ("words", _words),
    ("levels", _levels),
    ("ranking", _ranking),
    ("activation", _activation),
    ("rejected", _rejected),
    ("sweep", _sweep),
    ("sweep", _frontier),
    ("controls", _controls),
    ("cumulative", _cumulative),
    ("ladder", _ladder),
    ("examples", _examples),
    ("generations", _generations),
    ("scenario_categories", behavior_sections.scenario_section),
    ("roles", behavior_sections.role_section),
    ("judge_parts", behavior_sections.judge_section),
    ("comparison", _comparison),
)


def _changed(left: str, right: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts cut into words, those that differ marked."""
    a, b = re.findall(r"\s+|\S+", left), re.findall(r"\s+|\S+", right)
    blocks = difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes()
    lefts = [("".join(a[i:j]), tag != "equal") for tag, i, j, _, _ in blocks if j > i]
    return lefts, [("".join(b[i:j]), tag != "equal") for tag, _, _, i, j in blocks if j > i]
