"""The report's sections about the probe: the bias, its spread, words and subjects, and the checks of it."""

from sae_bias.core import text as fmt
from sae_bias.core.labels import columns_of
from sae_bias.figures import probe as probe_figures
from sae_bias.figures.style import SIDES
from sae_bias.report import words
from sae_bias.report.parts import Section, run_table
from sae_bias.report.sections import BIAS, section
from sae_bias.runs.folder import Run


@section(BIAS, table="pairs")
def bias_section(run: Run) -> Section:
    pairs, bias = run.tables["pairs"], run.summary.bias
    means = pairs.groupby("template")["bias"].mean()
    first, second = run.sides
    against = "the AI" if run.sides == SIDES else f"“{second}”"
    share = f"{int((means > 0).sum())} of {len(means)} templates lean against {against}."
    takeaway = (
        f"{share} The overall mean is {fmt.number(bias.mean)} nats ({fmt.interval(bias)})." if bias else share
    )
    columns = {
        "template": "template",
        "human": f"{first} prompt",
        "ai": f"{second} prompt",
        "split": "split",
        "score_human": f"{first} score",
        "score_ai": f"{second} score",
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
        probe_figures.bias_by_template(pairs, {} if bias is None else bias.facts(), sides=run.sides),
        run_table(run, "pairs", columns),
        how_to_read=how,
    )


@section(BIAS, table="pairs")
def spread_section(run: Run) -> Section:
    pairs = run.tables["pairs"]
    takeaway = (
        words.control_bias_sentence(
            run.summary.control_bias, run.summary.difference_in_differences, run.sides
        )
        if run.summary.control_bias
        else "How far the pairs lie apart; these pairs have no mundane twins."
    )
    names = {"bias": "bias", "control_bias": "bias with mundane content"}
    rows = (
        pairs[[c for c in ("bias", "control_bias") if c in pairs]]
        .describe()
        .T.reset_index(names="measure")
        .replace({"measure": names})
    )
    table = run_table(
        run,
        "pairs",
        columns_of("measure; count: pairs; mean; std: SD; min: least; 50%: median; max: most"),
        rows,
    )
    return Section(
        "spread",
        "Spread over pairs, and the mundane control",
        takeaway,
        probe_figures.bias_distribution(pairs, sides=run.sides),
        table,
    )


@section(BIAS, table="words")
def words_section(run: Run) -> Section:
    words = run.tables["words"]
    if "contribution" in words:  # `diff` is then human − AI of the word, whatever its side
        words = words.assign(diff=words["contribution"])
    words = words.sort_values("diff", ascending=False)
    top = ", ".join(f"“{w}”" for w in words["word"].head(3))
    excluded = (run.manifest.get("words") or {}).get("excluded") or []
    note = (
        f" Left out because they are several tokens for this model: {', '.join(map(str, excluded))}."
        if excluded
        else ""
    )
    table = run_table(run, "words", {"word": "word", "side": "side", "diff": "contribution"}, words)
    return Section(
        "words",
        "The words that carry it",
        f"The three words that add most are {top}.{note}",
        probe_figures.word_contributions(words),
        table,
    )


@section(BIAS, table="levels")
def levels_section(run: Run) -> Section:
    frame = run.tables["levels"]
    mean, (first, second) = frame.groupby("kind")["score"].mean(), run.sides
    said = [
        f"{name} {fmt.number(mean[k])}"
        for k, name in (
            ("human", f"{first} subjects"),
            ("ai", f"{second} subjects"),
            ("neutral", "neutral subjects"),
        )
        if k in mean
    ]
    takeaway = (
        f"Mean score in nats: {', '.join(said)}. "
        f"Neutral subjects show how much is a penalty for {second} and how much a bonus for"
        f" {first}."
    )
    table = run_table(
        run,
        "levels",
        columns_of("subject; kind: side; score; ci_low; ci_high"),
        frame.replace({"kind": {"human": first, "ai": second}}),
    )
    return Section(
        "levels", "How every subject is judged", takeaway, probe_figures.levels(frame, sides=run.sides), table
    )


@section(BIAS, table="checks")
def checks_section(run: Run) -> Section:
    """The figure under every check of docs/method.md#sensitivity-analyses."""
    frame = run.tables["checks"]
    known = frame.dropna(subset=["ci_low", "ci_high"])
    same = known["check"].str.match(
        r"stem |bootstrap|adjusted|difference in differences|forced choice"
    )  # not its parts
    others = known[same & (known.index != known.index[0])] if len(known) else known
    holds = int(((others["ci_low"] > 0) | (others["ci_high"] < 0)).sum())
    takeaway = (
        f"In {holds} of {len(others)} other ways of measuring it the interval excludes 0: with resampled words, under other stems,"
        " with nuisances held equal, as a forced choice."
    )
    columns = columns_of("check; value; ci_low; ci_high; p_value; says: remark")
    return Section(
        "checks",
        "How sure: the same question asked in other ways",
        takeaway,
        probe_figures.checks(frame, sides=run.sides),
        run_table(run, "checks", columns, missing="–"),
        how_to_read="Each row is one check with its 95% interval; checks without an interval stand in the table.",
    )


@section(BIAS, table="check_multiverse")
def multiverse_section(run: Run) -> Section:
    """The primary figure under every choice of stem, score, half of the words and subject left out."""
    frame, curve = run.tables["check_multiverse"], run.summary.multiverse
    takeaway = f"{len(frame)} specifications; their median is {fmt.number(frame['estimate'].median())} nats."
    if curve is not None:
        takeaway += f" {fmt.percent(curve.same_sign)} have the headline's sign; {fmt.percent(curve.outside_null)} lie beyond 95% of random word lists."
    columns = {
        "stem": "stem", "score": "score", "words": "words", "left_out": "left out", "estimate": "estimate", "ci_low": "from",
        "ci_high": "to", "null_low": "random words from", "null_high": "to ", "null_p": "p against random words",
    }  # fmt: skip
    return Section(
        "specifications",
        "Every defensible choice",
        takeaway,
        probe_figures.specification_curve(frame, (curve.of if curve else None) or "figure"),
        run_table(run, "check_multiverse", columns, missing="–"),
        how_to_read="Each point is one specification with its 95% interval; the gray band is what random words give under the same one.",
    )


@section(BIAS, table="check_variance")
def variance_section(run: Run) -> Section:
    """How much of the spread lies between templates, entities, stems and words."""
    frame = run.tables["check_variance"]
    most = frame.sort_values("share", ascending=False).iloc[0]
    takeaway = f"The largest part of the spread, {fmt.percent(most['share'])}, is of {most['source']}."
    columns = columns_of("source; levels; df; variance; share")
    return Section(
        "variance",
        "Where the spread comes from",
        takeaway,
        probe_figures.variance_shares(frame),
        run_table(run, "check_variance", columns),
    )


@section(BIAS, table="check_choices")
def choices_section(run: Run) -> Section:
    """The forced choice, wording by wording."""
    frame, found = run.tables["check_choices"], run.summary.forced_choice
    takeaway = f"The options hold {fmt.percent(frame['mass'].mean())} of the next-token probability."
    if found is not None:
        agrees = "the same sign as" if found.agrees else "the opposite sign of"
        takeaway = f"{fmt.number(found.mean)} nats ({fmt.interval(found)}), {agrees} the probe. {takeaway}"
    columns = columns_of(
        "stem: question; options; polarity: asks; estimate; ci_low; ci_high; p_value; "
        "mass: mass of the options"
    )
    rows = frame.rename(columns={"estimate": "value", "stem": "check"}).assign(says=frame["options"])
    return Section(
        "forced-choice",
        "Asked as a forced choice",
        takeaway,
        probe_figures.checks(rows, sides=run.sides),
        run_table(run, "check_choices", columns),
    )


@section(BIAS, table="check_words_left_out")
def words_left_out_section(run: Run) -> Section:
    """Whether a single word makes the figure."""
    frame = run.tables["check_words_left_out"]
    bias = run.summary.bias.mean if run.summary.bias else None
    known = frame.dropna(subset=["bias"])
    takeaway = (
        f"Without any one word the bias stays between {known['bias'].min():.3f} and {known['bias'].max():.3f} nats;"
        f" “{known['word'].iloc[0]}” moves it most, by {abs(known['change'].iloc[0]):.3f}."
        if len(known)
        else "No word can be left out: each side has one."
    )
    columns = columns_of("word: without; side; bias; ci_low; ci_high; p_value; change")
    return Section(
        "words-left-out",
        "Does it hang on one word?",
        takeaway,
        probe_figures.words_left_out(frame, bias),
        run_table(run, "check_words_left_out", columns),
    )


@section(BIAS, table="check_scores")
def scores_section(run: Run) -> Section:
    """Every way to make a score of the words."""
    columns = columns_of(
        "score; words; n_words: number; softcap; bias; ci_low; ci_high; p_value; d_z; "
        "share_templates_positive"
    )
    names = {"score": {"mean_logit": "mean logit", "logodds": "log-odds", "auroc": "AUROC"}}
    return Section(
        "scores",
        "Other scores of the same words",
        "Mean logit weighs every word alike; log-odds compares the odds of the whole sets, so that a few frequent"
        " words dominate; AUROC is a probability and not in nats.",
        table=run_table(run, "check_scores", columns, run.tables["check_scores"].replace(names)),
        open_table=True,
    )


@section(BIAS, table="check_nuisances")
def nuisances_section(run: Run) -> Section:
    """What else differs between the two prompts of a pair."""
    first, second = run.sides
    columns = {
        "nuisance": "nuisance", "human": first, "ai": second, "difference": "difference",
        "correlation": "correlation with the bias", "adjusted_for": "held equal",
    }  # fmt: skip
    names = {"subject_tokens": "length of the subject, tokens", "an": "“an” before the subject", "log_likelihood": "log-likelihood of the prompt"}  # fmt: skip
    frame = run.tables["check_nuisances"].replace({"nuisance": names})
    return Section(
        "nuisances",
        "What else differs within a pair",
        "Means over the prompts of each side; the check “adjusted for nuisances” gives the bias with these held equal.",
        table=run_table(run, "check_nuisances", columns, frame),
        open_table=True,
    )


@section(BIAS, table="check_audit")
def audit_section(run: Run) -> Section:
    """How this model's tokenizer reads every evaluation word."""
    return _audit(run, "check_audit")


def _audit(run: Run, name: str) -> Section:
    frame = run.tables[name]
    read, trap = int(frame["read"].sum()), int(frame["trap"].sum())
    takeaway = f"{read} of {len(frame)} words are read." + (
        f" {trap} would begin with another token if encoded alone, so they are read in context."
        if trap
        else ""
    )
    columns = columns_of(
        "word; side; tokens; n_tokens: pieces; read; reason: left out because; alone: encoded alone; "
        "trap: prefix trap"
    )
    return Section("audit", "How the words are read", takeaway, table=run_table(run, name, columns))


@section(BIAS, table="word_audit")
def word_audit_section(run: Run) -> Section:
    """The audit that `sae-bias probe --audit-words` wrote."""
    return _audit(run, "word_audit")
