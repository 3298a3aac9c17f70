"""Judging steered against unsteered text, blind and in both orders, as an Inspect AI task (extra `judge`).

A judge is any Inspect model string: "anthropic/…", "openai/…", "openai-api/local/NAME" for a local server, "hf/…" for Hugging Face.
Every part of the rubric is asked separately. Absolute: each text alone, 1–5. Pairwise: both texts, in both orders; a choice that
changes with the order is a tie, and counted as bound to the place. What stands for a condition is never in the question, and
requests go out in an order that hides it. Retries, concurrency and logs are Inspect's. The number of prompts needed comes from the run's own paired SD at 80 % power.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import pandas as pd
from tqdm.auto import tqdm

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.core.files import digest
from sae_bias.measures.judge_replies import Reply, ReplyStore
from sae_bias.measures.judge_results import SIDES, Estimate, JudgeResult
from sae_bias.prompts.files import bundled_yaml

if TYPE_CHECKING:
    from inspect_ai import Task
    from inspect_ai.scorer import Scorer
    from inspect_ai.solver import Solver

LOCAL = (
    "hf",
    "vllm",
    "sglang",
    "ollama",
    "llama-cpp-python",
    "transformer_lens",
    "nnterp",
    "mockllm",
    "none",
    "sae_bias",
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
STRUCTURED = ("openai", "google", "mistral", "grok", "anthropic")
"""Inspect providers with structured output; elsewhere the one line that the question asks for is read."""
MAX_TOKENS = 512
NOISE_TEMPERATURE = 0.7


Kind = Literal["absolute", "pairwise"]


@dataclass(frozen=True)
class Judge:
    """One judge: an Inspect model string and how to reach it."""

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    temperature: float = 0.0
    max_tokens: int = MAX_TOKENS
    """Room for a reply, a reasoning judge's thinking included; a reply cut there is unscored."""
    dollars_in: float | None = None
    """Price of a million input tokens; None where not known."""
    dollars_out: float | None = None

    @property
    def local(self) -> bool:
        """Whether a reply costs nothing: a model on this machine, or a server on it."""
        return self.model.split("/")[0] in LOCAL or urlsplit(self.base_url or "").hostname in LOOPBACK

    @property
    def structured(self) -> bool:
        """Whether the provider can hold a model to a form of reply."""
        return self.model.split("/")[0] in STRUCTURED

    def heat(self, repeats: int) -> float:
        """Sampling temperature: repeats of a greedy judge would say nothing about its noise."""
        return self.temperature if repeats == 1 else max(self.temperature, NOISE_TEMPERATURE)


@dataclass(frozen=True)
class Pace:
    """How requests are sent; retries and their growing waits are Inspect's."""

    at_once: int = 8
    attempts: int = 6
    timeout: float = 120.0
    """Seconds for one attempt."""
    give_up_after: int = 5
    """Requests of a judge that fail for good before its others are left for a later run."""


@dataclass(frozen=True)
class Request:
    """One question to one judge; `side` and `item` stay here and are never sent."""

    judge: Judge
    kind: Kind
    part: str
    item: int
    side: str
    """absolute: the text's condition; pairwise: the condition of the text that stands first."""
    repeat: int
    text: str

    temperature: float

    @property
    def key(self) -> str:
        j = self.judge
        return digest(j.model, self.temperature, j.max_tokens, self.text, self.repeat)


Confirm = Callable[[Estimate], bool]


def rubric_parts() -> tuple[str, ...]:
    """Names of the rubric's parts."""
    return tuple(p["name"] for p in _prompts()["parts"])


def make_requests(
    frame: pd.DataFrame,
    judges: Sequence[Judge],
    *,
    parts: Sequence[str] | None = None,
    absolute: bool = True,
    pairwise: bool = True,
    repeats: int = 1,
    seed: int = 0,
) -> list[Request]:
    """Every question about a table with columns prompt, unsteered, steered, in an order that hides the condition.

    Raises:
        RequestError: a missing column, no rows, an unknown part, no judge, nothing to ask.
    """
    missing = [c for c in ("prompt", *SIDES) if c not in frame]
    if missing or frame.empty:
        raise RequestError(
            f"the judge needs a table with rows and columns prompt, unsteered, steered; {missing or 'rows'} missing."
        )
    parts = rubric_parts() if parts is None else tuple(parts)
    unknown = [p for p in parts if p not in rubric_parts()]
    if unknown or not parts or not judges or repeats < 1 or not (absolute or pairwise):
        raise RequestError(
            f"parts {parts}, {len(judges)} judges, {repeats} repeats: expected parts of {', '.join(rubric_parts())}, "
            "a judge, at least one repeat, and absolute or pairwise ratings."
        )
    if len({j.model for j in judges}) != len(judges):
        raise RequestError(
            "a judge is named twice; replies are kept by its name, so two servers need two names."
        )
    asked: dict[Kind, bool] = {"absolute": absolute, "pairwise": pairwise}
    requests = [
        Request(judge, kind, part, item, side, repeat, _question(kind, part, row, side), judge.heat(repeats))
        for item, row in enumerate(frame[["prompt", *SIDES]].to_dict("records"))
        for kind, on in asked.items()
        if on
        for part in parts
        for side in SIDES
        for judge in judges
        for repeat in range(repeats)
    ]
    random.Random(seed).shuffle(requests)
    return requests


def estimate(requests: Sequence[Request], store: ReplyStore) -> Estimate:
    """Requests that no kept reply answers, with tokens at four characters each. Identical questions are asked once."""
    new = {r.key: r for r in requests if r.key not in store}.values()
    tokens_in = [len(r.text) // 4 + 10 for r in new]
    paid = [(r, n) for r, n in zip(new, tokens_in) if not r.judge.local]
    dollars = None
    if all(r.judge.dollars_in is not None and r.judge.dollars_out is not None for r, _ in paid):
        dollars = sum(
            (n * (r.judge.dollars_in or 0) + r.judge.max_tokens * (r.judge.dollars_out or 0)) / 1e6
            for r, n in paid
        )
    kept = len({r.key for r in requests}) - len(tokens_in)
    return Estimate(
        len(tokens_in), kept, sum(tokens_in), sum(r.judge.max_tokens for r in new), dollars, bool(paid)
    )


def run_judge(
    frame: pd.DataFrame,
    judges: Sequence[Judge | str],
    *,
    out: str | Path,
    parts: Sequence[str] | None = None,
    absolute: bool = True,
    pairwise: bool = True,
    repeats: int = 1,
    seed: int = 0,
    confirm: Confirm | None = None,
    pace: Pace | None = None,
    progress: bool = False,
) -> JudgeResult:
    """Judge the texts of `frame` (columns prompt, unsteered, steered); replies are kept under `out`/judge and used again.

    Args:
        confirm: asked before any paid request, with the estimate; without it, paid judges are refused.

    Raises:
        RequestError: paid judges without a yes; see `make_requests`.
        MissingError: the extra is not installed, a provider's key or package is absent, or no judge answered at all.
    """
    chosen = [j if isinstance(j, Judge) else Judge(j) for j in judges]
    requests = make_requests(
        frame, chosen, parts=parts, absolute=absolute, pairwise=pairwise, repeats=repeats, seed=seed
    )
    store = ReplyStore(Path(out) / "judge" / "replies.jsonl")
    cost = estimate(requests, store)
    if cost.paid and not (confirm is not None and confirm(cost)):
        raise RequestError(f"not confirmed, nothing was sent: {cost}.")
    failures: list[str] = []
    if cost.n_requests:
        failures = _ask_all(requests, store, pace or Pace(), Path(out) / "judge" / "logs", progress)
    if failures and not any(r.key in store for r in requests):
        raise MissingError(
            f"no judge answered ({failures[0]}); start the server or check the key and the address (most end in /v1), and run the same command again."
        )
    return JudgeResult(
        frame.reset_index(drop=True), _table(requests, store), cost, tuple(dict.fromkeys(failures))
    )


# ── asking


def judge_task(
    requests: Sequence[Request],
    store: ReplyStore,
    *,
    pace: Pace,
    on_reply: Callable[[], object] = lambda: None,
) -> Task:
    """One judge's open questions as an Inspect task: a sample a question, its reply kept in `store` the moment it is there.

    `inspect view --log-dir RUN/judge/logs` shows every question, reply and score.
    """
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import GenerateConfig

    asked = {r.key: r for r in requests if r.key not in store}
    judge = next(iter(asked.values())).judge

    return Task(
        name="judge",
        dataset=MemoryDataset(
            [
                Sample(id=key, input=r.text, metadata={"kind": r.kind, "part": r.part})
                for key, r in asked.items()
            ],
            name=judge.model,
        ),
        solver=_asking(asked),
        scorer=_reading(asked, store, on_reply),
        model=_open_model(judge),
        config=GenerateConfig(
            max_tokens=judge.max_tokens,
            max_retries=pace.attempts - 1,
            attempt_timeout=max(1, round(pace.timeout)),
            max_connections=pace.at_once,
        ),
        fail_on_error=float(pace.give_up_after),
    )


def _asking(asked: Mapping[str, Request]) -> Solver:
    """The solver: one question at its own temperature and seed, in a form where the provider can hold the model to one."""
    from inspect_ai.solver import solver

    @solver
    def ask():
        async def solve(state, generate):
            request = asked[str(state.sample_id)]
            return await generate(
                state,
                temperature=request.temperature,
                seed=request.repeat,
                response_schema=_schema(request.kind) if request.judge.structured else None,
            )

        return solve

    return ask()


def _reading(asked: Mapping[str, Request], store: ReplyStore, on_reply: Callable[[], object]) -> Scorer:
    """The scorer: keeps the reply, and reads its verdict or leaves it unscored."""
    from inspect_ai.scorer import Score, scorer

    @scorer(metrics=[])
    def read():
        async def score(state, target):
            request = asked[str(state.sample_id)]
            reply = Reply(state.output.completion, str(state.output.stop_reason))
            store.add(request.key, {"judge": request.judge.model, "reply": reply.text, "stop": reply.stop})
            on_reply()
            value = reply.rating if request.kind == "absolute" else reply.choice
            if value is None:
                return Score.unscored(explanation=reply.text)
            return Score(value=value, answer=str(value), explanation=reply.text)

        return score

    return read()


def _ask_all(
    requests: Sequence[Request], store: ReplyStore, pace: Pace, logs: Path, progress: bool
) -> list[str]:
    """Send what is not answered yet, each judge's questions as one Inspect task; why some have no reply."""
    from inspect_ai import eval as inspect_eval

    todo = len({r.key for r in requests if r.key not in store})
    by_judge = {r.judge: [q for q in requests if q.judge == r.judge] for r in requests if r.key not in store}
    said = [
        f"{judge.model}: nothing listens at {judge.base_url}" for judge in by_judge if not _listens(judge)
    ]
    by_judge = {judge: asked for judge, asked in by_judge.items() if _listens(judge)}
    if not by_judge:
        return said
    with tqdm(total=todo, desc="judge", unit="reply", disable=not progress, leave=False) as bar:
        tasks = [judge_task(asked, store, pace=pace, on_reply=bar.update) for asked in by_judge.values()]
        done = _outside_a_loop(
            lambda: inspect_eval(
                tasks, log_dir=str(logs), display="none", max_tasks=len(tasks), log_level="error"
            )
        )
    for log in done:
        errors = [sample.error for sample in log.samples or () if sample.error] + (
            [log.error] if log.error else []
        )
        own = [error for error in errors if not error.message.startswith("CancelledError")]
        said += [f"{log.eval.model}: {' '.join(error.message.split())[:200]}" for error in own or errors]
    return said


def _listens(judge: Judge) -> bool:
    """False where the judge is a server of this machine and nobody is there: no retry would help."""
    place = urlsplit(judge.base_url or "")
    if place.hostname not in LOOPBACK:
        return True
    try:
        socket.create_connection((place.hostname, place.port or 80), timeout=5).close()
    except OSError:
        return False
    return True


def _outside_a_loop(work: Callable[[], Any]) -> Any:
    """What `work` returns; in a thread of its own where an event loop runs already (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()
    # not where the error is caught: it would be the innermost cause of whatever goes wrong in `work`, and Inspect reports that one
    return work()


def _schema(kind: str) -> Any:
    """The reply's form for providers that hold a model to one."""
    from inspect_ai.model import ResponseSchema
    from inspect_ai.util import JSONSchema

    values = [1, 2, 3, 4, 5] if kind == "absolute" else ["1", "2", "tie"]
    name = "rating" if kind == "absolute" else "choice"
    form = JSONSchema(
        type="object",
        properties={name: JSONSchema(type="integer" if kind == "absolute" else "string", enum=values)},
        required=[name],
        additionalProperties=False,
    )
    return ResponseSchema(name=name, json_schema=form, strict=True)


def _open_model(judge: Judge) -> Any:
    """Inspect's model of a judge.

    Raises:
        MissingError: the extra, the provider's package or its key is absent.
        RequestError: no such provider.
    """
    try:
        from inspect_ai.model import get_model
    except ImportError as error:
        raise MissingError("judging needs Inspect AI: pip install 'sae-bias[judge]'.") from error
    try:
        return get_model(judge.model, base_url=judge.base_url, api_key=judge.api_key, memoize=False)
    except Exception as error:
        what = " ".join(str(error).split())[:300]
        if isinstance(error, ValueError) and (
            "not recognized" in what or "not found" in what or "specify" in what.lower()
        ):
            raise RequestError(
                f"judge {judge.model!r}: {what}. Try e.g. anthropic/MODEL, openai-api/local/MODEL or hf/MODEL."
            ) from error
        raise MissingError(f"judge {judge.model!r} cannot be opened: {what}") from error


def _question(kind: str, part: str, row: Mapping[Any, Any], first: str) -> str:
    prompts = _prompts()
    rubric = next(p for p in prompts["parts"] if p["name"] == part)
    second = SIDES[1 - SIDES.index(first)]
    values = {
        **rubric,
        "prompt": row["prompt"],
        "text": _shown(row[first]),
        "first": _shown(row[first]),
        "second": _shown(row[second]),
    }
    text = prompts[kind]
    for slot in ("question", "scale", "compare"):
        text = text.replace("{" + slot + "}", values[slot])
    # the texts go in last and in one pass, so that braces in them stay text
    pieces = {
        "{" + slot + "}": str(values[slot]).replace("==========", "=====")
        for slot in ("prompt", "text", "first", "second")
    }
    return re.sub("|".join(map(re.escape, pieces)), lambda m: pieces[m.group()], text)


def _shown(text: Any) -> str:
    return str(text).strip() or "(nothing)"


def _prompts() -> Any:
    return bundled_yaml("judge_prompts.yaml")


def _table(requests: Sequence[Request], store: ReplyStore) -> pd.DataFrame:
    """One row a request, in a fixed order; a request without a reply has None, an unreadable reply is not readable."""
    rows = []
    for r in requests:
        kept = store.get(r.key)
        reply = None if kept is None else Reply(kept["reply"], kept.get("stop", "stop"))
        rating = reply.rating if reply is not None and r.kind == "absolute" else None
        choice = reply.choice if reply is not None and r.kind == "pairwise" else None
        rows.append(
            {
                "judge": r.judge.model,
                "kind": r.kind,
                "part": r.part,
                "item": r.item,
                "side": r.side,
                "repeat": r.repeat,
                "rating": rating,
                "choice": choice,
                "readable": rating is not None or choice is not None,
                "reply": None if reply is None else reply.text,
                "stop": None if reply is None else reply.stop,
            }
        )
    frame = pd.DataFrame(rows).astype({"rating": "float64"})
    keys = ["kind", "part", "item", "side", "judge", "repeat"]
    return frame.sort_values(keys, kind="stable").reset_index(drop=True)
