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

from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.models.forward import Batch, Final, forward, plan_batches
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe, word_tokens
from sae_bias.prompts.texts import COST_TEXTS, load_texts
from sae_bias.steering.intervention import Intervention
from sae_bias.steering.runner import CellRunner

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
        ids = [model.encode(t) for t in self.texts]
        self.batches = plan_batches(ids, model.device)
        self.runner = CellRunner(model, self.batches, _whole_prompt)
        self._base = self.runner.base(sorted({site.layer for site in sites if site.is_resid_post}))

    def run(self, edits: Sequence[Intervention]) -> pd.DataFrame:
        """One row a kind: kl_mean, kl_p95 (over texts), kl_last, kl_off, kl_off_p95, nll_change (nats a token), changed_share, n_texts."""
        return self.run_many([edits])[0]

    def run_many(self, cells: Sequence[Sequence[Intervention]]) -> list[pd.DataFrame]:
        """`run` for several cells at once."""
        n = len(self.kinds)
        figures = [{name: np.zeros(n) for name in ("kl", "last", "off", "nll", "changed")} for _ in cells]

        def visit(cell: int, k: int, rows: Tensor, final: Final) -> None:
            batch, out = self.batches[k], figures[cell]
            index = [i for i, row in zip(batch.index, rows.tolist()) if row]
            tokens = batch.tokens[rows.to(batch.tokens.device)]
            base = self._base[k][rows]
            kl, last, nll = _costs(self.model, base, final, tokens)
            out["kl"][index], out["last"][index], out["nll"][index] = kl, last, nll
            out["off"][index] = kl_off(base, final, self.words)
            out["changed"][index] = 1

        self.runner.run_many(cells, visit)
        return [self._table(pd.DataFrame({"kind": self.kinds, **out})) for out in figures]

    def behind(self, text: str) -> pd.DataFrame:
        """`run` for `text` put before every text, at the text's own tokens; one that is cut into other tokens behind it is left out."""
        rows = []
        for batch, base in zip(self.batches, self._base):
            for row, i in enumerate(batch.index):
                own, ids = batch.tokens[row].tolist(), self.model.encode(text + self.texts[i])
                rest = [t for t in own if t not in self.model.special_ids][1:]  # the first word gets a space
                if not rest or ids[-len(rest) :] != rest or len(ids) < len(own):
                    continue
                after = forward(self.model, torch.tensor([ids], device=batch.tokens.device))
                after, before = after[:, len(ids) - len(own) :], base[row : row + 1]
                kl, last, nll = _costs(self.model, before, after, batch.tokens[row : row + 1])
                off = kl_off(before, after, self.words)
                rows.append({"kind": self.kinds[i], "kl": kl[0], "last": last[0], "off": off[0], "nll": nll[0], "changed": 1.0})  # fmt: skip
        return self._table(pd.DataFrame(rows))

    @staticmethod
    def _table(frame: pd.DataFrame) -> pd.DataFrame:
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
        table.attrs["kl_off_p95"] = float(
            frame["off"].quantile(0.95)
        )  # over all texts, as the pooled mean is
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


@torch.no_grad()
def kl_off(base: Final, after: Final, words: Sequence[int]) -> np.ndarray:
    """KL at the last position of each row between the laws without `words`, each renormalized."""
    p, q = (_without(f.last().logits()[:, 0], words) for f in (base, after))
    gap = torch.where(p.isinf(), torch.zeros_like(p), p.exp() * (p - q))
    return gap.sum(-1).clamp(min=0).cpu().double().numpy()


def _without(logits: Float[Tensor, "batch d_vocab"], words: Sequence[int]) -> Float[Tensor, "batch d_vocab"]:
    """Log-probabilities among the tokens that are not in `words`."""
    out = torch.tensor(list(words), dtype=torch.long, device=logits.device)
    return logits.float().index_fill(-1, out, -torch.inf).log_softmax(-1)


@torch.no_grad()
def _costs(
    model: Model, base: Final, after: Final, tokens: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row: mean KL over ordinary positions but the last, KL at the last, mean change of NLL."""
    special = torch.isin(tokens, torch.tensor(sorted(model.special_ids), device=tokens.device)).cpu()
    batch, n = tokens.shape
    kl, change = torch.zeros(batch, n, dtype=torch.float32), torch.zeros(batch, n, dtype=torch.float32)
    for start in range(0, n, max(1, BLOCK // batch)):
        at = slice(start, min(start + max(1, BLOCK // batch), n))
        p, q = (f[:, at].logits().log_softmax(-1) for f in (base, after))
        kl[:, at] = (p.exp() * (p - q)).sum(-1).cpu()
        known = slice(at.start, min(at.stop, n - 1))
        if known.stop > known.start:
            width = known.stop - known.start
            gold = tokens[:, known.start + 1 : known.stop + 1, None].to(p.device)
            gain = p[:, :width].gather(-1, gold) - q[:, :width].gather(-1, gold)
            change[:, known] = gain[..., 0].cpu()
    ordinary = ~special[:, :-1]
    count = ordinary.sum(1).clamp(min=1)
    kl = kl.clamp(min=0)
    mean_kl, mean_change = ((x[:, :-1] * ordinary).sum(1) / count for x in (kl, change))
    return mean_kl.double().numpy(), kl[:, -1].double().numpy(), mean_change.double().numpy()


def _whole_prompt(batch: Batch) -> tuple[Tensor, Tensor]:
    """The whole text is prompt, and its subject may be anywhere."""
    return torch.full((batch.n,), batch.tokens.shape[1]), torch.zeros(batch.n, dtype=torch.long)
