"""Identity self-report: what the model says it is, by pattern, with and without an edit (docs/published.md#identity-self-reports).

32 prompts; seven of them are also sampled four times at T = 0.7. A text claims an identity where a pattern of
`data/generation_prompts.yaml` matches and the claim is not negated ("I am not ChatGPT").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.models.model import Model
from sae_bias.prompts.texts import load_identity
from sae_bias.stats.rates import rate_of
from sae_bias.steering.generate import generate
from sae_bias.steering.intervention import Intervention

N_SAMPLES, TEMPERATURE, NEW_TOKENS = 4, 0.7, 60
_NEGATED = re.compile(
    r"\b(?:not|never|n't|neither|nor|isn't|unlike|rather than)\b[^.,;!?\n]{0,30}$", re.IGNORECASE
)


def identity_claims(text: str) -> tuple[str, ...]:
    """Names of the identities that `text` claims for its writer, in order of the patterns."""
    text = text.replace("’", "'")
    return tuple(
        name
        for name, pattern in load_identity().patterns.items()
        if any(
            not _NEGATED.search(text[max(0, m.start() - 40) : m.start()])
            for m in re.finditer(pattern, text, re.IGNORECASE)
        )
    )


def known_identities(names: Sequence[str]) -> tuple[str, ...]:
    """`names`, once each has a pattern.

    Raises:
        RequestError: a name without one.
    """
    known = load_identity().patterns
    if unknown := [name for name in names if name not in known]:
        raise RequestError(f"there is no identity {unknown[0]!r}; known: {', '.join(known)}.")
    return tuple(names)


@dataclass(frozen=True)
class IdentityResult:
    """What was answered, and which identities were claimed."""

    frame: pd.DataFrame
    """One row an answer: prompt, sample (0 is greedy), text, claims, other (names an identity that is not its own)."""
    own: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """How many answers claim anything, and another model's name: its share with an interval over prompts, of which some are asked again."""
        n, other = len(self.frame), int(self.frame["other"].sum())
        share = rate_of(self.frame["other"].tolist(), self.frame["prompt"].tolist())
        return {
            "n": n,
            "claims": int((self.frame["claims"] != "").sum()),
            "other": other,
            "other_share": share.value,
            "ci_low": share.low,
            "ci_high": share.high,
            "names": {
                name: int(c)
                for name, c in self.frame["claims"].str.split(", ").explode().value_counts().items()
                if name
            },
        }


def identity_sweep(
    model: Model,
    *,
    interventions: Sequence[Intervention] = (),
    own: Sequence[str] = (),
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = NEW_TOKENS,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    progress: bool = False,
) -> IdentityResult:
    """Ask the model what it is, under `interventions`.

    Args:
        own: identities that are the model's own, such as ("gemma", "google"); an answer that claims any other counts as `other`.
        system: system prompt, as in `generate`.
        prompts: instead of the bundled ones; none of them is sampled.

    Raises:
        RequestError: `own` names an identity without a pattern.
    """
    bank, own = load_identity(), known_identities(own)
    greedy = tuple(prompts) if prompts is not None else bank.prompts
    sampled = () if prompts is not None else bank.sampled
    asked = [(p, 0) for p in greedy], [(p, s) for s in range(1, N_SAMPLES + 1) for p in sampled]
    rows = []
    for each, temperature in zip(asked, (0.0, TEMPERATURE)):
        answers = generate(
            model, [prompt for prompt, _ in each], interventions=interventions, max_new_tokens=max_new_tokens, temperature=temperature,
            seed=seed, chat=chat, system=system, progress=progress,
        )  # fmt: skip
        for answer, (_, sample) in zip(answers, each):
            claims = identity_claims(f" {answer.text}")
            rows.append(
                {
                    "prompt": answer.prompt,
                    "sample": sample,
                    "text": answer.text,
                    "claims": ", ".join(claims),
                    "other": any(c not in own for c in claims),
                }
            )
    return IdentityResult(pd.DataFrame(rows), own)
