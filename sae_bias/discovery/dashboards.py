"""Feature dashboards: everything that lets a person see what one feature means, in one page.

    where it fires   strongest passages and tokens of a text collection (streamed), a histogram of its activation
    what it writes   the words its decoder row promotes and demotes (`logit_lens`)
    where it stands  nearest decoder rows, its counterpart in the SAE's seed twin, the 2 × 2 and the published ordering, its
                     public page

A card describes; it is not a test. Strongest passages show the loudest activations only, so the histogram stands beside them.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.discovery.logit_lens import Word, mean_inverse_rms, promoted, token_name
from sae_bias.discovery.ordering import OrderingTest
from sae_bias.discovery.tables import ActivationTable, activation_table, token_texts, written
from sae_bias.models.model import Model
from sae_bias.models.residuals import batches, last_residuals, text_batches, token_windows
from sae_bias.prompts.grid import PromptGrid
from sae_bias.prompts.texts import Texts, text_stream
from sae_bias.saes.ids import FeatureRef
from sae_bias.saes.load import as_feature, load_sae, sae_of
from sae_bias.saes.neighbors import Neighbour, nearest_rows, twin_id
from sae_bias.saes.neuronpedia import feature_description, feature_page
from sae_bias.saes.sae import Feature, Sae, check_sae

BINS_PER_DOUBLING = 4
AROUND = (24, 12)  # tokens shown before and after a passage's peak
MOST_DECODER_BYTES = 4 << 30


@dataclass(frozen=True)
class Passage:
    """A stretch of text around a strong activation."""

    tokens: tuple[str, ...]
    acts: tuple[float, ...]
    """Activation at each token, NaN at special tokens."""
    peak: int
    """Place of the strongest token in `tokens`."""
    text_index: int
    """Which text of the collection."""

    @property
    def activation(self) -> float:
        return self.acts[self.peak]

    @property
    def text(self) -> str:
        return "".join(self.tokens)


@dataclass(frozen=True)
class TokenCount:
    """How often and how strongly the feature fires at one token of the vocabulary."""

    token: str
    n_fired: int
    n_seen: int
    mean_active: float
    largest: float


@dataclass(frozen=True)
class Activity:
    """The feature on a text collection."""

    collection: str
    n_texts: int
    n_tokens: int
    """Ordinary tokens; special ones are not counted."""
    n_fired: int
    largest: float
    """NaN for a feature that never fired."""
    histogram: tuple[tuple[float, float, int], ...]
    """(from, to, tokens) of the active values, four bins a doubling."""
    passages: tuple[Passage, ...]
    tokens: tuple[TokenCount, ...]

    @property
    def density(self) -> float:
        """Share of ordinary tokens on which it fires."""
        return self.n_fired / self.n_tokens if self.n_tokens else math.nan


@dataclass(frozen=True, eq=False)
class FeatureCard:
    """What one feature means, as far as text, weights and the grid show."""

    feature: FeatureRef
    model_name: str
    activity: Activity
    promotes: tuple[Word, ...]
    demotes: tuple[Word, ...]
    neighbours: tuple[Neighbour, ...]
    twin: Neighbour | None
    table: ActivationTable
    page: str | None
    description: str | None
    facts: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What could not be shown, and why."""

    @cached_property
    def ordering(self) -> OrderingTest | None:
        """The published ordering; None where the grid lacks its statements."""
        try:
            return self.table.ordering_test()
        except RequestError:
            return None

    @property
    def two_by_two(self) -> pd.DataFrame:
        """Mean activation by group of subjects and kind of act."""
        return self.table.by_group()

    def to_frame(self) -> pd.DataFrame:
        """The strongest passages, one a row: activation, token, text, text_index."""
        rows = [
            {
                "activation": p.activation,
                "token": p.tokens[p.peak],
                "text": p.text,
                "text_index": p.text_index,
            }
            for p in self.activity.passages
        ]
        return pd.DataFrame(rows, columns=["activation", "token", "text", "text_index"])

    def words(self) -> pd.DataFrame:
        """The promoted and demoted words: word, logit (a unit of activation, the norm held still), side."""
        rows = [("promoted", w) for w in self.promotes] + [("demoted", w) for w in self.demotes]
        return pd.DataFrame([{"side": side, "word": w.token, "logit": w.logit} for side, w in rows])

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page without scripts; written to `path` where one is given."""
        from sae_bias.discovery.dashboard_page import card_page

        return written(card_page(self), path)

    def _repr_html_(self) -> str:
        from sae_bias.discovery.dashboard_page import card_body

        return card_body(self)

    def __repr__(self) -> str:
        a = self.activity
        fires = (
            f"fires on {a.density:.2%} of {a.n_tokens:,} tokens of {a.collection}, at most {a.largest:.3g}"
        )
        lines = [f"FeatureCard({self.feature}): {fires if a.n_fired else f'never fires on {a.collection}'}"]
        lines += [
            f"  promotes {', '.join(repr(w.token) for w in self.promotes[:8])}",
            f"  demotes  {', '.join(repr(w.token) for w in self.demotes[:8])}",
        ]
        lines += [f"  {p.activation:8.3g}  …{p.text.strip()[-70:]!r}" for p in a.passages[:5]]
        lines += (
            [f"  page     {self.page}{f': {self.description}' if self.description else ''}"]
            if self.page
            else []
        )
        return "\n".join(lines)


def feature_card(
    model: Model,
    feature: Feature | FeatureRef | str,
    texts: Texts = None,
    *,
    grid: PromptGrid | None = None,
    k: int = 12,
    window: int = 256,
    neighbours: int = 8,
    twin: Sae | str | None = None,
    describe: bool = False,
    table: ActivationTable | None = None,
    progress: bool = False,
) -> FeatureCard:
    """The dashboard of one feature.

    Args:
        texts: a .txt, .jsonl or .json file, or any iterable of texts, read as a stream (millions of tokens work); None is a
            small bundled collection.
        grid: the grid of the 2 × 2; the bundled one by default.
        k: how many passages, tokens and words of each kind.
        window: tokens of text the model reads at once.
        neighbours: how many of the nearest decoder rows; 0 leaves the decoder unread.
        twin: the SAE's seed twin; by default the `_seed_1` folder beside a local SAE, where there is one.
        describe: fetch the public page's description (once; it is cached). Never needed.
        table: the feature's 2 × 2 where it was measured already; `grid` is then not read.

    Raises:
        RequestError: a feature that does not fit the model, a file that holds no texts.
    """
    from tqdm.auto import tqdm

    loaded = as_feature(feature)
    check_sae(model, loaded)
    name, stream = text_stream(texts)
    with tqdm(desc="card", unit="window", disable=not progress, leave=False) as bar:
        activity = _read(model, loaded, name, stream, k, window, bar.update)
    if not activity.n_tokens:
        raise RequestError(f"{name} holds no texts with ordinary tokens.")
    table = activation_table(model, loaded, grid) if table is None else table
    shown = [p.text for p in table.grid][:64]
    scale = mean_inverse_rms(model, shown) * _mean_decoder_scale(model, loaded, shown)
    to_residual = loaded.site.kind != "z"  # the attention's output projection stands between
    promotes, demotes = promoted(model, loaded.w_dec, k, scale) if to_residual else ((), ())
    sae = sae_of(loaded)
    near, unread = _near(sae, loaded, neighbours)
    counterpart, why = _twin(sae, loaded, twin)
    return FeatureCard(
        loaded.ref, model.name, activity, promotes, demotes, tuple(near), counterpart, table, feature_page(loaded.ref, sae),
        feature_description(loaded.ref, sae) if describe else None, _facts(model, loaded, sae), tuple(filter(None, [unread, why, "" if to_residual else "tokens promoted: not defined at hook_z, which is projected before it is added to the residual"])),
    )  # fmt: skip


def _near(sae: Sae | None, feature: Feature, n: int) -> tuple[list[Neighbour], str]:
    """The nearest decoder rows, and why there are none."""
    if sae is None:
        return [], "nearest decoder rows: the feature belongs to no SAE that can be loaded"
    size = 4 * sae.d_in * sae.d_sae
    if n and size > MOST_DECODER_BYTES:
        return [], f"nearest decoder rows: not read, the decoder is {size / 1e9:.0f} GB"
    return nearest_rows(sae, feature.w_dec, n, leave_out=feature.index) if n else [], ""


def _mean_decoder_scale(model: Model, feature: Feature, texts: list[str]) -> float:
    """What a normalizing SAE multiplies its decoder rows by, the mean over last tokens; 1 for any other."""
    if feature.whole is None or feature.whole.info.normalization == "none":
        return 1.0
    scale = feature.decoder_scale(last_residuals(model, texts, {feature.site})[feature.site])
    assert scale is not None
    return float(scale.mean())


def _facts(model: Model, feature: Feature, sae: Sae | None) -> dict[str, str]:
    facts = {"model": model.name, "hook point": str(feature.site)}
    if sae is not None:
        facts |= {"architecture": sae.architecture, "features": f"{sae.d_sae:,}"}
        facts |= {"L0 as released": f"{sae.label_l0:g}"} if sae.label_l0 else {}
    return facts | {
        "‖W_dec‖": f"{float(feature.w_dec.norm()):.3g}",
        "threshold": f"{float(feature.threshold):.3g}",
    }


def _twin(sae: Sae | None, feature: Feature, given: Sae | str | None) -> tuple[Neighbour | None, str]:
    """The most parallel row of the seed twin, and why there is none."""
    if sae is None:
        return None, ""
    try:
        name = given if given is not None else twin_id(sae)
        if given is None and sae.path is not None and not Path(twin_id(sae)).expanduser().is_dir():
            return None, "seed twin: none beside the SAE"
        found = load_sae(name)
        if found.d_in != sae.d_in:
            raise RequestError(f"{found.id} has d_in {found.d_in}, not {sae.d_in}: no twin of {sae.id}.")
        near = nearest_rows(found, feature.w_dec, 1)
        return (near[0], "") if near else (None, "seed twin: it has no decoder rows")
    except (RequestError, MissingError) as error:
        if given is not None:
            raise
        return None, f"seed twin: {error}"


# --- reading a collection ----------------------------------------------------------------------------------
@dataclass
class _Tally:
    """What a stream adds up to; memory does not grow with it."""

    k: int
    n_tokens: int = 0
    n_fired: int = 0
    largest: float = -math.inf
    n_texts: int = 0
    bins: Counter[int] = field(default_factory=Counter)
    seen: Counter[int] = field(default_factory=Counter)
    fired: Counter[int] = field(default_factory=Counter)
    total: Counter[int] = field(default_factory=Counter)
    top: dict[int, float] = field(default_factory=dict)
    heap: list[tuple[float, int, int, list[int], np.ndarray, int]] = field(default_factory=list)
    _order: int = 0

    def add(self, ids: list[int], acts: np.ndarray, ordinary: np.ndarray, place: int) -> None:
        tokens, values = np.asarray(ids)[ordinary], acts[ordinary]
        self.n_tokens += len(tokens)
        self.n_texts = max(self.n_texts, place + 1)
        self.seen.update(tokens.tolist())
        active = values > 0
        if not active.any():
            return
        self.n_fired += int(active.sum())
        self.largest = max(self.largest, float(values.max()))
        bins = np.floor(np.log2(values[active]) * BINS_PER_DOUBLING).astype(int)
        self.bins.update(bins.tolist())
        for token, value in zip(tokens[active].tolist(), values[active].tolist()):
            self.fired[token] += 1
            self.total[token] += value
            self.top[token] = max(self.top.get(token, 0.0), value)
        peak = int(np.where(ordinary, acts, -np.inf).argmax())
        self._order += 1
        # the earlier of two equal peaks stays: the order is negative in the heap
        item = (float(acts[peak]), -self._order, place, ids, np.where(ordinary, acts, np.nan), peak)
        if len(self.heap) < 4 * self.k:
            heapq.heappush(self.heap, item)
        elif item[:2] > self.heap[0][:2]:
            heapq.heapreplace(self.heap, item)


@torch.no_grad()
def _read(model: Model, feature: Feature, name: str, stream: Iterable[str], k: int, window: int, tick) -> Activity:  # fmt: skip
    feature, site = feature.to(model.device), feature.site
    tally = _Tally(k)
    for group in batches(token_windows(model, stream, window)):
        for batch in text_batches(model, [ids for _, ids in group], [site]):
            acts = feature.activation(batch.resid[site]).cpu().double().numpy()
            ordinary = batch.ordinary.cpu().numpy()
            for row, i in enumerate(batch.index):
                place, ids = group[i]
                tally.add(ids, acts[row], ordinary[row], place)
        tick(len(group))
    return _activity(model, tally, name)


def _activity(model: Model, tally: _Tally, name: str) -> Activity:
    bins = tuple(
        (2 ** (b / BINS_PER_DOUBLING), 2 ** ((b + 1) / BINS_PER_DOUBLING), n) for b, n in sorted(tally.bins.items())
    )  # fmt: skip
    passages: list[Passage] = []
    shown: set[tuple[str, ...]] = set()
    for _, _, place, ids, acts, peak in sorted(tally.heap, key=lambda item: item[:2], reverse=True):
        passage = _passage(model, ids, acts, peak, place)
        if passage.tokens not in shown and len(passages) < tally.k:
            shown.add(passage.tokens)
            passages.append(passage)
    strongest = sorted(tally.total, key=lambda t: tally.total[t], reverse=True)[: tally.k]
    tokens = tuple(
        TokenCount(token_name(model, t), tally.fired[t], tally.seen[t], tally.total[t] / tally.fired[t], tally.top[t])
        for t in strongest
    )  # fmt: skip
    largest = tally.largest if tally.n_fired else math.nan
    return Activity(
        name, tally.n_texts, tally.n_tokens, tally.n_fired, largest, bins, tuple(passages), tokens
    )


def _passage(model: Model, ids: list[int], acts: np.ndarray, peak: int, place: int) -> Passage:
    pieces = token_texts(model, ids)
    first, last = max(0, peak - AROUND[0]), min(len(ids), peak + AROUND[1] + 1)
    first += int(first == 0 and ids[0] in model.special_ids and peak > 0)
    return Passage(tuple(pieces[first:last]), tuple(float(a) for a in acts[first:last]), peak - first, place)
