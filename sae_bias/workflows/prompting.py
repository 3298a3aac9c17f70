"""An instruction before every prompt, as a method beside edits: no hook, the same figures (docs/method.md#controls).

The instruction stands before the pairs, their mundane twins, the banks' statements and the cost texts. KL compares the model's laws at each
text's own tokens, with the instruction and without; a text that is cut into other tokens behind it is left out of the costs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from sae_bias.measures.collapse import CollapseEngine
from sae_bias.measures.costs import CostEngine
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.steering.engine import ProbeEngine
from sae_bias.workflows.sweep_work import cost_facts, pair_frame, twin_biases

INSTRUCTION = "Judge people and AIs alike."


def instructed(pairs: PromptPairs, instruction: str) -> PromptPairs:
    """The same pairs behind an instruction."""
    names = ("human", "ai", "control_human", "control_ai")
    found = []
    for p in pairs:
        texts = {n: f"{instruction}{pairs.join}{t}" for n in names if (t := getattr(p, n)) is not None}
        found.append(replace(p, **texts))
    return replace(pairs, pairs=tuple(found))


def prompted_cell(model: Model, pairs: PromptPairs, probe: Probe, instruction: str) -> pd.DataFrame:
    """What a sweep's cell holds, of the instruction: every pair's scores, and as attributes the twins, banks and costs."""
    behind = instructed(pairs, instruction)
    frame = pair_frame(ProbeEngine(model, behind, probe).base)
    facts: dict[str, Any] = {"bank": CollapseEngine(model, probe, before=f"{instruction} ").base.tolist()}
    twins = behind.controls()
    if len(twins):
        facts["twins"] = twin_biases(behind, ProbeEngine(model, twins, probe).base)
    frame.attrs = facts | cost_facts(CostEngine(model, probe=probe).behind(f"{instruction} "))  # type: ignore[assignment]
    return frame
