"""`sae-bias judge`: one or more judges rate a run's steered against its unsteered texts, blind and in both orders."""

from pathlib import Path
from typing import Annotated

from sae_bias.cli.context import Run, ask_to_send, command, once
from sae_bias.core.errors import MissingError, RequestError
from sae_bias.core.labels import columns_of


@command(
    "judge",
    "sae-bias judge runs/demo --judge openai-api/local/qwen --base-url http://127.0.0.1:8000/v1 --api-key none",
    "sae-bias judge runs/demo --judge anthropic/claude-sonnet-4-5 --repeats 2 --price-in 3 --price-out 15",
    takes=("seed",),
)
def judge(
    run: Run,
    folder: Path,
    judges: list[str] | None = None,
    base_url: str | None = None,
    api_key: Annotated[str | None, {"envvar": "SAE_BIAS_JUDGE_KEY"}] = None,
    part: list[str] | None = None,
    repeats: Annotated[int, {"min": 1}] = 1,
    absolute: bool = True,
    pairwise: bool = True,
    price_in: float | None = None,
    price_out: float | None = None,
    at_once: Annotated[int, {"min": 1}] = 8,
    timeout: Annotated[float, {"min": 1.0}] = 120.0,
    max_tokens: Annotated[int, {"min": 1}] = 512,
    yes: bool = False,
) -> None:
    """Let judges rate a run's texts.

    The judge never learns which text was steered. Replies are kept as they come: the same command goes on where it stopped, and no
    reply is paid for twice. A reply without a rating is left out and counted. Results go into RUN, or into --out with a copy of its texts.

    Args:
        RUN: Run folder with generated texts.
        --judge PROVIDER/MODEL: Inspect model string: anthropic/…, openai/…, openai-api/local/… or hf/…; may be given several times.
        --base-url URL: Server of the judges, such as http://127.0.0.1:8000/v1.
        --api-key: Key of that server; providers' own variables serve otherwise.
        --part NAME: coherence, harm or stance; all of them by default.
        --repeats: How often each question is asked; 2 and more, at temperature 0.7, show a judge's own noise.
        --absolute/--no-absolute: Rate each text alone, 1 to 5.
        --pairwise/--no-pairwise: Compare both texts, in both orders.
        --price-in USD: Price of a million input tokens, for the estimate.
        --price-out USD: Price of a million output tokens, for the estimate.
        --at-once: Requests that a judge answers at a time.
        --timeout: Seconds to wait for one reply.
        --max-tokens: Room for one reply, a reasoning judge's thinking included; a reply cut there is unscored.
        --yes, -y: Send paid requests without asking.
    """
    from sae_bias.measures.judge import Judge, Pace, run_judge
    from sae_bias.runs.folder import RunFolder

    if not judges:
        raise RequestError(
            "no judge; give --judge PROVIDER/MODEL, such as --judge openai-api/local/qwen --base-url http://127.0.0.1:8000/v1."
        )
    kept, out = RunFolder(folder), run.out
    if not (folder / "manifest.json").is_file():
        raise RequestError(f"{folder} is not a run folder: it has no manifest.json.")
    texts = kept.read_table("generations")
    if out is not None:
        facts = kept.read_json("manifest")
        kept = RunFolder(out)
        kept.write_json("manifest", facts)
        kept.write_table("generations", texts)
    chosen = [
        Judge(name, base_url, api_key, max_tokens=max_tokens, dollars_in=price_in, dollars_out=price_out)
        for name in once(judges, "--judge")
    ]
    with kept.writing():
        result = run_judge(
            texts, chosen, out=kept.path, parts=part or None, absolute=absolute, pairwise=pairwise, repeats=repeats, seed=run.seed,
            confirm=lambda cost: yes or ask_to_send(cost), pace=Pace(at_once=at_once, timeout=timeout), progress=run.progress,
        )  # fmt: skip
        kept.write_table("judge", result.table)
        kept.write_table("judge_parts", result.to_frame())
        kept.add_summary({"judge": result.summary()})
    for line in result.headline():
        run.say(line)
    columns = columns_of(
        "part; unsteered; steered; difference; ci_low; ci_high; paired_sd: paired SD; "
        "needed_n: prompts needed; alpha: α; repeat_sd: repeat SD; order_bound: order-bound"
    )
    run.table("Judged", result.to_frame(), columns)
    run.finish({"run": str(kept.path), **result.summary()})
    if result.n_unanswered:
        raise MissingError(
            f"{result.n_unanswered} of {len(result.table)} questions have no reply ({'; '.join(result.failures[:1])}); the replies received are kept, "
            "and the same command resumes from there."
        )
