"""Profile `as_published`: the plausible choices the study leaves open, each a labeled switch, and how each moves the figure.

None of them is ever a default. Probe switches change how words are read; intervention switches change what "suppressing the
feature" does. For the latter the best strength is given twice: chosen and read on all pairs, as the study seems to have done
(in-sample), and chosen on the tune split and read on the report split (held out). With nine strengths and a true best of 65 %
the first reads 74.5 %, the second 62.0 % (simulation, docs/method.md#choosing-a-strength).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.models.model import Model
from sae_bias.models.residuals import residuals
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.load import load_lexicon
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.load import as_feature
from sae_bias.stats.clustered import clustered_mean
from sae_bias.stats.design import split_templates
from sae_bias.steering.edits import Clamp, Reconstruct
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.intervention import FeatureLike, Intervention

STRENGTHS = (0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, -8.0)
"""Clamp values in units of the feature's largest activation on the AI prompts; the study does not state its own."""
LEAN: dict[str, Any] = {"controls": False, "levels": False}
"""A switch is compared in the bias alone."""
PROBE_COLUMNS = ["switch", "open", "bias", "ci_low", "ci_high", "p_value", "n_words", "note"]


# ── the probe's switches
def probe_switches(
    model: Model, pairs: PromptPairs, probe: Probe | None = None, *, base: ProbeResult | None = None
) -> pd.DataFrame:
    """The bias as measured and under each switch, one at a time.

    `open` marks the choices that the study leaves open and that keep its unit: only they count for a verdict's range. The
    study names its score and its statistic, so those rows are for comparison.
    """
    probe = probe or default_probe(pairs)
    base = base or run_probe(model, pairs, probe, **LEAN)
    rows = [_row("as measured", base, True, "single-token words in context, two-way clustered interval")]
    rows.append(_plain_t(base))

    def add(name: str, result: ProbeResult, note: str = "", *, is_open: bool = True) -> None:
        rows.append(_row(name, result, is_open, note))

    def again(**options: Any) -> ProbeResult:
        return run_probe(model, pairs, probe.with_options(**options), **LEAN)

    add(
        "first token of long words",
        again(tokens="first"),
        "a word of several tokens scored by its first alone",
    )
    add(
        "words encoded alone",
        again(tokens="alone"),
        "the first token of each word encoded without its prompt",
    )
    if model.softcap is not None:
        add("no final softcap", again(softcap=False))
    if probe.bundled:
        named = load_lexicon("published")
        words = [w.word for w in base.vocabulary.kept if w.word in {*named.positive, *named.negative}]
        with suppress(RequestError):  # none of them on one side is a single token here
            add("only the words the study names", base.select_words(words))
    for stem in pairs.stems[1:] if all(p.stem for p in pairs) else ():
        add(f"stem {stem!r}", run_probe(model, pairs.with_stem(stem), probe, **LEAN))
    if base.single_tokens:
        note = "the study scores by mean logit"
        add("score logodds", base.rescored("logodds"), note, is_open=False)
        add("score auroc", base.rescored("auroc"), f"{note}; a probability, not nats", is_open=False)
    return pd.DataFrame(rows, columns=PROBE_COLUMNS)


def _row(switch: str, result: ProbeResult, is_open: bool, note: str) -> dict[str, Any]:
    low, high = result.ci
    return {
        "switch": switch, "open": is_open, "bias": result.bias, "ci_low": low, "ci_high": high, "p_value": result.p_value,
        "n_words": len(result.vocabulary.kept), "note": note,
    }  # fmt: skip


def _plain_t(base: ProbeResult) -> dict[str, Any]:
    """The ordinary t-test over pairs, as if all were independent."""
    stat = clustered_mean(base.pair_bias, [str(i) for i in range(base.n_pairs)])
    note = f"{base.n_pairs} pairs as if independent: rejects 57 % of true nulls at 5 % where templates and entities matter"
    return _row("plain t over pairs", base, False, note) | {
        "ci_low": stat.ci_low, "ci_high": stat.ci_high, "p_value": stat.p_value,
    }  # fmt: skip


def switch_range(switches: pd.DataFrame) -> tuple[float, float]:
    """Lowest and highest bias over the open switches."""
    values = switches.loc[switches["open"].astype(bool), "bias"].dropna()
    return (float(values.min()), float(values.max())) if len(values) else (float("nan"), float("nan"))


def verdict(
    published: float | None, mean: float, ci: tuple[float, float], switches: tuple[float, float] | None = None
) -> str:
    """The verdict fixed in advance (docs/method.md#verdict-on-a-published-figure), the first of these that holds.

    agrees: the published value lies in the interval. within the switches' range: between the lowest and highest figure that the
    open switches give. same sign only. opposite. "no published figure" or "not re-measured here" where one is missing.
    """
    if published is None or np.isnan(published):
        return "no published figure"
    if np.isnan(mean):
        return "not re-measured here"
    if ci[0] <= published <= ci[1]:
        return "agrees"
    if switches is not None and switches[0] <= published <= switches[1]:
        return "within the switches' range"
    return "same sign only" if published * mean > 0 else "opposite"


# ── the intervention's switches
Rule = Callable[[float], tuple[Intervention, ...]]


def intervention_rules(feature: FeatureLike) -> dict[str, Rule]:
    """Each switch as what it does at a clamp value v; the first is ours."""
    ref = as_feature(feature).ref

    def clamp(*before: Intervention, **options: Any) -> Rule:
        return lambda value: (*before, Clamp(feature, value, **options))

    everywhere: dict[str, Any] = {"when": "always", "include_special": True}
    return {
        "clamp where active": clamp(),
        "edits at BOS": clamp(include_special=True),
        "clamp always": clamp(when="always"),
        "clamp always, at BOS": clamp(**everywhere),
        "full reconstruction": clamp(Reconstruct(ref.sae)),
        "full reconstruction, clamp always, at BOS": clamp(
            Reconstruct(ref.sae, include_special=True), **everywhere
        ),
    }


def intervention_switches(
    model: Model,
    pairs: PromptPairs,
    feature: FeatureLike,
    probe: Probe | None = None,
    *,
    strengths: Sequence[float] = STRENGTHS,
    splits: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The reduction at the best strength under each switch, in-sample and held out side by side.

    Args:
        strengths: clamp values in units of the feature's largest activation at the last token of the AI prompts.
        splits: templates under "tune" and "report"; halves from `seed` where None.

    Returns:
        One row a switch; `written_inactive` is the share of positions where the clamp wrote though the feature had not fired.

    Raises:
        RequestError: the feature never fires on the AI prompts, so it has no unit.
    """
    probe = probe or default_probe(pairs)
    splits = splits or split_templates(pairs.templates, {"tune": 0.5, "report": 0.5}, seed)
    top = _largest(model, pairs, feature)
    engine = ProbeEngine(model, pairs, probe)
    rows = []
    for name, rule in intervention_rules(feature).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says what a clamp everywhere writes
            runs = {s: engine.run(rule(s * top)) for s in strengths}
        row = {"switch": name} | _best_of({s: after for s, (after, _) in runs.items()}, engine.base, splits)
        clamp = runs[float(row["held_out_strength"])][1].edits[-1]
        row["written_inactive"] = clamp.written_inactive / max(clamp.positions_seen, 1)
        rows.append(row)
    return pd.DataFrame(rows)


def _best_of(
    curve: Mapping[float, ProbeResult], base: ProbeResult, splits: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Best strength chosen on all pairs and read there; chosen on tune and read on report."""
    best = min(curve, key=lambda s: abs(curve[s].bias))
    tuned = min(curve, key=lambda s: abs(curve[s].select(splits["tune"]).bias))
    inside = curve[best].reduction_from(base)
    held = curve[tuned].select(splits["report"]).reduction_from(base.select(splits["report"]))
    return {
        "in_sample_strength": best, "in_sample_reduction": inside.estimate, "in_sample_low": inside.ci_low, "in_sample_high": inside.ci_high,
        "held_out_strength": tuned, "held_out_reduction": held.estimate, "held_out_low": held.ci_low, "held_out_high": held.ci_high,
        "overshoot": held.overshoot,
    }  # fmt: skip


def _largest(model: Model, pairs: PromptPairs, feature: FeatureLike) -> float:
    found = as_feature(feature)
    resid = residuals(model, [p.ai for p in pairs], found.site)
    top = float(found.activation(resid).max())  # type: ignore[arg-type]
    if not top > 0:
        raise RequestError(
            f"{found.ref} never fires at the last token of the AI prompts; it has no unit of strength."
        )
    return top
