"""A run's summary as typed values: what summary.json holds, and what the report, the terminal and Python read alike.

Every block is frozen, and None where it was not measured. In a block a number that is undefined (asked for, without a value) is NaN
in Python and null in the file; one that was not measured is absent from the file and None in Python. Neither is ever 0. Blocks and
fields that this version does not know (a plugin's, a newer version's) are kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict

from sae_bias.core.files import plain
from sae_bias.probe.result import ProbeResult
from sae_bias.stats.clustered import Clustered, effect_sizes


def _undefined(value: Any) -> Any:
    return float("nan") if value is None else value


Number = Annotated[float | None, BeforeValidator(_undefined)]
"""NaN: undefined; None: not measured."""


class Block(BaseModel):
    """One block of the summary; its fields are read as attributes, or by name as in the file."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    @classmethod
    def from_facts(cls, facts: Mapping[str, object]) -> Self:
        """A block from plain values (numpy's own among them)."""
        return cls.model_validate(plain(dict(facts)))

    def keys(self) -> Iterable[str]:
        """Names of the fields that were given, so that `{**block}` is a dict of them."""
        return self.facts().keys()

    def __getitem__(self, name: str) -> Any:  # a field of any type: attributes are typed
        return self.facts()[name]

    def __contains__(self, name: object) -> bool:
        return name in self.model_fields_set

    def get(self, name: str, default: Any = None) -> Any:
        """A field by name, or `default` where it was not measured."""
        return self.facts().get(name, default)

    def facts(self) -> dict[str, Any]:
        """Plain values, those that were given."""
        return self.model_dump(exclude_unset=True)


class Effect(Block):
    """A mean in nats with its two-way clustered interval."""

    mean: Number = None
    ci_low: Number = None
    ci_high: Number = None
    p_value: Number = None
    df: Number = None
    n_pairs: int | None = None
    n_templates: int | None = None
    n_entities: int | None = None
    reason: str | None = None
    """Why there is no interval."""
    d_z: Number = None
    share_templates_positive: Number = None


class MassFigure(Block):
    """What share of the next-token probability the evaluation words hold, and where they rank."""

    total: Number = None
    positive: Number = None
    negative: Number = None
    best_word: str | None = None
    best_rank: Number = None
    beyond_1000: Number = None
    little: bool | None = None
    says: str | None = None


class NullFigure(Block):
    """The primary figure with random words: how large it is within 95 % of lists, and the empirical p."""

    of: str | None = None
    p_value: Number = None
    within: Number = None
    n: int = 0
    reason: str | None = None


class MultiverseFigure(Block):
    """The primary figure over all specifications."""

    of: str | None = None
    n: int = 0
    median: Number = None
    same_sign: Number = None
    outside_null: Number = None


class ChoiceFigure(Block):
    """The primary figure of the forced choice, in nats of log-odds."""

    of: str | None = None
    mean: Number = None
    ci_low: Number = None
    ci_high: Number = None
    p_value: Number = None
    mass: Number = None
    agrees: bool | None = None


class ChosenFeature(Block):
    """The feature that the run is about; without an id none was chosen."""

    id: str | None = None
    index: int | None = None
    called: str | None = None
    why: str | None = None
    tested: str | None = None
    """What was tested of it, in a sentence."""


class ReductionFigure(Block):
    """B_0 - B_s as a share of B_0 (Fieller's interval) and in nats."""

    estimate: Number = None
    ci_low: Number = None
    ci_high: Number = None
    bounded: bool | None = None
    overshoot: bool | None = None
    bias_before: Number = None
    bias_after: Number = None
    change: Number = None
    change_low: Number = None
    change_high: Number = None
    of: str | None = None
    """The edit in words, where it is not the ablation."""
    undefined: str | None = None
    """Why the share has no value."""


class DidFigure(Block):
    """The difference in differences before and after the edit, and how much of it was removed, in nats."""

    before: Number = None
    after: Number = None
    change: Number = None
    change_low: Number = None
    change_high: Number = None


class Shift(Block):
    """How far each side's mean score moved, in nats."""

    human: Number = None
    ai: Number = None


class SpecificFigure(Block):
    """The part of the reduction that is not a flattening of all judgements, and the slope β it is made with."""

    estimate: Number = None
    ci_low: Number = None
    ci_high: Number = None
    did_estimate: Number = None
    """The same of the difference in differences, where pairs have mundane twins."""
    did_ci_low: Number = None
    did_ci_high: Number = None
    beta: Number = None
    beta_other: Number = None
    beta_ai: Number = None
    undefined: str | None = None
    """Why it has no value."""
    bank_changed: dict[str, Number] | None = None
    """Share of each bank's prompts that the edit changed."""


class Cost(Block):
    """KL on one kind of text, nats a token."""

    kl_mean: Number = None
    kl_p95: Number = None
    fired: Number = None
    """Share of the texts on which the edit wrote anything."""


class ControlsFigure(Block):
    """Where the feature stands among its control interventions."""

    n: int = 0
    p_value: Number = None
    median: Number = None
    multiple_of_median: Number = None
    percentile95: Number = None
    statistic: str | None = None
    """`specific_reduction`, or `removed_nats` where the valence banks were not run; absent in runs of version 0.1."""
    value: Number = None
    """The feature's own statistic."""
    verdict: str | None = None
    """Whether it beats its controls: yes, no, or undetermined; absent in runs of version 0.2 and before."""
    kinds: dict[str, ControlsFigure] | None = None
    """Matched features and random directions, each with its own p."""


class StrengthFigure(Block):
    """One cell of the sweep."""

    strength: Number = None
    reduction: Number = None
    specific_reduction: Number = None
    ci_low: Number = None
    ci_high: Number = None
    """The interval of the specific reduction."""
    beta: Number = None
    kl_off: Number = None
    label: str | None = None
    outside_observed: bool | None = None


class BestStrength(Block):
    """The strength chosen on tune templates, and what it does on report templates."""

    in_sample: StrengthFigure = StrengthFigure()
    held_out: StrengthFigure = StrengthFigure()
    undefined: str | None = None
    """Why no strength is named."""


class TextMeasures(Block):
    """Means over the texts of one condition."""

    n_tokens: Number = None
    repetition: Number = None
    nll: Number = None
    refusal: Number = None
    default_negativity: Number = None
    distinct_1: Number = None
    distinct_2: Number = None


class BehaviorFigures(Block):
    """A behavior over the strengths of an edit, and the strengths at which capability stays within the margin."""

    behavior: str | None = None
    n_strengths: int = 0
    usable_low: Number = None
    usable_high: Number = None
    margin: Number = None
    usable: str | None = None
    """The usable range in words."""


class JudgeFigures(Block):
    """What was asked of judges, and how much of it came back."""

    judges: tuple[str, ...] = ()
    n_items: int = 0
    n_requests: int = 0
    n_unanswered: int = 0
    n_unreadable: int = 0
    failures: tuple[str, ...] = ()


class Mismatch(Block):
    """What the edit removed where it should remove less: at another layer, in another SAE."""

    label: str | None = None
    removed_nats: Number = None
    removed_nats_low: Number = None
    removed_nats_high: Number = None


class Conditions(Block):
    """The texts without and with the edit."""

    unsteered: TextMeasures | None = None
    steered: TextMeasures | None = None


class RoleShares(Block):
    """Pairs of roles under one arm: how often the answer depends on who is asked."""

    n: int = 0
    inconsistent: int = 0
    ci_low: Number = None
    ci_high: Number = None
    mean_shift: Number = None


class ScenarioFigures(Block):
    """Options chosen before and after the edit: "became more probable" and "choice flipped" are two figures."""

    form: str | None = None
    score: str | None = None
    n: int | None = None
    aligned_before: int | None = None
    aligned_after: int | None = None
    improved: int | None = None
    worsened: int | None = None
    unchanged: int | None = None
    sign_p: Number = None
    gained: int | None = None
    lost: int | None = None
    mcnemar_p: Number = None
    edited: bool = True
    chat: bool | None = None
    system: str | None = None
    roles: dict[str, RoleShares] | None = None


class IdentityArm(Block):
    """Answers that claim an identity."""

    n: int = 0
    other: int = 0
    """Of them other than the model's own."""
    ci_low: Number = None
    ci_high: Number = None
    names: dict[str, int] = {}


class IdentityFigures(Block):
    """Whom the model claims to be, before and after the edit."""

    own: tuple[str, ...] = ()
    edited: bool = False
    before: IdentityArm | None = None
    after: IdentityArm | None = None


class CausalFigure(Block):
    """Where the causal analysis was made: its feature, layer, and the unsteered bias of its pairs."""

    feature: str | None = None
    layer: int | None = None
    bias: Number = None


class CalibrationFigure(Block):
    """How many pass marks were met."""

    n_marks: int = 0
    missed: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


class Summary(Block):
    """summary.json of a run."""

    question: str | None = None
    sides: tuple[str, str] | None = None
    bias: Effect | None = None
    control_bias: Effect | None = None
    difference_in_differences: Effect | None = None
    mass: MassFigure | None = None
    random_words: NullFigure | None = None
    multiverse: MultiverseFigure | None = None
    forced_choice: ChoiceFigure | None = None
    warnings: tuple[str, ...] = ()
    """What a reader of the primary figure must know: the sign hangs on the stem, the forced choice disagrees."""
    notes: tuple[str, ...] = ()
    feature: ChosenFeature | None = None
    reduction: ReductionFigure | None = None
    specific_reduction: SpecificFigure | None = None
    did: DidFigure | None = None
    shift: Shift | None = None
    costs: dict[str, Cost] | None = None
    controls: ControlsFigure | None = None
    mismatches: tuple[Mismatch, ...] = ()
    best_strength: BestStrength | None = None
    split: str | None = None
    """The split that a single sweep's figures are of."""
    generations: Conditions | None = None
    behavior: BehaviorFigures | None = None
    judge: JudgeFigures | None = None
    scenarios: ScenarioFigures | None = None
    scenarios_system: ScenarioFigures | None = None
    identity: IdentityFigures | None = None
    ladder: CausalFigure | None = None
    calibration: CalibrationFigure | None = None
    truth: dict[str, object] = {}
    """What was planted in an organism."""
    seconds: dict[str, float] = {}


# --- from results ---
def bias_summary(base: ProbeResult) -> dict[str, object]:
    """Sides, bias and, where there are mundane twins, theirs and the difference."""
    out: dict[str, object] = {
        "sides": base.sides,
        "bias": effect(base.stat, base.pair_bias, base.clusters[0]),
    }
    if base.control is not None:
        control, difference = base.control, base.difference_in_differences()
        out["control_bias"] = effect(control.stat, control.pair_bias, control.clusters[0])
        out["difference_in_differences"] = effect(difference.stat, difference.values, difference.templates)
    if base.log_normaliser is not None or not base.single_tokens:
        mass = base.mass
        names = ("total", "positive", "negative", "best_word", "best_rank", "beyond_1000", "little")
        out["mass"] = MassFigure.from_facts({n: getattr(mass, n) for n in names} | {"says": str(mass)})
    return out


def effect(stat: Clustered, values: np.ndarray, templates: Sequence[str]) -> Effect:
    """The block of one clustered mean over pairs."""
    sizes = effect_sizes(values, templates)
    return Effect(
        mean=stat.mean, ci_low=stat.ci_low, ci_high=stat.ci_high, p_value=stat.p_value, df=stat.df, n_pairs=stat.n,
        n_templates=stat.n_templates, n_entities=stat.n_entities, reason=stat.reason or None,
        d_z=sizes.d_z, share_templates_positive=sizes.share_positive,
    )  # fmt: skip
