"""`sae-bias probe`: how much more harshly a model judges AI subjects."""

from typing import TYPE_CHECKING

from sae_bias.cli.context import FROM_MODEL, Run, command, picked, rows
from sae_bias.core.labels import columns_of

if TYPE_CHECKING:
    from sae_bias.models.model import Model
    from sae_bias.probe.words import Probe
    from sae_bias.prompts.pairs import PromptPairs


@command(
    "probe",
    "sae-bias probe organism:planted",
    "sae-bias probe organism:planted --pairs gender",
    takes=(*FROM_MODEL, "pairs", "words", "score", "template_arg"),
)
def probe(
    run: Run,
    chat: bool = False,
    no_softcap: bool = False,
    audit_words: bool = False,
    checks: bool = False,
) -> None:
    """Measure the bias of a model over prompt pairs.

    A pair is two prompts that differ in the subject only. Each is scored by the logits of evaluation words after it, and the bias is
    the human prompt's score minus the AI prompt's: positive means that the AI is judged worse. The interval and p are clustered
    over templates and entities. Where the pairs bring mundane twins, the primary figure is what goes beyond their bias (the
    difference in differences), and the bias stands beside it.

    Args:
        --chat: The sentence in the user's turn, the stem prefilled in the model's turn.
        --no-softcap: Without the final-logit softcap (Gemma 2 has one).
        --audit-words: Only list the words: which are one token, which are left out and why.
        --checks: Also every check: words left out, stems, scores, specifications, forced choice, neutral subjects, nuisances.
    """
    from sae_bias.probe.checks import null_facts, run_checks
    from sae_bias.probe.random_words import random_word_null
    from sae_bias.probe.run import run_probe
    from sae_bias.runs.copies import probe_facts
    from sae_bias.runs.effect_lines import headline
    from sae_bias.runs.summary import Summary, bias_summary

    prompts, seed, score = run.pairs, run.seed, run.given["score"]
    chosen = run.probe.with_options(softcap=not no_softcap)
    model = run.open()
    if chat:
        from sae_bias.models.chat import chat_pairs

        prompts = chat_pairs(model, prompts)
    if audit_words:
        _audit(run, model, prompts, chosen)
        return
    result = run_probe(model, prompts, chosen, random_words=True, progress=run.progress)
    frame, per_word = result.to_frame(), result.words()
    excluded = [f"{w.word} ({w.reason})" for w in result.vocabulary.excluded]
    tables = {"pairs": frame.assign(split="all"), "words": per_word}
    checked = None
    summary = bias_summary(result)
    if checks:
        checked = run_checks(model, prompts, base=result, seed=seed, progress=run.progress)
        tables |= checked.run_tables()
        summary |= checked.facts | {"warnings": checked.warnings}
    else:
        summary["random_words"] = null_facts(random_word_null(result, seed=seed))
    run.save(
        tables, summary, pairs=prompts, vocabulary=result.vocabulary, score=score, chat=chat, probe=probe_facts(chosen, result.vocabulary)
    )  # fmt: skip
    if prompts.sides != ("human", "AI"):
        run.say(f"bias = {prompts.sides[0]} − {prompts.sides[1]}")
    figures = Summary.from_facts(summary)
    for line in headline(figures):
        run.say(line)
    if checked is None and len(prompts.stems) > 1:
        run.note(
            f"read after one stem; --checks says whether the sign hangs on it ({len(prompts.stems)} stems)"
        )
    if result.stat.reason:
        run.say(f"no interval: {result.stat.reason}")
    if excluded:
        run.note(f"words left out: {', '.join(excluded)}")
    first = per_word.sort_values("contribution", ascending=False, key=abs).head(8)
    run.table(
        "Words that carry it",
        first,
        columns_of("word; side; contribution: adds to the bias; human: after human; ai: after AI"),
    )
    if checked is not None:
        shown = columns_of("check; value; ci_low; ci_high; p_value; says:  ")
        run.table("Checks", checked.summary, shown)
        for name, why in checked.skipped.items():
            run.note(f"not checked: {name} ({why})")
    done = picked(result, "bias p_value n_pairs") | picked(result.stat, "n_templates n_entities")
    done |= {name: summary.get(name) for name in ("control_bias", "difference_in_differences")}
    done |= {name: (part := getattr(figures, name)) and part.facts() for name in ("mass", "random_words")}
    done |= {
        "score": score,
        "ci": list(result.ci),
        "reason": result.stat.reason or None,
        "warnings": list(figures.warnings),
    }
    done |= {"words": rows(per_word), "words_left_out": excluded, "sides": list(prompts.sides), "chat": chat}
    done["checks"], done["not_checked"] = (
        (None, None) if checked is None else (rows(checked.summary), checked.skipped)
    )
    run.done(done)


def _audit(run: Run, model: "Model", prompts: "PromptPairs", chosen: "Probe") -> None:
    """The word list under this tokenizer, with nothing measured."""
    from sae_bias.probe.checks_words import audit_words

    frame = audit_words(model, prompts, chosen)
    if run.out is not None:
        from sae_bias.runs.folder import RunFolder

        with RunFolder(run.out).writing() as folder:
            folder.write_table("word_audit", frame)
    read = int(frame["read"].sum())
    run.say(
        f"{read} of {len(frame)} words are read under score={chosen.score} by the tokenizer of {model.name}"
    )
    if int(frame["trap"].sum()):
        run.say(
            f"{int(frame['trap'].sum())} words begin with another token when encoded alone (the prefix trap)"
        )
    columns = columns_of("word; side; tokens; n_tokens: n; read; reason: left out because")
    run.table("Words", frame, columns)
    run.done({"score": chosen.score, "words": rows(frame)})
