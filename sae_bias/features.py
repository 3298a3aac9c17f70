"""Activation tables: how strongly a feature fires for each subject and statement (the study's table, A5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from sae_bias.activations import capture_layers, check_site, plan_batches, row_positions
from sae_bias.errors import RequestError
from sae_bias.model import Model
from sae_bias.prompts import PromptGrid, load_grid
from sae_bias.sae import Feature, FeatureRef, as_feature

if TYPE_CHECKING:
    import plotly.graph_objects as go

POSITIONS = ("last", "max")


@dataclass(frozen=True, eq=False)
class ActivationTable:
    """One feature's activation on every prompt of a grid."""

    feature: FeatureRef
    grid: PromptGrid
    activations: Float[np.ndarray, "n_prompts"]
    """Activation at the last token, or the maximum over ordinary tokens."""
    positions: str
    model_name: str

    def long(self) -> pd.DataFrame:
        """One row a prompt: subject, group, statement, act, match, content, activation."""
        frame = self.grid.to_frame().copy()
        frame.insert(0, "feature", str(self.feature))
        frame["activation"] = self.activations
        return frame

    def to_frame(self) -> pd.DataFrame:
        """Subjects × statements, in the grid's order; NaN where the grid has no such prompt."""
        long = self.long()
        table = long.pivot(index="subject", columns="statement", values="activation")
        return table.loc[list(dict.fromkeys(long["subject"])), list(dict.fromkeys(long["statement"]))]

    def by_group(self) -> pd.DataFrame:
        """Mean activation by group of subjects and kind of act."""
        return self.long().pivot_table(index="group", columns="act", values="activation", aggfunc="mean")

    def plot(self) -> go.Figure:
        """Heat map of subjects × statements."""
        from sae_bias.plots import activation_heatmap

        return activation_heatmap(self.long())

    def __repr__(self) -> str:
        return f"ActivationTable({self.feature}, {len(self.activations)} prompts, {self.positions} token, max {np.max(self.activations):.3f})\n{self.by_group().round(3)}"

    def _repr_html_(self) -> str:
        from html import escape

        return (
            f"<p>Activation of <code>{escape(str(self.feature))}</code>, {self.positions} token</p>"
            + self.to_frame().round(2).to_html(escape=True)
        )


def activation_table(
    model: Model,
    feature: Feature | FeatureRef | str,
    grid: PromptGrid | None = None,
    *,
    positions: str = "last",
    batch_size: int | None = None,
) -> ActivationTable:
    """A feature's activation for each subject × statement, at the last token (`"max"`: over all but special tokens).

    Raises:
        RequestError: a feature that does not fit the model.
    """
    if positions not in POSITIONS:
        raise RequestError(f"positions={positions!r}; expected 'last' or 'max'.")
    loaded = as_feature(feature)
    check_fits(model, loaded)
    grid = load_grid() if grid is None else grid
    acts = feature_acts(model, [p.text for p in grid], loaded, positions=positions, batch_size=batch_size)
    return ActivationTable(loaded.ref, grid, acts, positions, model.name)


@torch.no_grad()
def feature_acts(
    model: Model,
    prompts: list[str],
    feature: Feature,
    *,
    positions: str = "last",
    batch_size: int | None = None,
) -> Float[np.ndarray, "n_prompts"]:
    """One feature's activation on each prompt: at the last token, or its maximum over ordinary tokens."""
    layer = check_site(model, feature.site).layer
    feature = feature.to(model.device)
    out = np.empty(len(prompts))
    for batch in plan_batches([model.encode(p) for p in prompts], model.device, batch_size=batch_size):
        with row_positions(model, torch.full((batch.n,), batch.tokens.shape[1])):
            x = capture_layers(model, batch.tokens, [layer])[layer].float()
        acts = feature.activation(x)
        if positions == "last":
            value = acts[:, -1]
        else:
            special = torch.isin(
                batch.tokens, torch.tensor(sorted(model.special_ids), device=batch.tokens.device)
            )
            value = acts.masked_fill(special, 0.0).amax(-1)
        out[list(batch.index)] = value.double().cpu().numpy()
    if not np.isfinite(out).all():
        bad = prompts[int(np.flatnonzero(~np.isfinite(out))[0])]
        raise RequestError(f"{feature.ref} has a NaN or infinite activation on {bad!r}.")
    return out


def check_fits(model: Model, feature: Feature) -> None:
    """Refuse a feature of another width or a layer the model lacks."""
    check_site(model, feature.site)
    if feature.w_enc.shape[-1] != model.d_model:
        raise RequestError(
            f"{feature.ref} has d_in {feature.w_enc.shape[-1]}, but {model.name} has d_model {model.d_model}: it belongs to another model."
        )
