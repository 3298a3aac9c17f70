"""Activation tables: how strongly a feature fires for each subject and statement (the study's table, docs/published.md#activation-table).

    a = JumpReLU(x · W_enc + b_enc) at the last token of "{subject} {statement} This is", or at each token, or their maximum

BOS and other special tokens are left out by id: no SAE of Gemma Scope was trained on them.

A feature's activation on every token of some texts, as a frame and as colored text in Jupyter.

The texts run through the model as they stand (or under whatever is open on it); special tokens are left out, since edits leave them
alone and most SAEs were not trained on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.discovery.ordering import OrderingTest, ai_and_others, ordering_test
from sae_bias.models.forward import check_site
from sae_bias.models.model import Model
from sae_bias.models.residuals import text_batches
from sae_bias.prompts.grid import PromptGrid
from sae_bias.prompts.load import load_grid
from sae_bias.saes.ids import FeatureRef
from sae_bias.saes.load import as_feature
from sae_bias.saes.sae import Feature, check_sae
from sae_bias.steering.intervention import FeatureLike

if TYPE_CHECKING:
    import plotly.graph_objects as go


POSITIONS = ("last", "max", "tokens")


@dataclass(frozen=True, eq=False)
class ActivationTable:
    """One feature's activation on every prompt of a grid."""

    feature: FeatureRef
    grid: PromptGrid
    activations: Float[np.ndarray, "n_prompts"]
    """Activation at the last token, or the maximum over ordinary tokens (also where every token is kept)."""
    positions: str
    model_name: str
    tokens: pd.DataFrame | None = None
    """With positions="tokens", one row a token: prompt, position, token, activation (NaN at special tokens)."""

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

    def by_token(self) -> pd.DataFrame:
        """One row a token: subject, group, statement, act, match, content, position, token, activation.

        Raises:
            RequestError: the table was made without positions="tokens".
        """
        if self.tokens is None:
            raise RequestError('this table holds one number a prompt; make it with positions="tokens".')
        facts = self.long().drop(columns=["activation"]).rename_axis("prompt").reset_index()
        return facts.merge(self.tokens, on="prompt").drop(columns=["prompt"])

    def ordering_test(self) -> OrderingTest:
        """Does the published ordering of the five statements hold, for AI subjects and for nobody else?

        Raises:
            RequestError: the grid lacks the published statements.
        """
        ai, others = ai_and_others(
            [p.group for p in self.grid], [p.statement for p in self.grid], [p.subject for p in self.grid], self.activations
        )  # fmt: skip
        return ordering_test(ai, others)

    def to_csv(self, path: str | Path | None = None) -> str:
        """Subjects × statements as CSV; written to `path` where one is given."""
        return _written(self.to_frame().to_csv(float_format="%.6g"), path)

    def to_markdown(self, path: str | Path | None = None, *, digits: int = 2) -> str:
        """A Markdown table for a README or a paper's notes."""
        header, rows = self._cells(digits)
        lines = ["| " + " | ".join(_md(c) for c in header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
        lines += ["| " + " | ".join(_md(c) for c in row) + " |" for row in rows]
        return _written("\n".join(lines) + "\n", path)

    def to_latex(self, path: str | Path | None = None, *, digits: int = 2, caption: str | None = None) -> str:
        """A LaTeX table (booktabs) for a paper."""
        header, rows = self._cells(digits)
        caption = caption or f"Activation of {self.feature}, {self._which()}, in {self.model_name}."
        body = [" & ".join(_tex(c) for c in row) + r" \\" for row in (header, *rows)]
        lines = [
            r"\begin{table}", r"\centering", rf"\caption{{{_tex(caption)}}}", rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}",
        ]  # fmt: skip
        return _written("\n".join(lines) + "\n", path)

    def _cells(self, digits: int) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text; a missing cell is empty, never 0."""
        table = self.to_frame()
        rows = [
            [str(name), *("" if np.isnan(v) else f"{v:.{digits}f}" for v in row)]
            for name, row in zip(table.index, table.to_numpy(dtype=float))
        ]
        return ["subject", *map(str, table.columns)], rows

    def _which(self) -> str:
        return "last token" if self.positions == "last" else "maximum over tokens"

    def plot(self) -> go.Figure:
        """Heat map of subjects × statements."""
        from sae_bias.figures.features import activation_heatmap

        return activation_heatmap(self.long())

    def __repr__(self) -> str:
        return f"ActivationTable({self.feature}, {len(self.activations)} prompts, {self._which()}, max {np.max(self.activations):.3f})\n{self.by_group().round(3)}"

    def _repr_html_(self) -> str:
        from html import escape

        return (
            f"<p>Activation of <code>{escape(str(self.feature))}</code>, {escape(self._which())}</p>"
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
    """A feature's activation for each subject × statement of `grid` (the bundled one, or load_grid("mine.yaml")).

    Args:
        positions: "last" token, "max" over all but special tokens, or "tokens": the maximum, and `.by_token()` for each.

    Raises:
        RequestError: a feature that does not fit the model; an empty grid.
    """
    if positions not in POSITIONS:
        raise RequestError(f"positions={positions!r}; expected 'last', 'max' or 'tokens'.")
    loaded = as_feature(feature)
    check_sae(model, loaded)
    grid = load_grid() if grid is None else grid
    if not len(grid):
        raise RequestError("the grid holds no prompts; give subjects and statements.")
    texts = [p.text for p in grid]
    if positions == "tokens":
        tokens = _token_frame(model, texts, loaded, batch_size)
        acts = tokens.groupby("prompt")["activation"].max().to_numpy()
        return ActivationTable(loaded.ref, grid, acts, positions, model.name, tokens)
    acts = feature_acts(model, texts, loaded, positions=positions, batch_size=batch_size)
    return ActivationTable(loaded.ref, grid, acts, positions, model.name)


def _token_frame(model: Model, texts: list[str], feature: Feature, batch_size: int | None) -> pd.DataFrame:
    """prompt, position, token, activation of every token; NaN at special tokens."""
    parts = []
    for i, (pieces, acts) in enumerate(token_acts(model, texts, feature, batch_size=batch_size)):
        parts.append(
            pd.DataFrame(
                {"prompt": i, "position": range(len(pieces)), "token": pieces, "activation": acts.numpy()}
            )
        )
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def token_acts(
    model: Model, texts: Sequence[str], feature: Feature, *, batch_size: int | None = None
) -> list[tuple[list[str], Tensor]]:
    """(tokens as text, activation of each [pos], NaN at special tokens) of every text."""
    site = check_site(model, feature.site)
    feature = feature.to(model.device)
    ids = [model.encode(t) for t in texts]
    out: list[tuple[list[str], Tensor]] = [([], torch.empty(0))] * len(ids)
    for batch in text_batches(model, ids, [site], batch_size=batch_size):
        acts = feature.activation(batch.resid[site]).masked_fill(~batch.ordinary, torch.nan).cpu().double()
        for row, i in enumerate(batch.index):
            out[i] = (token_texts(model, ids[i]), acts[row])
    return out


def token_texts(model: Model, ids: Sequence[int]) -> list[str]:
    """Each token as it stands in the text, its leading space included; special tokens by their names."""
    special = set(model.tokenizer.all_special_ids)
    texts, done = [], ""
    for i, token in enumerate(ids):
        if token in special:
            texts.append(str(model.tokenizer.convert_ids_to_tokens(int(token))))
            continue
        so_far = model.tokenizer.decode(list(ids[: i + 1]), skip_special_tokens=True)
        assert isinstance(so_far, str)
        whole = so_far.rstrip("\ufffd")  # a character is shown by the token that completes it
        new = whole[len(done) :] if whole.startswith(done) else ""
        texts.append(new)
        done = whole if new else done
    return texts


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
    site = check_site(model, feature.site)
    feature = feature.to(model.device)
    out = np.empty(len(prompts))
    for batch in text_batches(model, prompts, [site], batch_size=batch_size):
        acts = feature.activation(batch.resid[site])
        value = acts[:, -1] if positions == "last" else acts.masked_fill(~batch.ordinary, -torch.inf).amax(-1)
        out[list(batch.index)] = value.cpu().double().numpy()
    return out


def _written(text: str, path: str | Path | None) -> str:
    """`text`, also written to `path` where one is given."""
    if path is not None:
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}.") from error
    return text


def _md(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text.replace("\n", " "))


_COLOR = "217,98,43"


@dataclass(frozen=True)
class TokenActivations:
    """Tokens of some texts with one feature's activation on each."""

    feature: str
    tokens: tuple[tuple[str, ...], ...]
    """One tuple a text; a token carries its own leading space."""
    acts: tuple[tuple[float, ...], ...]

    @property
    def largest(self) -> float:
        """Strongest activation over all texts; 0 where the feature never fires."""
        return max((a for row in self.acts for a in row), default=0.0)

    def to_frame(self) -> pd.DataFrame:
        """One row a token: text, position, token, activation."""
        rows = [
            {"text": i, "position": j, "token": token, "activation": act}
            for i, (tokens, acts) in enumerate(zip(self.tokens, self.acts))
            for j, (token, act) in enumerate(zip(tokens, acts))
        ]
        return pd.DataFrame(rows, columns=["text", "position", "token", "activation"])

    def __repr__(self) -> str:
        lines = [f"TokenActivations of {self.feature}: at most {self.largest:.3g} (« » where it fires)"]
        for tokens, acts in zip(self.tokens, self.acts):
            lines.append("  " + "".join(f"«{t}»" if a > 0 else t for t, a in zip(tokens, acts)).strip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        lines = [
            f"<p style='margin:0.3em 0'><small>{escape(self.feature)}, at most {self.largest:.3g}</small></p>"
        ]
        for tokens, acts in zip(self.tokens, self.acts):
            shown = "".join(_span(t, a, self.largest) for t, a in zip(tokens, acts))
            lines.append(f"<p style='margin:0.3em 0;white-space:pre-wrap;text-align:left'>{shown}</p>")
        return "<div>" + "".join(lines) + "</div>"


def token_activations(
    model: Model, feature: FeatureLike, texts: Sequence[str], *, batch_size: int | None = None
) -> TokenActivations:
    """One feature's activation on every token of `texts`.

    Raises:
        RequestError: one text in place of a list, or a feature of another model.
    """
    if isinstance(texts, str):
        raise RequestError("token_activations takes a list of texts; put the one text in a list.")
    found = as_feature(feature)
    check_sae(model, found)
    found, site = found.to(model.device), found.site
    ids = [model.encode(t) for t in texts]
    rows: list[tuple[tuple[str, ...], tuple[float, ...]]] = [((), ())] * len(ids)
    for batch in text_batches(model, ids, [site], batch_size=batch_size):
        acts = found.activation(batch.resid[site]).detach().cpu()
        for row, i in enumerate(batch.index):
            rows[i] = _ordinary(model, ids[i], acts[row])
    return TokenActivations(str(found.ref), tuple(t for t, _ in rows), tuple(a for _, a in rows))


def _ordinary(model: Model, ids: list[int], acts: torch.Tensor) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Texts and activations of the tokens that are not special."""
    kept = [
        (text, float(act))
        for token, text, act in zip(ids, token_texts(model, ids), acts)
        if token not in model.special_ids
    ]
    return tuple(t for t, _ in kept), tuple(a for _, a in kept)


def _span(token: str, act: float, largest: float) -> str:
    """One token, its background as strong as its activation, the number on hovering."""
    shown = escape(token).replace("\n", "↵\n")
    if not act > 0:
        return shown
    return f"<span style='background:rgba({_COLOR},{0.8 * act / largest:.2f});border-radius:2px' title='{act:.3g}'>{shown}</span>"
