"""What a study adds around its figure: the checks of the probe (docs/method.md#sensitivity-analyses), the causal ladder, the biases that should not move, the switches.

Every function returns tables by the name they have in the run folder, the same as the single commands write.
"""

from __future__ import annotations

import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.discovery.causal import causal_ladder
from sae_bias.models.model import Model
from sae_bias.probe.checks import Checks, run_checks
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.runs.summary import CausalFigure
from sae_bias.saes.ids import FeatureRef
from sae_bias.workflows.as_published import intervention_switches, probe_switches

Tables = dict[str, pd.DataFrame]


def probe_checks(model: Model, base: ProbeResult, seed: int) -> Checks:
    """The sensitivity checks of the probe; `base` is not measured again."""
    return run_checks(model, base.pairs, base=base, seed=seed)


def feature_tables(
    model: Model, chosen: FeatureRef, pairs: PromptPairs, probe: Probe
) -> tuple[Tables, list[str], CausalFigure]:
    """The causal ladder of the chosen feature on `pairs`."""
    climbed = causal_ladder(model, chosen, pairs, probe)
    tables = {"ladder": climbed.to_frame(), "ceilings": climbed.ceilings, "direct_words": climbed.words}
    figure = CausalFigure(feature=str(chosen), layer=climbed.layer, bias=climbed.base.bias)
    return tables, [climbed.note] if climbed.note else [], figure


def switch_tables(
    model: Model, pairs: PromptPairs, probe: Probe, base: ProbeResult, chosen: FeatureRef | None, seed: int
) -> tuple[Tables, list[str]]:
    """Profile `as_published`: how each choice the study leaves open moves the bias and the reduction (docs/method.md#verdict-on-a-published-figure)."""
    tables = {"switches_probe": probe_switches(model, pairs, probe, base=base)}
    if chosen is None:
        return tables, ["no feature was chosen, so the intervention's switches were not run"]
    try:
        tables["switches_intervention"] = intervention_switches(model, pairs, chosen, probe, seed=seed)
    except RequestError as error:
        return tables, [f"the intervention's switches were not run: {error}"]
    return tables, []
