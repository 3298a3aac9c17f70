"""The report's sections about the features: candidates, where the chosen one fires, how it causes the bias."""

import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.discovery.integrated import parts_sentence
from sae_bias.figures import features as figures
from sae_bias.figures.style import CALLS
from sae_bias.report.parts import short_names
from sae_bias.report.sections import FEATURE, Drawn, drawn
from sae_bias.runs.folder import Run


@drawn(
    FEATURE, "model_diff", "model-diff", "What another model sees differently",
    "feature; mean_positive: in the model; mean_negative: in the baseline; mean_diff: difference; auroc; t; p_fwer; q_bh: BH q; separates: differs",
)  # fmt: skip
def model_diff(run: Run, frame: pd.DataFrame) -> Drawn:
    """Features that fire differently in another model on the same texts."""
    other = (run.manifest.get("study") or {}).get("baseline", "the other model")
    n = int((frame["separates"] == "yes").sum())
    said = f"{n} of the {len(frame)} features shown fire differently here and in {other} on the same texts."
    return Drawn(f"{said} The SAE was trained on one of the two: read the gate's figures too.")


@drawn(
    FEATURE, "ranking", "features", "Every candidate feature",
    "feature; call: called; causal_ai_speech: causal; layer; interaction; auroc; mean_ai: mean, {1}; mean_human: mean, {0}; t; p_fwer; q_bh; "
    "attribution; integrated: integrated gradients; ablation; resampling; carrier; fire_ai: fires, {1}; fire_human: fires, {0}; dense; dead; "
    "reason: remark",
    how="Up: fires more for AI speech than other AI text, beyond what speech does for humans. Right: higher on {1} than on {0} prompts.",
    opened=True,
)  # fmt: skip
def ranking(run: Run, frame: pd.DataFrame) -> Drawn:
    calls, (first, second) = figures.calls_of(frame), run.sides
    called = {k: v[0] for k, v in CALLS.items()} | {"separates": f"separates {second} from {first}"}
    order = {key: place for place, key in enumerate(CALLS) if key not in ("separates", "no")}
    frame = frame.assign(call=calls.map(called), order=calls.map(order).fillna(len(order)), size=frame["interaction"].abs())  # fmt: skip
    frame = frame.sort_values(["order", "size"], ascending=[True, False], na_position="last")
    counts = calls.value_counts()
    dead = int(frame["dead"].fillna(False).astype(bool).sum()) if "dead" in frame else 0
    answers, separates, open_ = (int(counts.get(k, 0)) for k in ("ai_speech", "separates", "undetermined"))
    others = [k for k in ("silent", "judgement", "identity") if k in counts]
    more = "".join(f", {CALLS[k][0]} {counts[k]:,}" for k in others)
    said = (
        f"{len(frame):,} features: called AI-speech {answers:,}{more}, separating {second} from {first} {separates:,},"
        f" undetermined {open_:,}, never active {dead:,}. Telling {second} from {first} is easy, because the words"
        " differ; answering to speech is the harder test."
    )
    return Drawn(said, figures.ranking_figure(run.tables["ranking"], sides=run.sides), frame)


@drawn(
    FEATURE, "bias_parts", "parts", "Where the bias lies",
    "sae; layer; part; effect: nats; ci_low; ci_high; share_of_bias; share_low: share from; "
    "share_high: share to; integrated: integrated gradients; n_pairs; meaning",
    how="Features and error need not add up to the whole: each is exchanged alone. Integrated gradients do add up.", opened=True,
)  # fmt: skip
def bias_parts(run: Run, frame: pd.DataFrame) -> Drawn:
    """Where the bias lies: after the subject, in each SAE's features, in its error; and how well effects were predicted."""
    names = short_names(frame["sae"])
    said = "; ".join(f"{names[str(sae)]}: {parts_sentence(p)}" for sae, p in frame.groupby("sae", sort=False))
    foretold = [
        f"{row.exact} from {row.predictor}: Spearman ρ {fmt.number(row.rho)}, slope {fmt.number(row.slope)} {fmt.bracket(row.slope_low, row.slope_high)}, n = {row.n}"
        for row in (run.tables["predictions"].itertuples() if "predictions" in run.tables else ())
    ]
    more = f" How well exact effects were predicted: {'; '.join(foretold)}."
    return Drawn(f"{said}." + (more if foretold else ""))


@drawn(
    FEATURE,
    "activation",
    "activation",
    "Where the feature fires",
    "subject; statement; act; content; activation",
)
def activation(run: Run, frame: pd.DataFrame) -> Drawn:
    feature = run.summary.feature.id if run.summary.feature else None
    chosen = frame[frame["feature"] == (feature if feature in set(frame["feature"]) else frame["feature"].iloc[0])]  # fmt: skip
    mean = chosen.groupby(["group", "act"])["activation"].mean()
    cells = {
        ("ai", "speech"): "an AI speaks", ("ai", "nonspeech"): "an AI does something else", ("human", "speech"): "a human speaks",
        ("animal", "speech"): "an animal speaks", ("human", "harm"): "a human does harm",
    }  # fmt: skip
    said = "; ".join(f"{label} {fmt.number(mean[key])}" for key, label in cells.items() if key in mean)
    takeaway = f"Mean activation: {said}." if said else "Where the feature is active."
    return Drawn(takeaway, figures.activation_heatmap(frame, feature=feature), chosen)


@drawn(FEATURE, "rejected", "rejected", "Candidates that were rejected", "feature; reason", opened=True)
def rejected(run: Run, frame: pd.DataFrame) -> Drawn:
    return Drawn(f"{len(frame):,} candidates looked right at first and were set aside, for the reasons below.")  # fmt: skip


@drawn(
    FEATURE, "cumulative", "together", "One feature, or a family?", "k: features; feature: last added; split; reduction"
)  # fmt: skip
def cumulative(run: Run, frame: pd.DataFrame) -> Drawn:
    split = "report" if "report" in set(frame["split"]) else frame["split"].iloc[0]
    rows = frame[frame["split"] == split].sort_values("k")
    saes, parts = short_names(frame.get("sae", ())), []
    for sae, part in rows.groupby(rows["sae"] if "sae" in rows else [""] * len(rows), sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        many = f" and the best {int(last['k'])} together {fmt.percent(last['reduction'])}" if len(part) > 1 else ""  # fmt: skip
        where = f" of {saes[str(sae)]}" if sae else ""
        parts.append(f"the best feature{where} removes {fmt.percent(first['reduction'])} of the bias{many}")
    drawn = figures.cumulative_ablation(frame.replace({"sae": saes}) if saes else frame)
    return Drawn(f"On {split} templates, {'; '.join(parts)}.", drawn)


@drawn(
    FEATURE, "ladder", "ladder", "How the feature causes it",
    "rung: effect of; effect: nats; ci_low; ci_high; share_of_bias; share_of_ceiling: share of the upper bound; n_pairs; meaning",
    how="From what any edit at this place could do, through what the feature is needed for, to its path to the answer.", missing="–",
)  # fmt: skip
def ladder(run: Run, frame: pd.DataFrame) -> Drawn:
    share = frame.set_index("rung")["share_of_bias"]
    effects = {
        "ceiling": "any edit at this place could remove", "necessity": "ablating the feature removes",
        "sufficiency": "giving human prompts its AI value brings about", "direct": "of which it writes straight to the words",
    }  # fmt: skip
    parts = "; ".join(f"{name} {fmt.percent(share[key])}" for key, name in effects.items() if key in share)
    said = f"As shares of the bias: {parts}." if parts else "How the feature's effect travels to the answer."
    return Drawn(said, figures.ladder(frame, run.summary.ladder.bias if run.summary.ladder else None))


@drawn(
    FEATURE, "ceilings", "ceilings", "Where an edit could act at all",
    "layer; offset: tokens from the end; effect: nats; share_of_bias; n_pairs",
    how="Share of the bias that goes when an AI prompt is given its human twin's residual at one layer and position.", missing="after the subject",
)  # fmt: skip
def ceilings(run: Run, frame: pd.DataFrame) -> Drawn:
    """Where in the model the bias could be removed at all."""
    best = frame.sort_values("share_of_bias", ascending=False, kind="stable").iloc[0]
    place = "after the subject" if pd.isna(best["offset"]) else "at the last token" if best["offset"] == 0 else f"{int(best['offset'])} tokens before the last"  # fmt: skip
    share, layer = fmt.percent(best["share_of_bias"]), int(best["layer"])
    said = f"Putting the human residual into the AI prompt removes most at layer {layer}, {place}: {share}."
    return Drawn(said, figures.ceiling_figure(frame, run.summary.ladder.layer if run.summary.ladder else None))  # fmt: skip
