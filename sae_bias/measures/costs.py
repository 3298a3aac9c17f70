"""What an edit costs: KL(unsteered ‖ steered) in nats a token, and the change in negative log-likelihood, by kind of text.

On neutral text alone a feature for AI speech never fires and the KL is 0 by construction; so costs are measured on neutral
text, on AI text without speech, on AI speech just before the evaluation word, and on human deeds at the evaluation position
(docs/method.md#cost), each with the share of texts on which the edit changed anything.

KL is over the positions that predict the text's own tokens. The last position predicts what comes after the text: for AI speech
that is the evaluation word, whose shift is the effect and not a cost, so it stands apart as `kl_last`; for human deeds it is the
cost. `kl_off` is the KL at the last position with the evaluation words taken out of both laws and the rest renormalized: what
an edit does there besides moving the evaluation. Over all the texts together it is the KL_off that a choice of strength bounds.

    cost = max(KL over kinds, KL_off over kinds, 1 - β)

is the axis of every frontier: an edit that leaves β = 0 costs 1, however still its other texts are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.models.forward import Final, forward
from sae_bias.models.model import Model
from sae_bias.models.reads import Reader, Spot
from sae_bias.probe.words import Probe, word_tokens
from sae_bias.prompts.texts import COST_TEXTS, load_texts
from sae_bias.steering.intervention import Intervention
from sae_bias.steering.shared import SharedRunner

AT_EVALUATION = "valence"
"""The kind of text whose cost is read at the evaluation position, not before it."""
BLOCK = 64  # positions whose full log-probabilities are held at once


class CostEngine:
    """Texts of several kinds, run once without edits and then once per cell."""

    def __init__(
        self,
        model: Model,
        texts: Mapping[str, Sequence[str]] | None = None,
        *,
        probe: Probe | None = None,
        sites: Sequence[Site] = (),
    ):
        """`probe`: its words are taken out of the next-token laws for `kl_off`; the bundled words where it is None."""
        texts = {kind: load_texts(kind) for kind in COST_TEXTS} if texts is None else texts
        self.model = model
        self.words = evaluation_tokens(model, probe or Probe())
        self.kinds = [kind for kind, group in texts.items() for _ in group]
        self.texts = [t for group in texts.values() for t in group]
        self.base = _Ends([model.encode(t) for t in self.texts])
        self.runner = SharedRunner(model, self.base)
        self.base.slots, self.base.n = self.runner.reads.slots, self.runner.reads.n
        self.runner.base(sorted({site.layer for site in sites if site.is_resid_post}))

    def run(self, edits: Sequence[Intervention]) -> pd.DataFrame:
        """One row a kind: kl_mean, kl_p95 (over texts), kl_last, kl_off, kl_off_p95, nll_change (nats a token), changed_share, n_texts."""
        return self.run_many([edits])[0]

    def run_many(self, cells: Sequence[Sequence[Intervention]]) -> list[pd.DataFrame]:
        """`run` for several cells at once: the unsteered law of a position is made once for all of them."""
        if self.model.foreign_hooks() and len(cells) > 1:  # then whole logits are held
            return [self.run(edits) for edits in cells]
        found: list[list[tuple[list[list[Spot]], Final]]] = [[] for _ in cells]
        self.runner.run_many(cells, lambda cell, wanted, final: found[cell].append((list(map(list, wanted)), final)))  # fmt: skip
        figures = [_Figures(self.base.sequences) for _ in cells]
        mine = [out for out, parts in zip(figures, found) if parts]
        after = [_joined(parts) for parts in found if parts]
        slots = [np.array([self.base.slots[i][p] for ((i, p), *_) in wanted]) for wanted, _ in after]
        needed = np.unique(np.concatenate(slots)) if slots else np.empty(0, dtype=int)
        for block in np.split(needed, range(BLOCK, len(needed), BLOCK)):
            laws = _Laws(self.base.final(block), self.words)
            for out, (wanted, final), own in zip(mine, after, slots):
                rows = np.flatnonzero(np.isin(own, block))
                rows = rows[np.argsort(own[rows], kind="stable")]
                if len(rows):
                    z = final.spots(rows.tolist(), [0] * len(rows)).logits()[:, 0]
                    laws.note(out, np.searchsorted(block, own[rows]), z, [wanted[row] for row in rows])
        return [self._table(out) for out in figures]

    def behind(self, text: str) -> pd.DataFrame:
        """`run` for `text` put before every text, at the text's own tokens; one that is cut into other tokens behind it is left out."""
        out = _Figures(self.base.sequences)
        for i, own in enumerate(self.base.sequences):
            ids = self.model.encode(text + self.texts[i])
            rest = [t for t in own if t not in self.model.special_ids][1:]  # the first word gets a space
            if not rest or ids[-len(rest) :] != rest or len(ids) < len(own):
                continue
            after = forward(self.model, torch.tensor([ids], device=self.model.device))
            for start in range(0, len(own), BLOCK):
                at = range(start, min(start + BLOCK, len(own)))
                laws = _Laws(self.base.final([self.base.slots[i][p] for p in at]), self.words)
                first = len(ids) - len(own) + start
                z = after[:, first : first + len(at)].logits()[0]
                laws.note(out, np.arange(len(at)), z, [[(i, p)] for p in at])
        return self._table(out, only=out.changed)

    def _table(self, out: _Figures, only: np.ndarray | None = None) -> pd.DataFrame:
        """The rows by kind; `only`: of these texts."""
        frame = pd.DataFrame({"kind": self.kinds, **out.columns(self.model.special_ids)})
        return _by_kind(frame if only is None else frame[only])


class _Ends(Reader):
    """The end of the unsteered pass at every position, by the number of the result."""

    def __init__(self, sequences: Sequence[Sequence[int]]):
        self.sequences = sequences
        self.positions = [range(len(s)) for s in sequences]
        self.ends, self.starts, self.partners = [len(s) for s in sequences], [0] * len(sequences), [None] * len(sequences)  # fmt: skip
        self.slots: list[list[int]] = []
        self.n = 0
        self._all: Final | None = None

    def take(self, wanted: Sequence[Sequence[Spot]], final: Final) -> None:
        if self._all is None:
            resid, full = (None if x is None else x.new_empty(self.n, *x.shape[1:]) for x in (final.resid, final.full))  # fmt: skip
            self._all = Final(final.model, resid, full)
        at = [self.slots[i][p] for ((i, p), *_) in wanted]
        for kept, x in ((self._all.resid, final.resid), (self._all.full, final.full)):
            if kept is not None and x is not None:
                kept[at] = x

    def final(self, slots: Sequence[int] | np.ndarray) -> Final:
        """[n, 1] at some results."""
        assert self._all is not None
        return self._all.spots(list(slots), [0] * len(slots))


class _Figures:
    """What one cell does to each text, as its positions come in."""

    def __init__(self, sequences: Sequence[Sequence[int]]):
        self.sequences = sequences
        self.kl, self.nll = (
            np.zeros((len(sequences), max(map(len, sequences), default=0))) for _ in range(2)
        )
        self.off, self.changed = np.zeros(len(sequences)), np.zeros(len(sequences), dtype=bool)

    def columns(self, special: Collection[int]) -> dict[str, np.ndarray]:
        """Of each text: mean KL over ordinary positions but the last, KL and KL_off at the last, mean change of NLL, whether it changed."""
        ends = np.array([len(s) - 1 for s in self.sequences])
        ordinary = np.zeros(self.kl.shape, dtype=bool)
        for i, s in enumerate(self.sequences):
            ordinary[i, : ends[i]] = [t not in special for t in s[:-1]]
        count = ordinary.sum(1).clip(min=1)
        kl, nll = ((x * ordinary).sum(1) / count for x in (self.kl, self.nll))
        return {"kl": kl, "last": self.kl[np.arange(len(ends)), ends], "off": self.off, "nll": nll, "changed": self.changed.astype(float)}  # fmt: skip


class _Laws:
    """Unsteered next-token laws at some results."""

    @torch.no_grad()
    def __init__(self, final: Final, words: Sequence[int]):
        self.words, self.z = words, final.logits()[:, 0]
        self.log = self.z.log_softmax(-1)
        self.p = self.log.exp()

    @torch.no_grad()
    def note(self, out: _Figures, which: np.ndarray, z: Float[Tensor, "n d_vocab"], wanted: Sequence[Sequence[Spot]]) -> None:  # fmt: skip
        """One cell's laws at the results `which`, for the spots that each stands for."""
        at: Tensor | slice = torch.from_numpy(which).to(z.device)
        at = slice(None) if np.array_equal(which, range(len(self.p))) else at
        q = z.log_softmax(-1)
        kl = (self.p[at] * (self.log[at] - q)).sum(-1).clamp(min=0).cpu().double().numpy()
        spots = [(row, i, p) for row, group in enumerate(wanted) for i, p in group]
        rows, texts, places = np.array(spots).T
        out.kl[texts, places] = kl[rows]
        out.changed[texts] = True
        ends = np.array([len(out.sequences[i]) - 1 for i in texts])
        inner, last = places < ends, np.unique(rows[places == ends])
        if inner.any():
            gold = [out.sequences[i][p + 1] for i, p in zip(texts[inner], places[inner])]
            gain = self.log[which[rows[inner]], gold] - q[rows[inner], gold]
            out.nll[texts[inner], places[inner]] = gain.cpu().double().numpy()
        if len(last):
            off = np.zeros(len(which))
            off[last] = _kl_off(self.z[which[last]], z[last], self.words)
            out.off[texts[~inner]] = off[rows[~inner]]


def _joined(parts: list[tuple[list[list[Spot]], Final]]) -> tuple[list[list[Spot]], Final]:
    """The passes of one cell as one; the list is emptied."""
    wanted, finals = [w for spots, _ in parts for w in spots], [final for _, final in parts]
    parts.clear()
    resid, full = (None if getattr(finals[0], name) is None else torch.cat([getattr(f, name) for f in finals]) for name in ("resid", "full"))  # fmt: skip
    return wanted, Final(finals[0].model, resid, full)


def _by_kind(frame: pd.DataFrame) -> pd.DataFrame:
    frame["kl"] = frame["kl"].where(frame["kind"] != AT_EVALUATION, frame["last"])
    rows = [
        {
            "kind": kind,
            "kl_mean": group["kl"].mean(),
            "kl_p95": group["kl"].quantile(0.95),
            "kl_last": group["last"].mean(),
            "kl_off": group["off"].mean(),
            "kl_off_p95": group["off"].quantile(0.95),
            "nll_change": group["nll"].mean(),
            "changed_share": group["changed"].mean(),
            "n_texts": len(group),
        }
        for kind, group in frame.groupby("kind", sort=False)
    ]
    table = pd.DataFrame(rows)
    table.attrs["kl_off_p95"] = float(frame["off"].quantile(0.95))  # over all texts, as the pooled mean is
    return table


def pooled_kl_off(table: pd.DataFrame) -> float:
    """Mean KL_off over the last tokens of all texts, from the rows of one cell."""
    return float((table["kl_off"] * table["n_texts"]).sum() / table["n_texts"].sum())


def evaluation_tokens(model: Model, probe: Probe) -> list[int]:
    """First tokens of the probe's words after the stem, those that the score leaves out as well."""
    prompt = load_texts("ai_speech")[0]
    ids, found = model.encode(prompt), set()
    for word in (*probe.positive, *probe.negative):
        with suppress(RequestError):
            found.add(word_tokens(model, word, prompt, ids)[0])
    return sorted(found)


def _kl_off(
    base: Float[Tensor, "n d_vocab"], after: Float[Tensor, "n d_vocab"], words: Sequence[int]
) -> Float[np.ndarray, "n"]:
    """KL of each row between the laws without `words`, each renormalized."""
    p, q = (_without(z, words) for z in (base, after))
    gap = torch.where(p.isinf(), torch.zeros_like(p), p.exp() * (p - q))
    return gap.sum(-1).clamp(min=0).cpu().double().numpy()


def _without(logits: Float[Tensor, "batch d_vocab"], words: Sequence[int]) -> Float[Tensor, "batch d_vocab"]:
    """Log-probabilities among the tokens that are not in `words`."""
    out = torch.tensor(list(words), dtype=torch.long, device=logits.device)
    return logits.float().index_fill(-1, out, -torch.inf).log_softmax(-1)
