"""A probe under any number of interventions, each for the price of the later layers over the prefixes it changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sae_bias.core.site import Site
from sae_bias.models.forward import Final
from sae_bias.models.model import Model
from sae_bias.models.reads import Spot
from sae_bias.probe.reading import PairReading, PlanReader, Reading, ReadingPlan
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.steering.intervention import Intervention
from sae_bias.steering.receipt import Receipt
from sae_bias.steering.shared import SharedRunner


class ReadingEngine:
    """A reading plan run once without edits and then once per cell."""

    def __init__(self, model: Model, plan: ReadingPlan, *, sites: Sequence[Site] = ()):
        """`sites`: where the cells will edit; the base run keeps the residual there."""
        self.plan = plan
        self.reader = PlanReader(plan)
        self.runner = SharedRunner(model, self.reader, batch_size=plan.batch_size)
        self.runner.base(sorted({s.layer for s in sites if s.is_resid_post}))
        self.base = self.reader.reading()

    def run(self, edits: Sequence[Intervention]) -> tuple[Reading, Receipt]:
        """The reading under `edits` (the base one itself where nothing changed), and what they did."""
        return self.run_many([edits])[0]

    def run_many(self, cells: Sequence[Sequence[Intervention]]) -> list[tuple[Reading, Receipt]]:
        """`run` for several cells at once."""
        readers: dict[int, PlanReader] = {}

        def visit(cell: int, wanted: Sequence[Sequence[Spot]], final: Final) -> None:
            if cell not in readers:
                readers[cell] = self.reader.copy()
            readers[cell].take(wanted, final)

        receipts = self.runner.run_many(cells, visit)
        return [
            (readers[i].reading() if i in readers else self.base, receipt)
            for i, receipt in enumerate(receipts)
        ]


class ProbeEngine:
    """One model, one set of pairs, one probe; any number of interventions, each for the price of the later layers."""

    def __init__(
        self,
        model: Model,
        pairs: PromptPairs,
        probe: Probe,
        *,
        controls: bool = False,
        levels: bool = False,
        batch_size: int | None = None,
        sites: Sequence[Site] = (),
    ):
        """`controls`: read the mundane twins too, where the pairs have them (pairs without one are left out): the primary figure of
        every result is then the difference in differences. `sites`: where the cells will edit; the base run keeps the residual there.
        """
        twins = pairs.controls() if controls else None
        self.twins: ProbeEngine | None = None
        if twins:
            pairs = replace(pairs, pairs=tuple(p for p in pairs if p.control_human and p.control_ai))
            self.twins = ProbeEngine(model, twins, probe, levels=levels, batch_size=batch_size, sites=sites)
        self.model = model
        self.reading = PairReading(model, pairs, probe, levels=levels, batch_size=batch_size)
        self.engine = ReadingEngine(model, self.reading.plan, sites=sites)
        self.base: ProbeResult = self.reading.result(self.engine.base)
        if self.twins is not None:
            self.base = replace(self.base, control=self.twins.base)

    def run(self, edits: Sequence[Intervention]) -> tuple[ProbeResult, Receipt]:
        """The probe under `edits`, and what they did."""
        return self.run_many([edits])[0]

    def run_many(self, cells: Sequence[Sequence[Intervention]]) -> list[tuple[ProbeResult, Receipt]]:
        """`run` for several cells at once: those that edit one site share passes. Receipts are of the pairs, not of their twins."""
        own = [
            (self.base if reading is self.engine.base else self.reading.result(reading), receipt)
            for reading, receipt in self.engine.run_many(cells)
        ]
        if self.twins is None:
            return own
        mundane = [result for result, _ in self.twins.run_many(cells)]
        return [
            (after if after.control is control else replace(after, control=control), receipt)
            for (after, receipt), control in zip(own, mundane)
        ]
