"""`sae-bias probe`: how much more harshly a model judges AI subjects."""

import typer

from sae_bias.commands.console import Console
from sae_bias.commands.inputs import read_probe
from sae_bias.commands.options import (
    Device,
    Dtype,
    Json,
    ModelName,
    Out,
    Pairs,
    Quiet,
    Score,
    Seed,
    WordsFile,
    example,
)
from sae_bias.commands.run_files import run_facts, save_run


def register(app: typer.Typer) -> None:
    app.command(
        "probe",
        epilog=example("sae-bias probe organism:planted", "sae-bias probe organism:planted --pairs gender"),
    )(probe)


def probe(
    model: ModelName,
    pairs: Pairs = None,
    words: WordsFile = None,
    score: Score = "mean_logit",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Measure the bias of a model over prompt pairs.

    A pair is two prompts that differ in the subject only. Each is scored by the logits of evaluation words after it, and the bias is
    the human prompt's score minus the AI prompt's: positive means that the AI is judged worse. The interval and p are clustered
    over templates and entities; where the pairs bring mundane twins, the same bias on those stands beside it.
    """
    with Console(json, quiet) as console:
        from sae_bias.model import load_model
        from sae_bias.probe import run_probe
        from sae_bias.prompts import load_pairs
        from sae_bias.study import _bias_summary as bias_summary
        from sae_bias.study import headline

        prompts = load_pairs(pairs)
        chosen = read_probe(prompts, words, score)
        loaded = load_model(model, device=device, dtype=dtype)
        controls = bool(len(prompts.controls()))
        result = run_probe(loaded, prompts, chosen, controls=controls, progress=console.progress)
        frame, per_word = result.to_frame(), result.words()
        summary = bias_summary(result)
        excluded = [f"{w.word} ({w.reason})" for w in result.vocabulary.excluded]
        if out is not None:
            facts = run_facts(loaded, pairs=prompts, vocabulary=result.vocabulary, seed=seed, score=score)
            save_run(out, facts, {"pairs": frame.assign(split="all"), "words": per_word}, summary)
        for line in headline(summary):
            console.say(line)
        if result.stat.reason:
            console.say(f"no interval: {result.stat.reason}")
        if excluded:
            console.note(f"words left out: {', '.join(excluded)}")
        first = per_word.sort_values("contribution", ascending=False, key=abs).head(8)
        console.table(
            "Words that carry it",
            first,
            {
                "word": "word",
                "side": "side",
                "contribution": "adds to the bias",
                "human": "after human",
                "ai": "after AI",
            },
        )
        console.finish(
            {
                "model": loaded.name,
                "score": score,
                "bias": result.bias,
                "ci": list(result.ci),
                "p_value": result.p_value,
                "n_pairs": result.n_pairs,
                "n_templates": result.stat.n_templates,
                "n_entities": result.stat.n_entities,
                "reason": result.stat.reason or None,
                "control_bias": summary.get("control_bias"),
                "difference_in_differences": summary.get("difference_in_differences"),
                "words": per_word.to_dict(orient="records"),
                "words_left_out": excluded,
                "out": None if out is None else str(out),
            }
        )
