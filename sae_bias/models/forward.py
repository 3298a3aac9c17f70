"""Residual capture at a site, and resuming the forward pass from it.

Prompts are batched by equal length: no padding, no masks, the same numbers whatever else is asked. The residual is read
before the final norm; norm and unembedding then run in float32 on just the positions and vocabulary rows that are scored.

Resuming is exact on a Hugging Face decoder: the first L+1 layers give way to pass-through modules, of which the last
returns the kept residual, and the model's own forward runs the rest (masks, rotary embedding and layer types included).
Where later layers read the keys of earlier ones (Gemma 4), the earlier ones run too and only the residual is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.core.types import Resid, Tokens
from sae_bias.models.model import Model, ours
from sae_bias.models.placement import widest_float
from sae_bias.models.sites import hidden, hook_site, site_module, site_width, with_hidden

if TYPE_CHECKING:
    from sae_bias.models.tree import Packed

ROWS = 64  # positions whose full logits are held at once
BATCH_TOKENS = {
    "cpu": 4096,
    "cuda": 32768,
}  # tokens of one forward pass; fixed, so that batches never depend on progress


@dataclass(frozen=True)
class Batch:
    """Prompts of one length that are run together."""

    index: tuple[int, ...]
    """Place of each row in the list of prompts."""
    tokens: Tokens

    @property
    def n(self) -> int:
        return len(self.index)


def plan_batches(
    sequences: Sequence[Sequence[int]], device: torch.device, *, batch_size: int | None = None
) -> list[Batch]:
    """Group token lists by length into batches of at most a fixed number of tokens, in a fixed order."""
    by_length: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(i)
    budget = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    batches = []
    for length in sorted(by_length):
        rows = by_length[length]
        size = batch_size or max(1, budget // length)
        for start in range(0, len(rows), size):
            index = tuple(rows[start : start + size])
            tokens = torch.tensor([list(sequences[i]) for i in index], device=device)
            batches.append(Batch(index, tokens))
    return batches


@dataclass(frozen=True)
class Final:
    """The end of a forward pass: the residual before the final norm, or full logits where foreign hooks wanted them."""

    model: Model
    resid: Resid | None
    full: Float[Tensor, "batch pos d_vocab"] | None = None

    def __getitem__(self, at: Any) -> Final:
        """Some rows, or rows and positions."""
        return Final(self.model, *(None if x is None else x[at] for x in (self.resid, self.full)))

    def last(self) -> Final:
        """Only the last position."""
        return self[:, -1:]

    def spots(self, rows: Sequence[int], places: Sequence[int]) -> Final:
        """Some (row, position) spots, each as a row of one position."""
        return self[rows, places][:, None]

    def logits(self, token_ids: Sequence[int] | None = None, *, softcap: bool = True) -> Tensor:
        """Float32 logits [batch, pos, n] of the given vocabulary rows (all rows where None)."""
        if self.full is not None:
            if not softcap and self.model.softcap is not None:
                raise RequestError(
                    "the model carries hooks of its own, so its own softcapped logits are read; softcap=False needs them gone."
                )
            return (self.full if token_ids is None else self.full[..., list(token_ids)]).float()
        assert self.resid is not None
        model = self.model  # the whole unembedding is not copied where it is float32 already
        w, b = (model.w_unembed, model.b_unembed) if token_ids is None else model.rows(token_ids)
        z = model.final_norm(self.resid.float()).to(w.device) @ w.float().T
        z = z if b is None else z + b.float()
        cap = self.model.softcap if softcap else None
        return z if cap is None else cap * torch.tanh(z / cap)

    def blocks(self, *, softcap: bool = True) -> Iterator[tuple[slice, Float[Tensor, "n d_vocab"]]]:
        """All logits of the positions, flattened, a few rows at a time so that they are never kept."""
        flat = Final(
            self.model, *(None if x is None else x.flatten(0, 1)[:, None] for x in (self.resid, self.full))
        )
        whole = self.full if self.resid is None else self.resid
        assert whole is not None
        for start in range(0, whole.shape[:2].numel(), ROWS):
            rows = slice(start, start + ROWS)
            yield rows, flat[rows].logits(softcap=softcap)[:, 0]


def log_sum_exp(logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n"]:
    """log Σ exp of each row in the widest float, a few rows at a time: the exponentials take as much memory as the logits."""
    wide, out = widest_float(logits.device), []
    for z in logits.split(16):
        top = z.amax(-1)
        out.append(top.to(wide) + (z - top[:, None]).exp_().sum(-1).to(wide).log())
    return torch.cat(out)


@dataclass(frozen=True)
class Kept:
    """Residuals of one batch, kept at a layer's output, from which the pass can be resumed."""

    layer: int
    resid: Resid


@torch.no_grad()
def forward(model: Model, tokens: Tokens, *, resume: Kept | None = None) -> Final:
    """Run the model (from `resume` on, where given) to the residual before its final norm.

    Where the model carries hooks that are not ours, the whole pass runs so that they fire, and `resume` is refused.
    """
    if model.foreign_hooks():
        if resume is not None:
            raise RequestError("the model carries hooks of its own; the pass cannot be resumed half way.")
        return Final(model, None, model.hf(input_ids=tokens, use_cache=False).logits)
    return forward_with_grad(model, tokens, resume=resume)


def forward_with_grad(
    model: Model, tokens: Tokens, *, resume: Kept | None = None, packed: Packed | None = None
) -> Final:
    """`forward`, recording gradients with respect to a kept residual that asks for them.

    packed: where the tokens are a tree's, its positions and masks.
    """
    captured: list[Tensor] = []
    more = {} if packed is None else packed.arguments(model)

    @ours
    def capture(module: nn.Module, args: Any, output: Any) -> None:
        captured.append(hidden(output))

    handle = model.layer(model.n_layers - 1).register_forward_hook(capture)
    try:
        if resume is None:
            model.base(input_ids=tokens, use_cache=False, **more)
        elif resume.layer == model.n_layers - 1:
            return Final(model, resume.resid)
        else:
            with _resumed(model, resume):
                model.base(input_ids=tokens, use_cache=False, **more)
    finally:
        handle.remove()
    return Final(model, captured[-1])


Where = TypeVar("Where", int, Site)
"""A layer, whose resid_post is meant, or a site."""


class _Stop(Exception):
    """Ends a forward pass once the wanted layer has run."""


@torch.no_grad()
def capture_layers(
    model: Model,
    tokens: Tokens,
    layers: Sequence[Where],
    *,
    packed: Packed | None = None,
    mask: Tensor | None = None,
) -> dict[Where, Resid]:
    """The tensor at each of some sites (resid_post, where a layer is given); layers above the highest are not run.

    Raises:
        RequestError: a residual that is not finite; names the layer and, where it is a weight's fault, the weight.
    """

    @ours
    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Stop

    more = {} if packed is None else packed.arguments(model)
    more |= {} if mask is None else {"attention_mask": mask.to(tokens.device)}
    with keeping(model, layers) as kept:
        handle = model.layer(max(Site.parse(layer).layer for layer in layers)).register_forward_hook(stop)
        try:
            model.base(input_ids=tokens, use_cache=False, **more)
        except _Stop:
            pass
        finally:
            handle.remove()
    for layer, x in kept.items():
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bool(bad.any()):
            text = model.tokenizer.decode(tokens[int(bad.nonzero()[0])], skip_special_tokens=True)
            site = Site.parse(layer)
            where = f"after layer {site.layer}" if site.is_resid_post else f"at {site}"
            raise RequestError(
                f"the residual of {model.name} {where} holds NaN or infinite values on {str(text)!r}{model.why_not_finite()}."
            )
    return kept


@contextmanager
def keeping(model: Model, layers: Sequence[Where]) -> Iterator[dict[Where, Tensor]]:
    """Keeps the tensor at each of some sites (resid_post, where a layer is given) of the pass inside."""
    seen: dict[Where, Tensor] = {}

    def make(layer: Where) -> Any:
        inside = not Site.parse(layer).is_resid_post  # Falcon adds to its MLP's output in place
        return lambda x: seen.__setitem__(layer, x.detach().clone() if inside else x.detach())

    handles = [hook_site(model, Site.parse(layer), make(layer)) for layer in sorted(layers, key=Site.parse)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Partners:
    """The paired human prompt of each row of a batch (a human prompt's partner is itself, with nothing to match)."""

    sequences: tuple[tuple[int, ...], ...]
    suffix: Tensor
    """[batch] how many positions, counted from the right, stand for each other."""


@contextmanager
def row_positions(
    model: Model,
    prompt_len: Tensor | None,
    subject_start: Tensor | None = None,
    partners: Partners | None = None,
    *,
    packed: Packed | None = None,
) -> Iterator[None]:
    """Tell open interventions where each row's prompt ends, its subject begins and what it is paired with.

    packed: the pass is a tree's, and these positions are each token's.
    """
    before = model.row_positions, model.row_partners, model.row_tree
    model.row_positions, model.row_partners = (prompt_len, subject_start), partners
    model.row_tree = packed
    try:
        yield
    finally:
        model.row_positions, model.row_partners, model.row_tree = before


def check_site(model: Model, site: Site | str | int) -> Site:
    """The Site meant, which the model must have."""
    site = site if isinstance(site, Site) else Site.parse(site)
    if not 0 <= site.layer < model.n_layers:
        raise RequestError(
            f"layer {site.layer} does not exist in {model.name}: it has layers 0 to {model.n_layers - 1}."
        )
    site_module(model, site)
    return site


def check_fits(model: Model, what: str, site: Site, width: int) -> Site:
    """Refuse what was made for another width, or a layer the model lacks."""
    site = check_site(model, site)
    if width != (own := site_width(model, site)):
        name = "d_model" if own == model.d_model else f"at {site} a width of"
        raise RequestError(
            f"{what} has d_in {width}, but {model.name} has {name} {own}: it belongs to another model."
        )
    return site


class _PassThrough(nn.Module):
    """Stands in for a decoder layer: gives back its input, or a kept residual."""

    def __init__(self, original: nn.Module, as_tuple: bool, resid: Tensor | None):
        super().__init__()
        self.resid, self.as_tuple = resid, as_tuple
        if hasattr(original, "attention_type"):
            self.attention_type = original.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = hidden_states if self.resid is None else self.resid
        return (x, None) if self.as_tuple else x


@contextmanager
def _resumed(model: Model, resume: Kept) -> Iterator[None]:
    """The decoder with its residual after one layer replaced, the layers below it skipped where nothing else reads them."""
    if model.arch.shared_kv(model.config) not in range(resume.layer + 1):
        with _passing_through(model, resume):
            yield
        return

    @ours
    def replaced(module: nn.Module, args: Any, output: Any) -> Any:
        return with_hidden(output, resume.resid)

    handle = model.layer(resume.layer).register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _passing_through(model: Model, resume: Kept) -> Iterator[None]:
    layers = model.layer_list
    originals = [layers[i] for i in range(resume.layer + 1)]
    for i, original in enumerate(originals):
        kept = resume.resid if i == resume.layer else None
        layers[i] = _PassThrough(original, model.arch.tuple_output, kept)
    try:
        yield
    finally:
        for i, original in enumerate(originals):
            layers[i] = original
