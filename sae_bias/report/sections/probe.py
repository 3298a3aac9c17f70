"""The report's sections about the probe: the bias, its spread, words and subjects, and the checks of it."""

import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.figures import probe as figures
from sae_bias.figures.style import SIDES
from sae_bias.report import words
from sae_bias.report.sections import BIAS, Drawn, drawn
from sae_bias.runs.folder import Run


@drawn(
    BIAS, "pairs", "bias", "The bias, template by template",
    "template; human: {0} prompt; ai: {1} prompt; split; score_human: {0} score; score_ai: {1} score; bias; control_bias: mundane bias",
    how="One row a template, averaged over its subjects; the line is its 95% interval, the band the interval of the overall mean.",
)  # fmt: skip
def bias(run: Run, frame: pd.DataFrame) -> Drawn:
    means, mean = frame.groupby("template")["bias"].mean(), run.summary.bias
    against = "the AI" if run.sides == SIDES else f"“{run.sides[1]}”"
    said = f"{int((means > 0).sum())} of {len(means)} templates lean against {against}."
    said += f" The overall mean is {fmt.number(mean.mean)} nats ({fmt.interval(mean)})." if mean else ""
    return Drawn(said, figures.bias_by_template(frame, mean.facts() if mean else {}, sides=run.sides))


@drawn(
    BIAS, "pairs", "spread", "Spread over pairs, and the mundane control",
    "measure; count: pairs; mean; std: SD; min: least; 50%: median; max: most",
)  # fmt: skip
def spread(run: Run, frame: pd.DataFrame) -> Drawn:
    s, said = run.summary, "How far the pairs lie apart; these pairs have no mundane twins."
    if s.control_bias:
        said = words.control_bias_sentence(s.control_bias, s.difference_in_differences, run.sides)
    columns = [c for c in ("bias", "control_bias") if c in frame]
    rows = frame[columns].describe().T.reset_index(names="measure")
    rows = rows.replace({"measure": {"control_bias": "bias with mundane content"}})
    return Drawn(said, figures.bias_distribution(frame, sides=run.sides), rows)


@drawn(BIAS, "words", "words", "The words that carry it", "word; side; diff: contribution")
def words_that_carry(run: Run, frame: pd.DataFrame) -> Drawn:
    if "contribution" in frame:  # `diff` is then human − AI of the word, whatever its side
        frame = frame.assign(diff=frame["contribution"])
    frame = frame.sort_values("diff", ascending=False)
    said = f"The three words that add most are {', '.join(f'“{w}”' for w in frame['word'].head(3))}."
    if excluded := (run.manifest.get("words") or {}).get("excluded"):
        said += f" Not read, as several tokens for this model or counted in a shorter word: {', '.join(map(str, excluded))}."
    return Drawn(said, figures.word_contributions(frame), frame)


@drawn(BIAS, "levels", "levels", "How every subject is judged", "subject; kind: side; score; ci_low; ci_high")
def levels(run: Run, frame: pd.DataFrame) -> Drawn:
    mean, (first, second) = frame.groupby("kind")["score"].mean(), run.sides
    kinds = {"human": first, "ai": second, "neutral": "neutral"}
    said = ", ".join(f"{name} subjects {fmt.number(mean[k])}" for k, name in kinds.items() if k in mean)
    return Drawn(
        f"Mean score in nats: {said}. Neutral subjects show how much is a penalty for {second} and how much a bonus for {first}.",
        figures.levels(frame, sides=run.sides), frame.replace({"kind": kinds}),
    )  # fmt: skip


@drawn(
    BIAS, "checks", "checks", "How sure: the same question asked in other ways", "check; value; ci_low; ci_high; p_value; says: remark",
    how="Each row is one check with its 95% interval; checks without an interval stand in the table.", missing="–",
)  # fmt: skip
def checks(run: Run, frame: pd.DataFrame) -> Drawn:
    """The figure under every check of docs/method.md#sensitivity-analyses."""
    known = frame.dropna(subset=["ci_low", "ci_high"])
    same = known["check"].str.match(r"stem |bootstrap|adjusted|difference in differences|forced choice")  # not its parts  # fmt: skip
    others = known[same & (known.index != known.index[0])] if len(known) else known
    holds = int(((others["ci_low"] > 0) | (others["ci_high"] < 0)).sum())
    said = (
        f"In {holds} of {len(others)} other ways of measuring it the interval excludes 0: with resampled words, under other stems,"
        " with nuisances held equal, as a forced choice."
    )
    return Drawn(said, figures.checks(frame, sides=run.sides))


@drawn(
    BIAS, "check_multiverse", "specifications", "Every defensible choice",
    "stem; score; words; left_out; estimate; ci_low; ci_high; null_low: random words from; null_high: to ; null_p: p against random words",
    how="Each point is one specification with its 95% interval; the gray band is what random words give under the same one.",
    missing="–",
)  # fmt: skip
def multiverse(run: Run, frame: pd.DataFrame) -> Drawn:
    """The primary figure under every choice of stem, score, half of the words and subject left out."""
    curve, median = run.summary.multiverse, fmt.number(frame["estimate"].median())
    said = f"{len(frame)} specifications; their median is {median} nats."
    if curve is not None:
        same, outside = fmt.percent(curve.same_sign), fmt.percent(curve.outside_null)
        said += f" {same} have the headline's sign; {outside} lie beyond 95% of random word lists."
    return Drawn(said, figures.specification_curve(frame, (curve.of if curve else None) or "figure"))


@drawn(
    BIAS, "check_variance", "variance", "Where the spread comes from", "source; levels; df; variance; share"
)
def variance(run: Run, frame: pd.DataFrame) -> Drawn:
    """How much of the spread lies between templates, entities, stems and words."""
    most = frame.sort_values("share", ascending=False).iloc[0]
    said = f"The largest part of the spread, {fmt.percent(most['share'])}, is of {most['source']}."
    return Drawn(said, figures.variance_shares(frame))


@drawn(
    BIAS, "check_choices", "forced-choice", "Asked as a forced choice",
    "stem: question; options; polarity: asks; estimate; ci_low; ci_high; p_value; mass: mass of the options",
)  # fmt: skip
def choices(run: Run, frame: pd.DataFrame) -> Drawn:
    """The forced choice, wording by wording."""
    said = f"The options hold {fmt.percent(frame['mass'].mean())} of the next-token probability."
    if found := run.summary.forced_choice:
        agrees = "the same sign as" if found.agrees else "the opposite sign of"
        said = f"{fmt.number(found.mean)} nats ({fmt.interval(found)}), {agrees} the probe. {said}"
    rows = frame.rename(columns={"estimate": "value", "stem": "check"}).assign(says=frame["options"])
    return Drawn(said, figures.checks(rows, sides=run.sides))


@drawn(
    BIAS, "check_words_left_out", "words-left-out", "Does it hang on one word?",
    "word: without; side; primary; primary_low: from; primary_high: to; primary_p: p; change; bias",
)  # fmt: skip
def words_left_out(run: Run, frame: pd.DataFrame) -> Drawn:
    """The primary figure without each word; the bias, where an older run left words out of that."""
    if "of" not in frame:
        names = {
            "bias": "primary",
            "ci_low": "primary_low",
            "ci_high": "primary_high",
            "p_value": "primary_p",
        }
        frame = frame.rename(columns=names).assign(of="bias")
    of, known, said = str(frame["of"].iloc[0]), frame.dropna(subset=["primary"]), "No word can be left out: each side has one."  # fmt: skip
    if len(known):
        said = (
            f"Without any one word the {of} stays between {known['primary'].min():.3f} and {known['primary'].max():.3f} nats;"
            f" “{known['word'].iloc[0]}” moves it most, by {abs(known['change'].iloc[0]):.3f}."
        )
    whole = run.summary.bias if of == "bias" else run.summary.difference_in_differences
    figure = figures.words_left_out(frame, of, whole.mean if whole else None)
    rows = frame.drop(columns="bias", errors="ignore") if of == "bias" else frame
    return Drawn(said, figure, rows, {"primary": of})


@drawn(
    BIAS, "check_scores", "scores", "Other scores of the same words",
    "score; words; n_words: number; softcap; primary: difference in differences; primary_low: from; primary_high: to; bias; ci_low; ci_high; p_value; "
    "d_z: d_z of the bias; share_templates_positive", opened=True,
)  # fmt: skip
def scores(run: Run, frame: pd.DataFrame) -> Drawn:
    said = (
        "Mean logit weighs every word alike; log-odds compares the odds of the whole sets, so that a few frequent"
        " words dominate; AUROC is a probability and not in nats."
    )
    names = {"mean_logit": "mean logit", "logodds": "log-odds", "auroc": "AUROC"}
    if run.summary.difference_in_differences is None:
        frame = frame.drop(columns=["primary", "primary_low", "primary_high"], errors="ignore")
    return Drawn(said, rows=frame.replace({"score": names}))


@drawn(
    BIAS, "check_nuisances", "nuisances", "What else differs within a pair",
    "nuisance; human: {0}; ai: {1}; difference; correlation; of: with the; adjusted_for: held equal", opened=True,
)  # fmt: skip
def nuisances(run: Run, frame: pd.DataFrame) -> Drawn:
    of = str(frame["of"].iloc[0]) if "of" in frame else "bias"
    said = f"Means over the prompts of each side; the check “adjusted for nuisances” gives the {of} with these held equal."
    names = {"subject_tokens": "length of the subject, tokens", "an": "“an” before the subject", "log_likelihood": "log-likelihood of the prompt"}  # fmt: skip
    return Drawn(said, rows=frame.replace({"nuisance": names}))


AUDIT = (
    "word; side; tokens; n_tokens: pieces; read; reason: left out because; alone: encoded alone; trap: prefix trap"
)  # fmt: skip


@drawn(BIAS, "word_audit", "audit", "How the words are read", AUDIT)
@drawn(BIAS, "check_audit", "audit", "How the words are read", AUDIT)
def audit(run: Run, frame: pd.DataFrame) -> Drawn:
    """How this model's tokenizer reads every evaluation word: of a run's checks, or of `sae-bias probe --audit-words`."""
    read, trap = int(frame["read"].sum()), int(frame["trap"].sum())
    more = f" {trap} would begin with another token if encoded alone, so they are read in context."
    return Drawn(f"{read} of {len(frame)} words are read." + (more if trap else ""))
