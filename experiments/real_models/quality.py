"""How good an SAE is, on held-out text: variance explained, L0, dead features, and the loss it recovers.

    FVE = 1 − Σ|x − x̂|² / Σ|x − mean|²,     loss recovered = (CE_zero − CE_sae) / (CE_zero − CE_clean)

with the reconstruction, or zero, spliced in at every position but BOS, in float32. A few positions of Gemma 3 hold most of the
variance (norms several times the median), so FVE is also given without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

import sae_bias as sb
from real_models.training import CLIP, JumpReluWeights


class HeldOut:
    """Held-out windows with their clean loss and their loss under zero ablation, measured once for any number of SAEs."""

    def __init__(self, model: sb.Model, layer: int, held_out: Sequence[list[int]], n_windows: int = 64):
        self.model, self.layer = model, layer
        self.chosen = sorted(held_out, key=len)[-n_windows:]
        self.clean, self.x = _losses(model, layer, self.chosen, None)
        self.zero, _ = _losses(model, layer, self.chosen, torch.zeros_like)

    @torch.no_grad()
    def quality(self, weights: JumpReluWeights, train_rows: Float[Tensor, "n d_in"]) -> dict[str, float]:
        """The figures of one SAE; `train_rows` are residuals on which a feature may prove alive."""
        x = self.x
        spliced, _ = _losses(
            self.model, self.layer, self.chosen, lambda rows: weights.decode(weights.encode(rows))
        )
        acts = weights.encode(x)
        norms = x.norm(dim=-1)
        usual = norms <= CLIP * norms.median()
        alive = (acts > 0).any(0)
        for part in train_rows.split(4096):
            alive |= (weights.encode(part) > 0).any(0)
        return {
            "n_tokens": len(x),
            "fve": _fve(x, weights.decode(acts)),
            "fve_usual_positions": _fve(x[usual], weights.decode(acts[usual])),
            "share_unusual_positions": float((~usual).float().mean()),
            "l0": float((acts > 0).float().sum(-1).mean()),
            "dead_share": float((~alive).float().mean()),
            "dense_share": float(((acts > 0).float().mean(0) > 0.1).float().mean()),
            "ce_clean": self.clean,
            "ce_sae": spliced,
            "ce_zero": self.zero,
            "loss_recovered": (self.zero - spliced) / (self.zero - self.clean),
        }


def _fve(x: Tensor, hat: Tensor) -> float:
    return 1 - float((x - hat).pow(2).sum().double() / (x - x.mean(0)).pow(2).sum().double())


@torch.no_grad()
def _losses(
    model: sb.Model, layer: int, sequences: Sequence[list[int]], edit: Callable[[Tensor], Tensor] | None
) -> tuple[float, Tensor]:
    """Mean next-token loss (nats) with `edit` of the residual rows but BOS, and those rows unedited."""
    total, n, kept = 0.0, 0, []
    bos = model.tokenizer.bos_token_id
    skip_bos = bos is not None and model.tokenizer("a").input_ids[0] == bos
    for ids in tqdm(sequences, desc=f"loss with {'no edit' if edit is None else 'an edit'}", leave=False):
        tokens = torch.tensor([ids])
        rows = tokens[0] != bos if skip_bos else torch.ones(len(ids), dtype=torch.bool)

        def hook(module: nn.Module, args: Any, output: Any, rows: Tensor = rows) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            kept.append(x[0, rows].float())
            if edit is None:
                return output
            x = x.clone()
            x[0, rows] = edit(kept[-1]).to(x.dtype)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = model.layer(layer).register_forward_hook(hook)
        try:
            final = model.base(input_ids=tokens, use_cache=False).last_hidden_state[0]
        finally:
            handle.remove()
        logits = final[:-1] @ model.w_unembed.T
        total += float(nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        n += len(ids) - 1
    return total / n, torch.cat(kept)
