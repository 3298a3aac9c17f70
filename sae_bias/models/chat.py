"""The chat form of the probe: the sentence in the user's turn, the stem prefilled in the model's turn.

The word is read after the stem's last token, exactly as in the plain form (docs/method.md#chat-form), so what differs is the frame and
nothing else. The text of a chat prompt carries no BOS of its own where the tokenizer adds one: exactly one stands there.
"""

from __future__ import annotations

from dataclasses import replace

from sae_bias.core.errors import RequestError
from sae_bias.models.model import Model
from sae_bias.prompts.pairs import PromptPairs

CHAT_QUESTION = "How would you judge this? {sentence}"
"""What the user asks; {sentence} is the prompt without its stem."""


def chat_pairs(model: Model, pairs: PromptPairs, question: str = CHAT_QUESTION) -> PromptPairs:
    """`pairs` as chat prompts of `model`, with their controls and neutral prompts.

    Raises:
        RequestError: the model has no chat template; the pairs' stem is not known; `question` lacks {sentence}.
    """
    if "{sentence}" not in question:
        raise RequestError(
            f"the question {question!r} has no {{sentence}}; write it where the sentence stands."
        )

    def chat(text: str | None, stem: str | None) -> str | None:
        return None if text is None else chat_prompt(model, text, stem, question)

    turned = tuple(
        replace(
            p,
            **{
                name: chat(getattr(p, name), p.stem)
                for name in ("human", "ai", "control_human", "control_ai")
            },
        )
        for p in pairs
    )
    neutral = tuple(
        replace(p, text=chat(p.text, p.stem), control=chat(p.control, p.stem)) for p in pairs.neutral_prompts
    )
    return replace(pairs, pairs=turned, neutral_prompts=neutral, name=f"{pairs.name} (chat)")


def opening_ids(model: Model, text: str, *, chat: bool = False, system: str | None = None) -> list[int]:
    """Ids of `text` as a prompt to be continued: as it stands, or as a user's turn, with a system prompt (docs/published.md#system-prompts).

    In the plain form, and where the chat template has no system role, the system prompt opens the text.
    """
    if not chat:
        return model.encode(f"{system}\n\n{text}" if system else text)
    opening = [{"role": "system", "content": system}] if system else []
    return model.encode_chat(with_system_role(model, [*opening, {"role": "user", "content": text}]))


def with_system_role(model: Model, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """`messages`; where the chat template has no system role, a leading system prompt opens the first user's turn."""
    if len(messages) < 2 or messages[0]["role"] != "system" or takes_system(model):
        return messages
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def takes_system(model: Model) -> bool:
    """Whether the chat template has a system role (Gemma 2's raises, others leave it out); elsewhere the text opens the user turn."""
    messages = [{"role": "system", "content": "Zebra quartz."}, {"role": "user", "content": "Hello there."}]
    try:
        model.chat_text(messages)
    except RequestError:
        model.chat_text(messages[1:])  # a template that fails on any chat is told as that
        return False
    return True


def chat_prompt(model: Model, prompt: str, stem: str | None, question: str = CHAT_QUESTION) -> str:
    """One prompt that ends in `stem`, as the text of a chat whose last turn begins with that stem."""
    if not stem or not prompt.endswith(stem):
        raise RequestError(
            f"the stem of the prompt {prompt!r} is not known, so it cannot be prefilled; load the pairs with stem=."
        )
    sentence = prompt.removesuffix(stem).strip()
    return model.chat_text(
        [{"role": "user", "content": question.replace("{sentence}", sentence)}], prefill=stem
    )
