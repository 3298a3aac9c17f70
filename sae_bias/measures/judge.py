"""Judging steered against unsteered text, blind and in both orders, through Inspect AI's model interface (extra `judge`).

A judge is any Inspect model string: "anthropic/…", "openai/…", "openai-api/local/NAME" for a local server, "hf/…" for Hugging Face.
Every part of the rubric is asked separately. Absolute: each text alone, 1–5. Pairwise: both texts, in both orders; a choice that
changes with the order is a tie, and counted as bound to the place. What stands for a condition is never in the question, and
requests go out in an order that hides it. The number of prompts needed comes from the run's own paired SD at 80 % power.
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm.auto import tqdm

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.core.files import digest
from sae_bias.measures.judge_replies import ReplyStore, read_choice, read_rating
from sae_bias.measures.judge_results import SIDES, Estimate, JudgeResult
from sae_bias.prompts.files import read_yaml

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
MAX_TOKENS = 40


@dataclass(frozen=True)
class Judge:
    """One judge: an Inspect model string and how to reach it."""

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    temperature: float = 0.0
    max_tokens: int = MAX_TOKENS
    dollars_in: float | None = None
    """Price of a million input tokens; None where not known."""
    dollars_out: float | None = None

    @property
    def local(self) -> bool:
        """Whether a reply costs nothing: a model on this machine, or a server on it."""
        host = (self.base_url or "").split("//")[-1].split("/")[0].rsplit(":", 1)[0]
        return self.model.split("/")[0] in LOCAL or host in ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Pace:
    """How requests are sent, and how long a judge that fails is waited for."""

    at_once: int = 8
    attempts: int = 6
    timeout: float = 120.0
    """Seconds for one attempt."""
    wait: float = 2.0
    """Seconds before the second attempt; doubled for each further one, unless the judge says when to return."""
    longest_wait: float = 60.0
    give_up_after: int = 5
    """Requests in a row that fail for good before the rest is left for a later run."""


@dataclass(frozen=True)
class Request:
    """One question to one judge; `side` and `item` stay here and are never sent."""

    judge: Judge
    kind: Literal["absolute", "pairwise"]
    part: str
    item: int
    side: str
    """absolute: the text's condition; pairwise: the condition of the text that stands first."""
    repeat: int
    text: str

    @property
    def key(self) -> str:
        j = self.judge
        return digest(j.model, j.temperature, j.max_tokens, self.text, self.repeat)


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
    if len({(j.model, j.base_url) for j in judges}) != len(judges):
        raise RequestError("a judge is named twice.")
    kinds = [k for k, on in (("absolute", absolute), ("pairwise", pairwise)) if on]
    requests = [
        Request(judge, kind, part, item, side, repeat, _question(kind, part, row, side))  # type: ignore[arg-type]
        for item, row in enumerate(frame[["prompt", *SIDES]].to_dict("records"))
        for kind in kinds
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
        failures = _run_coroutine(_ask_all(requests, store, pace or Pace(), progress))
    if failures and not any(r.key in store for r in requests):
        raise MissingError(
            f"no judge answered ({failures[0]}); start the server or check the key, and run the same command again."
        )
    return JudgeResult(
        frame.reset_index(drop=True), _table(requests, store), cost, tuple(dict.fromkeys(failures))
    )


# ── asking
async def _ask_all(requests: Sequence[Request], store: ReplyStore, pace: Pace, progress: bool) -> list[str]:
    """Send what is not answered yet; the reasons of those that failed for good."""
    models = {r.judge: _open_model(r.judge) for r in requests}
    todo = list({r.key: r for r in requests if r.key not in store}.values())
    places = {judge: asyncio.Semaphore(pace.at_once) for judge in models}
    failed: list[str] = []
    in_a_row = dict.fromkeys(models, 0)

    with tqdm(total=len(todo), desc="judge", unit="reply", disable=not progress, leave=False) as bar:

        async def one(request: Request) -> None:
            judge = request.judge
            async with places[judge]:
                if in_a_row[judge] >= pace.give_up_after:
                    failed.append(f"{judge.model} stopped answering")
                    return
                try:
                    reply = await _ask(models[judge], request, pace)
                except _NoReplyError as error:
                    in_a_row[judge] += 1
                    failed.append(str(error))
                    return
                in_a_row[judge] = 0
                store.add(request.key, {"judge": judge.model, "reply": reply})
                bar.update()

        await asyncio.gather(*(one(r) for r in todo))
    return failed


class _NoReplyError(Exception):
    """A request that was given up."""


async def _ask(model: Any, request: Request, pace: Pace) -> str:
    """One reply; 429s, time-outs and dropped connections are tried again, anything else is not."""
    from inspect_ai.model import GenerateConfig

    judge = request.judge
    config = GenerateConfig(
        temperature=judge.temperature,
        max_tokens=judge.max_tokens,
        max_retries=0,
        max_connections=pace.at_once,
        seed=request.repeat,
    )
    wait = pace.wait
    for attempt in range(1, pace.attempts + 1):
        try:
            output = await asyncio.wait_for(model.generate(request.text, config=config), pace.timeout)
            return output.completion
        except TimeoutError:
            reason, again, asked_for = f"no reply within {pace.timeout:g} s", True, None
        except Exception as error:
            error = _cause(error)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            again, asked_for = _retryable(model, error)
        if not again or attempt == pace.attempts:
            raise _NoReplyError(f"{judge.model}: {reason}")
        await asyncio.sleep(min(asked_for if asked_for is not None else wait, pace.longest_wait))
        wait *= 2
    raise AssertionError("unreachable")


def _cause(error: Exception) -> Exception:
    """The provider's own error inside a retry wrapper."""
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    return inner if isinstance(inner, Exception) else error


def _retryable(model: Any, error: Exception) -> tuple[bool, float | None]:
    """Whether the provider calls the error passing, and the wait that it asked for."""
    decision = model.api.should_retry(error)
    if isinstance(decision, bool) or decision is None:
        return bool(decision) or isinstance(error, ConnectionError), None
    return bool(decision), getattr(decision, "retry_after", None)


def _open_model(judge: Judge) -> Any:
    """Inspect's model of a judge.

    Raises:
        MissingError: the extra, the provider's package or its key is absent.
        RequestError: no such provider.
    """
    try:
        from inspect_ai.model import GenerateConfig, get_model
    except ImportError as error:
        raise MissingError("judging needs Inspect AI: pip install 'sae-bias[judge]'.") from error
    try:
        return get_model(
            judge.model,
            base_url=judge.base_url,
            api_key=judge.api_key,
            config=GenerateConfig(max_retries=0),
            memoize=False,
        )
    except Exception as error:
        what = " ".join(str(error).split())[:300]
        if isinstance(error, ValueError) and (
            "not recognized" in what or "not found" in what or "specify" in what.lower()
        ):
            raise RequestError(
                f"judge {judge.model!r}: {what}. Try e.g. anthropic/MODEL, openai-api/local/MODEL or hf/MODEL."
            ) from error
        raise MissingError(f"judge {judge.model!r} cannot be opened: {what}") from error


def _run_coroutine(work: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's result; in a thread of its own where a loop runs already (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    box: dict[str, Any] = {}

    def target() -> None:
        try:
            box["value"] = asyncio.run(work)
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if "error" in box:
        raise box["error"]
    return box["value"]


def _question(kind: str, part: str, row: dict[str, Any], first: str) -> str:
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
    return read_yaml(Path(str(files("sae_bias") / "data" / "judge_prompts.yaml"))).value


def _table(requests: Sequence[Request], store: ReplyStore) -> pd.DataFrame:
    """One row a request, in a fixed order; a request without a reply has None, an unreadable reply is not readable."""
    rows = []
    for r in requests:
        reply = store[r.key]["reply"] if r.key in store else None
        rating = read_rating(reply) if reply is not None and r.kind == "absolute" else None
        choice = read_choice(reply) if reply is not None and r.kind == "pairwise" else None
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
                "readable": reply is not None and (rating is not None or choice is not None),
                "reply": reply,
            }
        )
    frame = pd.DataFrame(rows).astype({"rating": "float64"})
    keys = ["kind", "part", "item", "side", "judge", "repeat"]
    return frame.sort_values(keys, kind="stable").reset_index(drop=True)
