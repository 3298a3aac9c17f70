"""A tokenizer's chat template as text: nothing of the prompt lost, the date pinned, what it raises in one line."""

from __future__ import annotations

import datetime
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from sae_bias.core.errors import RequestError

_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def render(
    tokenizer: Any,
    name: str,
    messages: Sequence[Mapping[str, str]],
    *,
    day: datetime.date,
    arguments: Mapping[str, Any],
    generation_prompt: bool = True,
) -> str:
    """The chat as text, the model's turn opened where `generation_prompt`.

    Raises:
        RequestError: no template, one that fails, or one whose text lacks what a message says.
    """
    source = getattr(tokenizer, "chat_template", None)
    if not source:
        raise RequestError(f"{name} has no chat template; use the plain form, or an instruction-tuned model.")
    if isinstance(source, dict) and "default" not in source and "chat_template" not in arguments:
        raise RequestError(
            f"{name} has several chat templates and none called default; "
            f'say which: template_arguments={{"chat_template": NAME}} with {", ".join(map(repr, source))}.'
        )
    chosen = {} if not dated(tokenizer) else {"chat_template": _pinned(source, arguments, day)}
    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **(dict(arguments) | chosen),
        )
    except Exception as error:  # a template is a program of somebody else's: anything may come out of it
        line = " ".join(str(error).split())[:200]
        raise RequestError(
            f"the chat template of {name} fails on these messages ({type(error).__name__}: {line}); use the plain form, or another template."
        ) from error
    squeezed = "".join(str(text).split())
    for message in messages:
        if "".join(message["content"].split()) not in squeezed:
            raise RequestError(
                f"the chat template of {name} leaves out what the {message['role']} says; the model would answer another prompt. "
                "Use the plain form, or another template."
            )
    return str(text)


def _pinned(source: Any, arguments: Mapping[str, Any], day: datetime.date) -> str:
    """The template that is meant, `strftime_now("…")` replaced by the text it stands for on `day`."""
    named = arguments.get("chat_template", "default")
    text = source.get(named, named) if isinstance(source, dict) else arguments.get("chat_template", source)
    return _CLOCK.sub(lambda call: repr(day.strftime(call[2])), text)


def dated(tokenizer: Any) -> bool:
    """Whether a template writes the date of the day it is used on."""
    source = getattr(tokenizer, "chat_template", None) or ""
    return "strftime_now" in (" ".join(map(str, source.values())) if isinstance(source, dict) else source)


def warn_of_date(name: str, day: datetime.date) -> None:
    """Say once a model that its prompts hold a date."""
    warnings.warn(
        f"the chat template of {name} writes the date into every prompt; it is {day.isoformat()} in this run and stands in its manifest.",
        stacklevel=4,
    )


def turn_end_ids(
    tokenizer: Any, name: str, *, day: datetime.date, arguments: Mapping[str, Any]
) -> frozenset[int]:
    """The special token that follows the model's turn in its chat template (`<end_of_turn>`, `<|im_end|>`); empty where none does."""
    said = "Yes indeed"
    chat = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": said}]
    try:
        text = render(tokenizer, name, chat, day=day, arguments=arguments, generation_prompt=False)
    except RequestError:
        return frozenset()
    after = text.rpartition(said)[2]
    ids = tokenizer(after, add_special_tokens=False).input_ids if after.strip() else []
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    return frozenset(i for i in ids[:1] if i in special)
