"""`sae-bias rank`: which features tell AI from human prompts, answer to AI speech, or carry the bias."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sae_bias.cli.context import FROM_MODEL, Run, command, picked, rows
from sae_bias.core.errors import RequestError
from sae_bias.core.labels import columns_of

if TYPE_CHECKING:
    import pandas as pd


CONTRAST = columns_of(
    "feature; auroc; auroc_held_out: AUROC held out; mean_diff: positive - negative; t; p_fwer; q_bh: BH q; separates; "
    "fire_positive: fires, positive; fire_negative: fires, negative; density"
)
COLUMNS = columns_of(
    "feature; auroc; mean_diff: AI - human; interaction; sign; attribution: attributed; "
    "integrated: integrated gradients; ablation: ablated; resampling: resampled; carrier; t; p_fwer; "
    "separates; call: called; held_AS: AI speech; held_HC: badly judged; causal_ai_speech: causal; "
    "survives_loo: one left out; family_size: family; fire_ai: fires, AI; fire_human: fires, human; "
    "density"
)
PARTS = columns_of("sae; layer; part; effect: nats; ci_low; ci_high; share_of_bias: share; share_low: from; share_high: to; integrated: integrated gradients")  # fmt: skip
FORETOLD = columns_of("predictor: predicted by; exact: exact effect; rho: Spearman ρ; slope; slope_low: from; slope_high: to; n: features")  # fmt: skip
JOINT = columns_of("k: first k; feature: with; bias: left; reduction: removed; red_low: low; red_high: high")


@command(
    "rank",
    "sae-bias rank organism:planted organism:planted/constructed --by interaction",
    "sae-bias rank organism:planted organism:planted/resid_post/layer_2_width_512_l0_small --by attribution --top 5",
    takes=(*FROM_MODEL, "grid", "pairs", "words", "split", "randomized_sae"),
)
def rank(
    run: Run,
    sae: list[str],
    by: str | None = None,
    top: Annotated[int, {"min": 1}] = 10,
    exact: Annotated[int | None, {"min": 1}] = None,
    effects_of: str = "primary",
    controls: Annotated[int, {"min": 0}] = 0,
    max_view: bool = False,
    positive: Path | None = None,
    negative: Path | None = None,
    contrast: str | None = None,
    reduce: str = "last",
    chat: bool = False,
    all_of: list[str] | None = None,
    none_of: list[str] | None = None,
    neuronpedia: Path | None = None,
    workers: Annotated[int | None, {"min": 1}] = None,
) -> None:
    """Rank every feature of one or several SAEs.

    By default by interaction with effects: whether a feature answers to AI speech more than AI and speech alone explain (|I| on the
    matched grid), beside what it does to the bias. separation: how well it tells AI from human prompts (easy, because the words differ).
    attribution: the bias its ablation should remove, from one backward pass. ablation: the bias it does remove. Pairs are read on
    discover templates, the rest is held out; p is corrected over every feature scanned; too small a design reads "undetermined".

    Args:
        SAE...: RELEASE/SAE_ID, a local SAE folder, or a folder of them; several are one family.
        --by: separation, interaction, attribution or ablation; by default interaction with effects, or separation where --pairs comes without --grid.
        --top: How many features to print.
        --exact: How many features are ablated and resampled exactly: 64 by ablation, those printed by default.
        --effects-of: What effects are of: primary (the difference in differences where the pairs have mundane twins), or the bias.
        --controls: With --by ablation: number of controls for the causality test (e.g. 99; off by default).
        --max-view: Also show the maximum over ordinary tokens; in no test.
        --positive FILE: Texts that show something, one a line; with --negative: rank by AUROC of the one over the other.
        --negative FILE: Texts that do not.
        --contrast FILE: Both in one .jsonl or .csv file (fields text, label, optional group), or hub:OWNER/NAME.
        --reduce: What a text's tokens give, for a contrast: last, mean, max or any.
        --chat: Texts of a contrast as user turns of the chat template.
        --all-of SET: Keep features that fire on every text of: positive, negative or a group.
        --none-of SET: Keep features that fire on no text of: positive, negative or a group.
        --neuronpedia FILE: Write the features printed as a Neuronpedia list (JSON); those without a public page are left out.
        --workers: Processes for exact effects and the sweep's cells: on this machine's CPU they share one copy of the weights, a thread each.
    """
    from sae_bias.discovery.ranking import BY, rank_features
    from sae_bias.report.parts import short_names
    from sae_bias.saes.load import expand_saes
    from sae_bias.steering.controls import randomized_control
    from sae_bias.workflows.contrast_study import ranking_table

    texts = _contrast(positive, negative, contrast)
    at_hand = run.given["grid"] is not None or run.given["pairs"] is None
    effects = by is None and texts is None and at_hand
    others = {"--exact": exact, "--grid": run.given["grid"], "--pairs": None if run.given["randomized_sae"] else run.given["pairs"]}  # fmt: skip
    if texts is not None and (given := [name for name, value in others.items() if value is not None]):
        raise RequestError(f"{', '.join(given)}: not for a contrast, whose features are ranked by AUROC.")
    by = by or ("interaction" if effects else "separation")
    if by not in BY:
        raise RequestError(f"--by {by!r}: expected one of {', '.join(BY)}.")
    on_grid = by == "interaction"
    prompts: Any = texts or (run.grid if on_grid else run.pairs)
    with_pairs = not texts and (effects or not on_grid)
    probe, split = (run.probe, run.split) if with_pairs else (None, None)
    with_grid = not texts and not on_grid and (run.given["grid"] is not None or controls)
    other: dict[str, Any] = {"grid": run.grid} if with_grid else {"pairs": run.pairs} if effects else {}
    model = run.open(*expand_saes(sae))
    search = partial(
        rank_features, model, prompts=prompts, reduce=reduce, chat=chat, all_of=tuple(all_of or ()), none_of=tuple(none_of or ()),
        by=by, probe=probe, **other, split=split, effects=effects, effects_of=effects_of, top_k=exact or (top if effects else 64), controls=controls, max_view=max_view,
        seed=run.seed, workers=workers or 1, progress=run.progress,
    )  # fmt: skip
    ranking = search(run.saes)
    used = {} if texts else {"grid" if on_grid else "pairs": prompts, **other, "split": split}
    tables = {"ranking": ranking_table(ranking.to_frame())}
    tables |= {} if ranking.cumulative is None else {"cumulative": ranking.cumulative}
    tables |= {"harm_pairs": ranking.pairing} if len(ranking.pairing) else {}
    tables |= {name: t for name, t in (("bias_parts", ranking.parts), ("predictions", ranking.predictions)) if len(t)}  # fmt: skip
    twins = [randomized_control(model, s, run.pairs, run.seed) for s in run.saes if run.given["randomized_sae"]]  # fmt: skip
    lucky = search(twins).to_frame() if twins else None
    tables |= {} if lucky is None else {"ranking_randomized": ranking_table(lucky)}
    run.save(tables, **used, by=ranking.by)
    first = ranking.to_frame().head(top)
    best = f"first: {first['feature'].iloc[0]}" if len(first) else "none is left"
    run.say(
        f"{len(ranking.to_frame()):,} features by {ranking.by}, {ranking.n_units} {ranking.units}; {best}"
    )
    if split:
        run.say(
            f"ranked on {len(split['discover'])} discover templates; {len(split['tune'])} tune and {len(split['report'])} report templates were held out"
        )
    if ranking.note:
        run.say(ranking.note)
    run.note_gate()
    one = f" of {run.saes[0].id}" if len(run.saes) == 1 else ""
    short = [f"#{i}" for i in first["index"]] if one else first["feature"]
    run.table(f"The first {len(first)}{one}", first.assign(feature=short), CONTRAST if texts else COLUMNS)
    if neuronpedia is not None:
        run.say(_write_list(neuronpedia, list(first["feature"])))
    if lucky is not None:
        run.say(
            f"the same search in a randomized SAE: {_yield_of(lucky)}; here: {_yield_of(ranking.to_frame())}"
        )
        run.table("Its first 3", lucky.head(3), CONTRAST if texts else COLUMNS)
    if ranking.cumulative is not None:
        run.table("Ablated together", ranking.cumulative, JOINT)
    parts = ranking.parts.replace({"sae": short_names(ranking.parts["sae"])}) if len(ranking.parts) else ranking.parts  # fmt: skip
    for title, table, shown in (("Where the bias lies", parts, PARTS), ("Predicted against exact", ranking.predictions, FORETOLD)):  # fmt: skip
        if len(table):
            run.table(title, table, shown)
    cumulative = None if ranking.cumulative is None else rows(ranking.cumulative)
    run.done({
        "saes": [str(s.id) for s in run.saes], **picked(ranking, "by family_size n_units units"), "note": ranking.note or None, "split": split,
        "features": rows(first), "randomized": None if lucky is None else rows(lucky.head(top)), "cumulative": cumulative,
        "bias_parts": rows(ranking.parts), "predictions": rows(ranking.predictions),
    })  # fmt: skip


def _write_list(path: Path, features: list[str]) -> str:
    """The features with a public page as a Neuronpedia list in `path`; what was written."""
    from sae_bias.saes.neuronpedia import feature_list

    entries = feature_list(features)
    try:
        path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}.") from error
    return f"{path}: {len(entries)} of {len(features)} features have a page on Neuronpedia"


def _yield_of(frame: "pd.DataFrame") -> str:
    """How many features a search found something in, by what it found."""
    found = [f"{int((frame['separates'] == 'yes').sum())} separate"] if "separates" in frame else []
    if "call" in frame:
        calls = frame["call"][~frame["call"].isin(["no", "none", "undetermined", ""])].value_counts()
        found += [f"{n} {call}" for call, n in calls.items()] or ["no call"]
    if "causal_ai_speech" in frame:
        found.append(f"{int((frame['causal_ai_speech'] == 'yes').sum())} causal")
    return ", ".join(found)


def _contrast(positive: Path | None, negative: Path | None, file: str | None) -> Any:
    """The contrast that was asked for, if any."""
    if positive is None and negative is None and file is None:
        return None
    from sae_bias.prompts.contrast import load_contrast

    if file is not None and (positive is not None or negative is not None):
        raise RequestError("--contrast names both sides; leave --positive and --negative out.")
    if file is not None:
        return load_contrast(file)
    if positive is None or negative is None:
        raise RequestError("--positive and --negative go together, a text a line in each.")
    return load_contrast(positive, negative)
