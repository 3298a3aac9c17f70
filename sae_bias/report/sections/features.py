"""The report's sections about the features: candidates, where the chosen one fires, how it causes the bias."""

import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.core.labels import columns_of
from sae_bias.discovery.integrated import parts_sentence
from sae_bias.figures import features as features_figures
from sae_bias.figures import style as style_figures
from sae_bias.figures.features import ceiling_figure
from sae_bias.report import words
from sae_bias.report.parts import Section, run_table
from sae_bias.report.sections import FEATURE, section
from sae_bias.runs.folder import Run


@section(FEATURE, table="ranking")
def ranking_section(run: Run) -> Section:
    calls, (first, second) = features_figures.calls_of(run.tables["ranking"]), run.sides
    called = {k: v[0] for k, v in style_figures.CALLS.items()} | {
        "separates": f"separates {second} from {first}"
    }
    order = {key: place for place, key in enumerate(style_figures.CALLS) if key not in ("separates", "no")}
    frame = run.tables["ranking"].assign(call=calls.map(called), order=calls.map(order).fillna(len(order)))
    frame = frame.assign(size=frame["interaction"].abs()).sort_values(["order", "size"], ascending=[True, False], na_position="last")  # fmt: skip
    counts = calls.value_counts()
    dead = int(frame["dead"].fillna(False).astype(bool).sum()) if "dead" in frame else 0
    answers, separates, open_ = (int(counts.get(k, 0)) for k in ("ai_speech", "separates", "undetermined"))
    more = "".join(
        f", {style_figures.CALLS[k][0]} {counts[k]:,}"
        for k in ("silent", "judgement", "identity")
        if k in counts
    )
    takeaway = (
        f"{len(frame):,} features: called AI-speech {answers:,}{more}, separating {second} from {first} {separates:,},"
        f" undetermined {open_:,}, never active {dead:,}. Telling {second} from {first} is easy, because the words"
        " differ; answering to speech is the harder test."
    )
    columns = {
        "feature": "feature",
        "call": "called",
        "causal_ai_speech": "causal",
        "layer": "layer",
        "interaction": "interaction",
        "auroc": "AUROC",
        "mean_ai": f"mean, {second}",
        "mean_human": f"mean, {first}",
        "t": "t",
        "p_fwer": "family-wise p",
        "q_bh": "q",
        "attribution": "attribution",
        "integrated": "integrated gradients",
        "ablation": "ablation",
        "resampling": "resampling",
        "carrier": "carrier",
        "fire_ai": f"fires, {second}",
        "fire_human": f"fires, {first}",
        "dense": "dense",
        "dead": "dead",
        "reason": "remark",
    }
    how = (
        "Up: fires more for AI speech than other AI text, beyond what speech does for humans. Right: higher"
        f" on {second} than on {first} prompts."
    )
    return Section(
        "features",
        "Every candidate feature",
        takeaway,
        features_figures.ranked_features(frame, sides=run.sides),
        run_table(run, "ranking", columns, frame),
        open_table=True,
        how_to_read=how,
    )


@section(FEATURE, table="bias_parts")
def bias_parts_section(run: Run) -> Section:
    """Where the bias lies: after the subject, in each SAE's features, in its error; and how well effects were predicted."""
    frame = run.tables["bias_parts"]
    names = words.short_names([str(s) for s in dict.fromkeys(frame["sae"])])
    said = [f"{names[str(sae)]}: {parts_sentence(part)}" for sae, part in frame.groupby("sae", sort=False)]
    foretold = [
        f"{row.exact} from {row.predictor}: Spearman ρ {fmt.number(row.rho)}, slope {fmt.number(row.slope)} {fmt.bracket(row.slope_low, row.slope_high)}, n = {row.n}"
        for row in (run.tables["predictions"].itertuples() if "predictions" in run.tables else ())
    ]
    columns = columns_of(
        "sae; layer; part; effect: nats; ci_low; ci_high; share_of_bias; share_low: share from; "
        "share_high: share to; integrated: integrated gradients; n_pairs; meaning"
    )
    return Section(
        "parts",
        "Where the bias lies",
        f"{'; '.join(said)}." + (f" How well exact effects were predicted: {'; '.join(foretold)}." if foretold else ""),
        table=run_table(run, "bias_parts", columns, missing="undefined"),
        open_table=True,
        how_to_read="Features and error need not add up to the whole: each is exchanged alone. Integrated gradients do add up.",
    )  # fmt: skip


@section(FEATURE, table="activation")
def activation_section(run: Run) -> Section:
    frame = run.tables["activation"]
    feature = run.summary.feature.id if run.summary.feature else None
    chosen = (
        frame[frame["feature"] == feature]
        if feature in set(frame["feature"])
        else frame[frame["feature"] == frame["feature"].iloc[0]]
    )
    mean = chosen.groupby(["group", "act"])["activation"].mean()
    said = [
        f"{label} {fmt.number(mean[key])}"
        for key, label in (
            (("ai", "speech"), "an AI speaks"),
            (("ai", "nonspeech"), "an AI does something else"),
            (("human", "speech"), "a human speaks"),
            (("animal", "speech"), "an animal speaks"),
            (("human", "harm"), "a human does harm"),
        )
        if key in mean
    ]
    columns = columns_of("subject; statement; act; content; activation")
    takeaway = f"Mean activation: {'; '.join(said)}." if said else "Where the feature is active."
    return Section(
        "activation",
        "Where the feature fires",
        takeaway,
        features_figures.activation_heatmap(frame, feature=feature),
        run_table(run, "activation", columns, chosen),
    )


@section(FEATURE, table="rejected")
def rejected_section(run: Run) -> Section:
    frame = run.tables["rejected"]
    return Section(
        "rejected",
        "Candidates that were rejected",
        f"{len(frame):,} candidates looked right at first and were set aside, for the reasons below.",
        table=run_table(run, "rejected", {"feature": "feature", "reason": "reason"}),
        open_table=True,
    )


@section(FEATURE, table="cumulative")
def cumulative_section(run: Run) -> Section:
    frame = run.tables["cumulative"]
    split = "report" if "report" in set(frame["split"]) else frame["split"].iloc[0]
    rows = frame[frame["split"] == split].sort_values("k")
    parts = []
    saes = words.short_names([str(s) for s in dict.fromkeys(frame["sae"])] if "sae" in frame else [])
    for sae, part in rows.groupby(rows["sae"] if "sae" in rows else [""] * len(rows), sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        many = (
            f" and the best {int(last['k'])} together {fmt.percent(last['reduction'])}"
            if len(part) > 1
            else ""
        )
        where = f" of {saes[str(sae)]}" if sae else ""
        parts.append(f"the best feature{where} removes {fmt.percent(first['reduction'])} of the bias{many}")
    takeaway = f"On {split} templates, {'; '.join(parts)}."
    return Section(
        "together",
        "One feature, or a family?",
        takeaway,
        features_figures.cumulative_ablation(frame.replace({"sae": saes}) if saes else frame),
        run_table(
            run,
            "cumulative",
            columns_of("k: features; feature: last added; split; reduction"),
        ),
    )


@section(FEATURE, table="ladder")
def ladder_section(run: Run) -> Section:
    frame = run.tables["ladder"]
    rung = frame.set_index("rung")
    said = [
        f"{name} {fmt.percent(rung.at[key, 'share_of_bias'])}"
        for key, name in (
            ("ceiling", "any edit at this place could remove"),
            ("necessity", "ablating the feature removes"),
            ("sufficiency", "giving human prompts its AI value brings about"),
            ("direct", "of which it writes straight to the words"),
        )
        if key in rung.index
    ]
    columns = columns_of(
        "rung: effect of; effect: nats; ci_low; ci_high; share_of_bias; "
        "share_of_ceiling: share of the upper bound; n_pairs; meaning"
    )
    return Section(
        "ladder",
        "How the feature causes it",
        f"As shares of the bias: {'; '.join(said)}."
        if said
        else "How the feature's effect travels to the answer.",
        features_figures.ladder(frame, run.summary.ladder.bias if run.summary.ladder else None),
        run_table(run, "ladder", columns, missing="–"),
        how_to_read="From what any edit at this place could do, through what the feature is needed for, to its path to the answer.",
    )


@section(FEATURE, table="ceilings")
def ceilings_section(run: Run) -> Section:
    """Where in the model the bias could be removed at all."""
    frame = run.tables["ceilings"]
    best = frame.sort_values("share_of_bias", ascending=False, kind="stable").iloc[0]
    place = "after the subject" if pd.isna(best["offset"]) else "at the last token" if best["offset"] == 0 else f"{int(best['offset'])} tokens before the last"  # fmt: skip
    columns = columns_of("layer; offset: tokens from the end; effect: nats; share_of_bias; n_pairs")
    return Section(
        "ceilings",
        "Where an edit could act at all",
        f"Putting the human residual into the AI prompt removes most at layer {int(best['layer'])}, {place}:"
        f" {fmt.percent(best['share_of_bias'])}.",
        ceiling_figure(frame, run.summary.ladder.layer if run.summary.ladder else None),
        run_table(run, "ceilings", columns, missing="after the subject"),
        how_to_read="Share of the bias that goes when an AI prompt is given its human twin's residual at one layer and position.",
    )
