"""The definitions that decide headlines, taken a second time on the bundled organisms: transformers with plain hooks, safetensors, scipy.

Of the package only prompts, words and an organism's truth.json are read; every figure it gives is held against the one made here, and
the marks of calls, specific reduction, costs, controls, small designs and ratios are asserted of both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from independent import Plain, PlainSae, ablate, clamp_active
from scipy import stats

import sae_bias as sb
from sae_bias.measures.collapse import CollapseEngine
from sae_bias.measures.costs import CostEngine, pooled_kl_off
from sae_bias.models.catalog import organism_folder
from sae_bias.prompts.load import load_lexicon
from sae_bias.prompts.texts import COST_TEXTS, load_bank, load_texts
from sae_bias.stats.clustered import clustered_mean, clustered_means
from sae_bias.steering.controls import MATCHED, RANDOM, control_test
from sae_bias.steering.engine import ProbeEngine
from sae_bias.workflows.cells import Cell

pytestmark = pytest.mark.slow
FOLDER = organism_folder("planted")
TRUTH = json.loads((FOLDER / "truth.json").read_text())
PLANTED, VALENCE = (TRUTH["constructed"][name] for name in ("index", "valence_index"))
SAES = {"constructed": TRUTH["layer"]} | {f["sae"]: f["layer"] for f in TRUTH["saes"]}
LAYER_2 = next(name for name, layer in SAES.items() if layer == 2)


@dataclass(frozen=True)
class Hand:
    """A model as transformers loads it; prompts of one length are run together."""

    plain: Plain

    @property
    def words(self) -> tuple[list[int], list[int]]:
        words = load_lexicon()
        return tuple(
            [self.plain.word("A dog sleeps. This is", w)[0] for w in side]
            for side in (words.positive, words.negative)
        )  # type: ignore[return-value]

    def last(self, texts, edit=None, layer=0) -> torch.Tensor:
        """Logits at the last token of each text, BOS never edited."""
        return torch.stack([z[-1] for z in self.logits(texts, edit, layer)])

    @torch.no_grad()
    def logits(self, texts, edit=None, layer=0) -> list[torch.Tensor]:
        out: list[Any] = [None] * len(texts)
        for rows, ids in self._batches(texts):

            def hook(module, args, output):
                x = output[0] if isinstance(output, tuple) else output
                new = x + edit(x.flatten(0, 1)).view_as(x) * (torch.arange(x.shape[1]) > 0)[:, None]
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handle = self.plain.layer(layer).register_forward_hook(hook) if edit else None
            z = self.plain.hf(input_ids=ids).logits.float()
            if handle:
                handle.remove()
            for row, values in zip(rows, z):
                out[row] = values
        return out

    @torch.no_grad()
    def residuals(self, texts, layer) -> torch.Tensor:
        """Residuals after `layer` at the last token of each text."""
        out = torch.zeros(len(texts), self.plain.hf.config.hidden_size)
        for rows, ids in self._batches(texts):
            hidden = self.plain.hf(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]
            out[rows] = hidden[:, -1] if layer + 1 < TRUTH["n_layers"] else torch.nan
        return out

    def score(self, z: torch.Tensor) -> np.ndarray:
        positive, negative = self.words
        return (z[:, positive].mean(1) - z[:, negative].mean(1)).double().numpy()

    def scores(self, texts, edit=None, layer=0) -> np.ndarray:
        return self.score(self.last(texts, edit, layer))

    def _batches(self, texts):
        ids = [self.plain.ids(t) for t in texts]
        for n in sorted({len(i) for i in ids}):
            rows = [k for k, i in enumerate(ids) if len(i) == n]
            for start in range(0, len(rows), 128):
                part = rows[start : start + 128]
                yield part, torch.tensor([ids[k] for k in part])


@cache
def hand() -> Hand:
    return Hand(Plain.load(FOLDER / "model"))


@cache
def plain_sae(name: str) -> PlainSae:
    return PlainSae.load(FOLDER / "sae" / name)


@pytest.fixture(scope="module")
def planted():
    return sb.load_model("organism:planted")


@pytest.fixture(scope="module")
def held_out():
    return sb.load_pairs().select(corpus=False)


# --- 1. calls


def _t_and_p(x, floor):
    """t of each feature over units, the variance floored, and the share of 10,000 sign-flips whose largest |t| reaches it."""
    n, square = len(x), (x**2).mean(0)

    def t_of(mean):
        variance = np.maximum((square - mean**2) * n / (n - 1), floor) / n
        return np.divide(mean, np.sqrt(variance), out=np.zeros_like(mean), where=variance > 0)

    signs = np.random.default_rng(123).choice([-1.0, 1.0], (10_000, n))
    largest = np.array([np.abs(t_of(s @ x / n)).max() for s in signs])
    t = t_of(x.mean(0))
    return t, np.array([(1 + (largest >= abs(v) - 1e-9).sum()) / 10_001 for v in t])


def _bound(x):
    """One-sided 95 % lower bound of a mean."""
    return x.mean(0) - stats.t.ppf(0.95, len(x) - 1) * x.std(0, ddof=1) / np.sqrt(len(x))


def _calls(ranking, acts, grid):
    """Call of every feature from its activations [prompt, feature] on the grid, and its corrected p."""
    cell = {"AS": ("ai", "speech"), "AN": ("ai", "nonspeech"), "HS": ("human", "speech"), "HN": ("human", "nonspeech"), "DS": ("animal", "speech")}  # fmt: skip

    def means(name, matches):
        rows = [
            [i for i, p in enumerate(grid) if p.match == m and (p.group, p.act) == cell[name]]
            for m in matches
        ]
        return np.stack([acts[r].mean(0) for r in rows])

    d, r = ({c: means(c, ranking.split[part]) for c in cell} for part in ("discover", "report"))
    used = [i for i, p in enumerate(grid) if p.match is not None and (p.group, p.act) in cell.values()]
    floor = 0.05**2 * (acts[used] ** 2).mean(0)
    t, p = _t_and_p((d["AS"] - d["AN"]) - (d["HS"] - d["HN"]), floor)
    paired = ranking.pairing.groupby("match", sort=False)["harm"].apply(list)
    harm = np.stack(
        [
            np.mean(
                [acts[[i for i, q in enumerate(grid) if q.statement == h and q.group in ("human", "animal")]].mean(0) for h in names],
                axis=0,
            )
            for names in paired
        ]
    )  # fmt: skip
    speech = means("AS", list(paired.index))
    gaps = {k: r["AS"] - r[k] for k in ("AN", "HS", "DS")} | {"HC": speech - harm}
    level = r["AS"].mean(0)
    loud = {k: (level > 0) & (_bound(g) >= level / 2) for k, g in gaps.items()}
    other = {k: r[k].mean(0) for k in ("AN", "HS", "DS")} | {"HC": harm.mean(0)}
    quiet = {k: (other[k] > 0) & (_bound(-g) >= other[k] / 2) for k, g in gaps.items()}
    calls = np.full(acts.shape[1], "no", dtype=object)
    for sign, rule, name in ((1, loud, "AI-speech"), (-1, quiet, "silent at AI speech")):
        found = (p <= 0.05) & (np.sign(t) == sign) & rule["AN"] & rule["HS"] & rule["DS"]
        calls[found & rule["HC"]] = name
        calls[found & ~rule["HC"]] = "negative judgement"
    return calls, p


@pytest.mark.parametrize("sae", SAES)
def test_calls_by_hand(planted, sae):
    """Cells, corrected p, pairing on the unsteered score and one-sided bounds: every feature of every SAE is called alike."""
    grid = sb.load_grid()
    texts = [p.text for p in grid]
    ranking = sb.rank_features(planted, f"organism:planted/{sae}", grid, by="interaction")
    with torch.no_grad():
        acts = plain_sae(sae).acts(hand().residuals(texts, SAES[sae])).double().numpy()
    calls, p = _calls(ranking, acts, grid)
    tool = ranking.frame.set_index("index").loc[range(len(calls)), "call"].to_numpy()
    clear = (p < 0.035) | (p > 0.07)  # two draws of sign-flips differ by less
    tool = np.where(tool == "AI identity", "no", tool)  # rests on another test
    assert clear.sum() > len(clear) - 5
    assert calls[clear].tolist() == tool[clear].tolist()
    called = np.flatnonzero(calls == "AI-speech").tolist()
    assert called == ([PLANTED] if sae == "constructed" else [])
    assert sae == "constructed" or (calls == "negative judgement").any()
    print(
        f"{sae}: AI-speech {called}, negative judgement {np.flatnonzero(calls == 'negative judgement').tolist()}"
    )


def test_badly_judged_deeds_are_paired_on_the_unsteered_score(planted):
    grid = sb.load_grid()
    pairing = sb.rank_features(planted, "organism:planted/constructed", grid, by="interaction").pairing
    score = dict(zip([p.text for p in grid], hand().scores([p.text for p in grid])))

    def mean(statement, groups):
        return np.mean([score[p.text] for p in grid if p.statement == statement and p.group in groups])

    assert len(pairing) >= 12
    assert pairing["harm"].is_unique
    for row in pairing.to_dict("records"):
        speech, harm = mean(row["ai_speech"], ("ai",)), mean(row["harm"], ("human", "animal"))
        assert abs(harm - speech) <= 0.25
        assert (row["score_ai_speech"], row["score_harm"]) == pytest.approx((speech, harm), abs=1e-3)


# --- 2. specific reduction


@cache
def most_causal() -> int:
    """The feature of the layer-2 SAE that removes most of the bias of all pairs, by ablating those that fire most at AI prompts."""
    pairs, sae = sb.load_pairs(), plain_sae(LAYER_2)
    human, ai = [p.human for p in pairs], [p.ai for p in pairs]
    with torch.no_grad():
        gap = (sae.acts(hand().residuals(ai, 2)) - sae.acts(hand().residuals(human, 2))).mean(0).abs()
    first = gap.argsort(descending=True)[:12].tolist()
    after = [_bias(human, ai, sae.edit({f: ablate}), 2) for f in first]
    return first[int(np.argmin(after))]


def _bias(human, ai, edit=None, layer=0) -> float:
    return float((hand().scores(human, edit, layer) - hand().scores(ai, edit, layer)).mean())


def _specific(pairs, edit, layer):
    """SR, β and what is left of the bias."""
    human, ai = [p.human for p in pairs], [p.ai for p in pairs]
    slopes = []
    for bank in ("other", "ai"):
        texts = [i.text for i in load_bank(bank)]
        slopes.append(stats.linregress(hand().scores(texts), hand().scores(texts, edit, layer)).slope)
    beta, left = min(*slopes, 1.0), _bias(human, ai, edit, layer) / _bias(human, ai)
    return max(beta, 0.0) - abs(left), beta, left


CASES = [("ablate the planted feature", "constructed", PLANTED, None), ("ablate the valence read-out", "constructed", VALENCE, None),
         ("clamp at -40", LAYER_2, None, -40.0), ("clamp at -100", LAYER_2, None, -100.0)]  # fmt: skip


@pytest.mark.parametrize(("name", "sae", "index", "value"), CASES, ids=[c[0] for c in CASES])
def test_specific_reduction_by_hand(planted, held_out, name, sae, index, value):
    """max(β, 0) - |B_s/B_0| with β by scipy's regression over each bank."""
    index = most_causal() if index is None else index
    rule = ablate if value is None else clamp_active(value)
    sr, beta, left = _specific(held_out, plain_sae(sae).edit({index: rule}), SAES[sae])
    ref = f"organism:planted/{sae}#{index}"
    edit = sb.Ablate(ref) if value is None else sb.Clamp(ref, value)
    engine = ProbeEngine(planted, held_out, sb.Probe())
    found = CollapseEngine(planted, sb.Probe()).run([edit], engine.base, engine.run([edit])[0]).specific
    assert (found.estimate, found.beta) == pytest.approx((sr, beta), abs=2e-3)
    assert sr <= min(beta, 1) + 1e-12 or beta < 0
    print(f"{name}, {ref}: SR {sr:.4f}, β {beta:.4f}, left {left:.4f}; β − B_s/B_0 {beta - left:.3f}")
    if name == "ablate the planted feature":
        assert sr >= 0.9
    elif value is None:
        assert sr <= 0
    else:
        assert sr < 0 < beta - left


# --- 3. costs


def _kl(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _costs(edit, layer):
    """KL of each kind of text and KL_off over the last tokens of all."""
    out, off = {}, []
    words = torch.tensor([*hand().words[0], *hand().words[1]])
    for kind in COST_TEXTS:
        texts = load_texts(kind)
        before, after = hand().logits(texts), hand().logits(texts, edit, layer)
        at = slice(-1, None) if kind == "valence" else slice(1, -1)  # position 0 is BOS
        out[kind] = float(np.mean([_kl(b[at], a[at]).mean() for b, a in zip(before, after)]))
        rest = torch.ones(before[0].shape[-1], dtype=torch.bool)
        rest[words] = False
        off += [float(_kl(b[-1, rest].double(), a[-1, rest].double())) for b, a in zip(before, after)]
    return out, float(np.mean(off))


@pytest.mark.parametrize(("index", "dear"), [(PLANTED, False), (VALENCE, True)])
def test_costs_by_hand(planted, index, dear):
    kl, off = _costs(plain_sae("constructed").edit({index: ablate}), SAES["constructed"])
    table = CostEngine(planted).run([sb.Ablate(f"organism:planted/constructed#{index}")]).set_index("kind")
    assert table["kl_mean"].to_dict() == pytest.approx(kl, abs=2e-4, rel=1e-3)
    assert pooled_kl_off(table) == pytest.approx(off, abs=1e-4, rel=1e-3)
    print(f"#{index}: KL {kl}, KL_off {off:.4f}")
    worst = max(*kl.values(), off)
    assert worst > 0.05 if dear else worst < 0.05


# --- 4. controls


@pytest.mark.parametrize(("index", "passes"), [(PLANTED, True), (VALENCE, False)])
def test_random_directions_of_the_residual_covariance_by_hand(held_out, index, passes):
    """SR among 99 directions drawn from the covariance of the residuals, same gate and same ‖Δ‖: p = (1 + #≥) / 100."""
    sae, layer = plain_sae("constructed"), SAES["constructed"]
    texts = [p.ai for p in held_out]
    rows = torch.cat([hand().plain.residual(t, layer)[1:] for t in texts]).double().numpy()
    drawn = np.random.default_rng(9).multivariate_normal(np.zeros(rows.shape[1]), np.cov(rows.T), 99)
    size = float(sae.w["w_dec"][index].norm())
    own = _specific(held_out, sae.edit({index: ablate}), layer)[0]
    others = []
    for row in drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * size:
        along = torch.tensor(row, dtype=torch.float32)
        others.append(_specific(held_out, lambda x, v=along: -sae.acts(x)[:, index, None] * v, layer)[0])
    p = (1 + sum(v >= own for v in others)) / 100
    print(f"#{index}: SR {own:.3f}, p {p:.2f} of 99 random directions, their median {np.median(others):.3f}")
    assert (p <= 0.05) == passes
    assert (p > 0.05) or own > np.quantile(others, 0.95)


@pytest.mark.parametrize("n_matched", [0, 4, 13, 19, 40])
def test_exchangeable_candidates_by_ranks(n_matched):
    """Candidate and controls drawn alike, matched features more alike than random directions: the rule from ranks alone."""
    rng, n, yes = np.random.default_rng(n_matched), 2_000, 0
    for _ in range(n):
        spread = rng.gamma(2.0, 0.5)
        values = rng.normal(0.05, spread, 1 + n_matched + max(0, 99 - n_matched))
        own, matched, random = values[0], values[1 : 1 + n_matched], values[1 + n_matched :]
        ranks = [
            stats.rankdata(-np.r_[own, part], method="max")[0] / (1 + len(part))
            for part in (matched, random)
            if len(part)
        ]
        by_rank = own > 0 and max(ranks) <= 0.05 and not 0 < n_matched < 19
        kinds = [MATCHED] * len(matched) + [RANDOM] * len(random)
        assert (control_test(own, values[1:], kinds).verdict == "yes") == by_rank
        yes += by_rank
    print(f"{n_matched} matched: {yes / n:.1%} pass")
    assert yes / n <= 0.06


# --- 8. intervals of small designs


def _interval(x):
    """Mean and half-width of a template × entity table, from its mean squares."""
    t, e = x.shape
    rows, columns = x.mean(1) - x.mean(), x.mean(0) - x.mean()
    ms_t, ms_e = e * (rows**2).sum() / (t - 1), t * (columns**2).sum() / (e - 1)
    ms_r = ((x - x.mean() - rows[:, None] - columns) ** 2).sum() / ((t - 1) * (e - 1))
    v = ms_t + ms_e - ms_r
    df = v**2 / (ms_t**2 / (t - 1) + ms_e**2 / (e - 1) + ms_r**2 / ((t - 1) * (e - 1)))
    if v < max(ms_t, ms_e):
        v, df = (ms_t, t - 1) if ms_t >= ms_e else (ms_e, e - 1)
    return x.mean(), stats.t.ppf(0.975, df) * np.sqrt(v / (t * e))


@pytest.mark.parametrize("n_templates", [3, 4, 6, 12, 35])
def test_intervals_of_small_designs_by_mean_squares(n_templates):
    """Entity by entity the formula; over 4,000 studies of normal effects its coverage, here and in the package."""
    rng, e = np.random.default_rng(n_templates), 8
    effects = rng.normal(size=(4_000, n_templates, 1)) + rng.normal(0, 0.7, (4_000, 1, e))
    x = 0.3 + effects + rng.normal(size=(4_000, n_templates, e))
    labels = np.repeat(np.arange(n_templates), e), np.tile(np.arange(e), n_templates)
    ours = clustered_means(x.reshape(4_000, -1), *labels)
    by_hand = np.array([_interval(study) for study in x])
    assert ours["mean"] - ours["ci_low"] == pytest.approx(by_hand[:, 1], rel=1e-9)
    covered = float((np.abs(by_hand[:, 0] - 0.3) <= by_hand[:, 1]).mean())
    print(f"{n_templates} templates: {covered:.3f}")
    assert covered >= 0.94 - 2.6 * np.sqrt(
        0.94 * 0.06 / 4_000
    )  # the mark over 20,000 studies: test_stats_simulation
    call = clustered_mean(x[0].ravel() + 50, *labels).call
    assert call == ("undetermined" if n_templates < 6 else "positive")


# --- 9. no ratio of nothing


def test_a_bias_that_may_be_0_has_no_ratio_and_no_best_strength():
    """`null`: the interval by hand holds 0, so the sweep gives nats and no share, and names no strength."""
    folder = organism_folder("null")
    plain, truth = Hand(Plain.load(folder / "model")), json.loads((folder / "truth.json").read_text())
    pairs = sb.load_pairs()
    values = plain.scores([p.human for p in pairs]) - plain.scores([p.ai for p in pairs])
    mean, half = _interval(values.reshape(len(pairs.templates), -1))
    assert abs(mean) < half < 0.1
    feature = f"organism:null/{truth['saes'][0]['sae']}#0"
    split = {"tune": pairs.templates[:12], "report": pairs.templates[12:]}
    sweep = sb.Sweep([Cell((sb.Steer(feature, a),)) for a in (1.0, 4.0)], costs=True, splits=split)
    found = sb.run_sweep(sb.load_model("organism:null"), pairs, sweep)
    frame = found.frame
    assert frame[["reduction", "red_low", "red_high", "specific_reduction"]].isna().all().all()
    assert np.isfinite(frame[["removed_nats", "removed_nats_low", "removed_nats_high"]].to_numpy()).all()
    best = found.best_strength()
    assert not best.cell
    assert "not distinguishable from 0" in best.reason
