"""Applying interventions: edits become one delta a site, the delta becomes a forward hook, the hook reports what it did.

All edits at one site read one, unedited residual x, and their deltas add up (chaining hooks would re-encode an edited x and
give something else). Encoders, thresholds and deltas are float32 whatever the model's dtype. Special tokens are left alone by
id, never by index: under a KV cache index 0 is the newest token. Positions count from the start of the sequence, the cached
part included, so prefill, cached decoding and left padding follow one contract.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sae_bias.core.errors import RequestError, SaeBiasError
from sae_bias.core.site import Site
from sae_bias.core.types import PositionMask, Resid, Tokens
from sae_bias.models.forward import check_site, hidden, with_hidden
from sae_bias.models.model import Model, ours
from sae_bias.models.placement import widest_float
from sae_bias.saes.load import as_feature, load_sae
from sae_bias.saes.sae import Feature, Sae
from sae_bias.steering.donors import Sources
from sae_bias.steering.edits import (
    Clamp,
    Direction,
    FeatureEdit,
    Intervention,
    Patch,
    ProjectOut,
    Reconstruct,
    Resample,
    Steer,
    feature_ref,
)
from sae_bias.steering.receipt import EditReceipt, Receipt


class HookNeverFiredError(SaeBiasError):
    """The model was not run inside `intervene`, or not through the edited layer: the edit silently did nothing."""


@dataclass(frozen=True)
class PassInfo:
    """The tokens a forward pass sees, and where its rows' prompts and subjects are."""

    tokens: Tokens
    past: int = 0
    """Tokens already in the KV cache."""
    attention_mask: Tensor | None = None
    prompt_len: Tensor | None = None
    """[batch] end of each row's prompt, counted from the start of the sequence (left padding included)."""
    subject_start: Tensor | None = None
    """[batch] first position of each row's subject, counted likewise."""
    sources: Sources | None = None
    """What edits may read beside the residual: the paired prompts, another model."""


def position_mask(info: PassInfo, positions: str, special_ids: frozenset[int]) -> PositionMask:
    """Which positions of this pass an edit may change: the named ones, without special and padded tokens."""
    n = info.tokens.shape[1]
    device = info.tokens.device
    place = info.past + torch.arange(n, device=device)
    special = torch.tensor(sorted(special_ids), device=device, dtype=info.tokens.dtype)
    mask = ~torch.isin(info.tokens, special)
    if info.attention_mask is not None and info.attention_mask.ndim == 2:
        mask &= info.attention_mask[:, -n:].to(device).bool()
    if positions == "all":
        return mask
    if positions == "subject":
        if info.subject_start is None:
            raise RequestError(
                'positions="subject" needs prompts with a known subject, such as a probe on pairs.'
            )
        return mask & (place >= info.subject_start.to(device)[:, None])
    assert info.prompt_len is not None
    end = info.prompt_len.to(device)[:, None]
    if positions == "last":
        return mask & (place == end - 1)
    return mask & ((place < end) if positions == "prompt" else (place >= end))


class SiteEdit:
    """All edits of one `intervene` block at one site, with the few weights they need, as one function x → Δ."""

    def __init__(self, model: Model, site: Site, edits: Sequence[Intervention]):
        self.model = model
        self.site = site
        self.edits = list(edits)
        self._rows: dict[Any, Any] = {}
        for edit in self.edits:
            self._rows[edit] = _on(model.layer_device(check_site(model, site).layer), _weights(edit))

    def delta(
        self, x: Resid, info: PassInfo, receipts: dict[Intervention, EditReceipt] | None = None
    ) -> Resid | None:
        """Δ in float32, zero where nothing changes; None where nothing changes at all."""
        x32 = x.float()
        total: Tensor | None = None
        encoded: dict[int, Tensor] = {}
        masks: dict[tuple[str, bool], Tensor] = {}
        for edit in self.edits:
            key = (edit.positions, edit.include_special)
            if key not in masks:
                special = frozenset() if edit.include_special else self.model.special_ids
                masks[key] = position_mask(info, edit.positions, special).to(x.device)
            step = self._one(edit, x32, masks[key], encoded, info)
            if self._note(receipts[edit] if receipts else None, step, x32, masks[key], info):
                total = step.delta if total is None else total + step.delta
        return total

    def _one(
        self, edit: Intervention, x: Tensor, mask: Tensor, encoded: dict[int, Tensor], info: PassInfo
    ) -> _Step:
        weights = self._rows[edit]
        if isinstance(edit, FeatureEdit):
            acts = weights.acts(x, encoded)
            new = self._resampled(weights, acts, info) if isinstance(edit, Resample) else edit.new_acts(acts)
            change = torch.where(mask, new - acts, torch.zeros_like(acts))
            return _Step(weights.feature.write(x, change), change != 0, acts, acts + change)
        if isinstance(edit, Steer):
            row = weights.feature.w_dec if isinstance(weights, _Loaded) else weights
            if edit.norm_relative:
                delta = edit.alpha * x.norm(dim=-1, keepdim=True) * (row / row.norm()).to(x.device)
            elif isinstance(weights, _Loaded):
                delta = weights.feature.write(x, x.new_full(x.shape[:-1], edit.alpha))
            else:
                delta = (edit.alpha * row.to(x.device)).expand_as(x)
        elif isinstance(edit, ProjectOut):
            basis, mean = weights[0].to(x.device), weights[1]
            centred = x if mean is None else x - mean.to(x.device)
            delta = -edit.share * (centred @ basis.T) @ basis
        elif isinstance(edit, Patch):
            assert info.sources is not None
            delta = info.sources.other(edit.source, self.site.layer)[:, -x.shape[1] :].to(x) - x
        elif isinstance(edit, Reconstruct):
            delta = weights.decode(weights.encode(x), x).to(x.device) - x
        else:
            raise RequestError(f"{type(edit).__name__} is not an intervention sae-bias can apply.")
        delta = torch.where(mask[..., None], delta, torch.zeros_like(delta))
        return _Step(delta, (delta != 0).any(-1), None, None)

    def _resampled(self, weights: Any, acts: Tensor, info: PassInfo) -> Tensor:
        """a' of Resample: the paired prompt's activation where positions match, a elsewhere."""
        assert info.sources is not None
        paired, matched = info.sources.paired(self.site.layer)
        return torch.where(matched.to(acts.device), weights.acts(paired.to(acts.device).float(), {}), acts)

    def _note(
        self, receipt: EditReceipt | None, step: _Step, x: Tensor, mask: Tensor, info: PassInfo
    ) -> bool:
        """Add one pass to the receipt, in one transfer from the device; whether any position changed."""
        changed = step.changed
        if receipt is None:
            return bool(changed.any())
        markers = torch.tensor(
            sorted(self.model.turn_marker_ids), device=info.tokens.device, dtype=info.tokens.dtype
        )
        marked = changed & torch.isin(info.tokens, markers).to(changed.device)
        size = x.norm(dim=-1).clamp(min=1e-30)
        relative = torch.where(changed, step.delta.norm(dim=-1) / size, torch.zeros_like(size))
        sums = [mask.sum(), changed.sum(), marked.sum(), relative.sum()]
        if step.before is not None and step.after is not None:
            before, after, zero = step.before, step.after, torch.zeros_like(step.before)
            active = mask & (before > 0)
            sums += [active.sum(), (changed & ~active).sum(), torch.where(active, before, zero).max()]
            sums += [torch.where(changed, a, zero).sum() for a in (before, after)]
        seen, n, marks, moved, *acts = torch.stack([v.to(widest_float(v.device)) for v in sums]).tolist()
        receipt.positions_seen += int(seen)
        receipt.positions_active += int(acts[0] if acts else seen)
        receipt.positions_changed += int(n)
        receipt.markers_changed += int(marks)
        receipt._sum_relative += moved
        if acts:
            receipt.written_inactive += int(acts[1])
            receipt._sum_before += acts[3]
            receipt._sum_after += acts[4]
        if acts and acts[0]:
            receipt.max_act = acts[2] if math.isnan(receipt.max_act) else max(receipt.max_act, acts[2])
        return n > 0


@dataclass(frozen=True)
class _Step:
    """One edit's delta [batch, pos, d_model], where it is non-zero, and the activations around it."""

    delta: Tensor
    changed: Tensor
    before: Tensor | None
    after: Tensor | None


@dataclass
class _Loaded:
    """A feature's weights; an SAE whose encoder needs all of its columns encodes each residual once for all of its features."""

    feature: Feature

    def acts(self, x: Tensor, encoded: dict[int, Tensor]) -> Tensor:
        sae = self.feature.whole
        if sae is None:
            return self.feature.to(x.device).activation(x)
        if id(sae) not in encoded:
            encoded[id(sae)] = sae.encode(x)
        return encoded[id(sae)][..., self.feature.index].to(x.device)


def _weights(edit: Intervention) -> Any:
    if isinstance(edit, FeatureEdit):
        return _Loaded(as_feature(edit.feature))
    if isinstance(edit, Steer):
        if isinstance(edit.along, Direction):
            if len(edit.along.basis) != 1:
                raise RequestError(f"Steer needs one direction; {edit.along} has {len(edit.along.basis)}.")
            return edit.along.basis[0]
        return _Loaded(as_feature(edit.along))
    if isinstance(edit, ProjectOut):
        if isinstance(edit.along, Direction):
            return edit.along.basis, edit.along.mean
        w_dec = as_feature(edit.along).w_dec
        return (w_dec / w_dec.norm())[None], None
    if isinstance(edit, Patch):
        return edit.source
    if isinstance(edit, Reconstruct):
        return load_sae(edit.sae)
    raise RequestError(f"{type(edit).__name__} is not an intervention sae-bias can apply.")


def _on(device: torch.device, weights: Any) -> Any:
    """The weights on the device of the site's layer, moved once a block and not once a pass."""
    if isinstance(weights, _Loaded):
        return _Loaded(weights.feature.to(device))
    if isinstance(weights, tuple):
        return tuple(None if w is None else w.to(device) for w in weights)
    return weights.to(device) if isinstance(weights, Tensor) else weights


def edit_site(edit: Intervention) -> Site:
    """The site an intervention acts at."""
    if isinstance(edit, Reconstruct):
        return load_sae(edit.sae).site
    if isinstance(edit, Patch):
        return Site.parse(edit.site)
    along = edit.along if isinstance(edit, (Steer, ProjectOut)) else getattr(edit, "feature", None)
    if along is None:
        raise RequestError(f"{type(edit).__name__} is not an intervention sae-bias can apply.")
    return along.site if isinstance(along, (Direction, Feature)) else load_sae(feature_ref(along).sae).site


def compile_edits(model: Model, edits: Sequence[Intervention]) -> dict[Site, SiteEdit]:
    """The edits grouped by site, their weights loaded and checked against the model.

    Raises:
        RequestError: an edit for another width or a layer the model lacks; one feature edited twice.
    """
    by_site: dict[Site, list[Intervention]] = {}
    seen: set[str] = set()
    for edit in edits:
        if not isinstance(edit, Intervention):
            raise RequestError(
                f"expected interventions such as sb.Ablate(feature), not {type(edit).__name__}."
            )
        if isinstance(edit, FeatureEdit):
            if edit.target in seen:
                raise RequestError(f"{edit.target} is edited twice; one feature takes one edit at a time.")
            seen.add(edit.target)
        by_site.setdefault(check_site(model, edit_site(edit)), []).append(edit)
    compiled = {site: SiteEdit(model, site, group) for site, group in by_site.items()}
    for site_edit in compiled.values():
        for edit, weights in site_edit._rows.items():
            width = _width(weights)
            if width != model.d_model:
                raise RequestError(
                    f"{edit.target} has d_in {width}, but {model.name} has d_model {model.d_model}: it belongs to another model."
                )
    return compiled


def _width(weights: Any) -> int:
    if isinstance(weights, Model):
        return weights.d_model
    if isinstance(weights, Sae):
        return weights.d_in
    if isinstance(weights, tuple):
        return weights[0].shape[-1]
    return (weights.feature.w_dec if isinstance(weights, _Loaded) else weights).shape[-1]


class _Context:
    """One `intervene` block: its compiled edits and its receipt."""

    def __init__(self, model: Model, edits: Sequence[Intervention]):
        self.sites = compile_edits(model, edits)
        self.receipts = {edit: EditReceipt(edit) for edit in edits}
        self.receipt = Receipt(list(self.receipts.values()))


class _State:
    """The hooks of all open `intervene` blocks of a model, and the pass they are in."""

    def __init__(self, model: Model):
        self.model = model
        self.contexts: list[_Context] = []
        self.handles: list[Any] = []
        self.info: PassInfo | None = None
        self._prompt_len: Tensor | None = None
        self._history: Tensor | None = None
        self._looking = False  # while residuals are read from elsewhere, nothing is edited

    def rebuild(self) -> None:
        """One pre-hook on the decoder and one hook a site, for whatever blocks are open now."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        sites = {site for context in self.contexts for site in context.sites}
        if not sites:
            return
        begin = ours(lambda module, args, kwargs: self._begin(args, kwargs))
        self.handles.append(self.model.base.register_forward_pre_hook(begin, with_kwargs=True))
        for site in sites:
            self.handles.append(self.model.layer(site.layer).register_forward_hook(ours(self._hook(site))))

    def _begin(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Note the pass's tokens; every layer sees every position (Gemma 4's decoder would drop some of the prompt's)."""
        if self._looking:
            return None
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            raise RequestError(
                "interventions need token ids (input_ids), because special tokens are known by id; inputs_embeds has none."
            )
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        prompt_len, subject_start = self.model.row_positions
        if prompt_len is None:
            if past == 0 or self._prompt_len is None or len(self._prompt_len) != len(tokens):
                self._prompt_len = torch.full((len(tokens),), past + tokens.shape[1])
            prompt_len = self._prompt_len
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) else None
        sources = self._look(tokens, past, mask)
        self.info = PassInfo(tokens, past, mask, prompt_len, subject_start, sources)
        return (args, kwargs | {"logits_to_keep": 0}) if kwargs.get("logits_to_keep") else None

    def _look(self, tokens: Tensor, past: int, mask: Tensor | None) -> Sources | None:
        """Read what edits take from elsewhere, over the whole sequence so far, with every edit switched off."""
        wanted = [
            (edit, site)
            for context in self.contexts
            for site, site_edit in context.sites.items()
            for edit in site_edit.edits
            if edit.needs_pairs or isinstance(edit, Patch)
        ]
        if not wanted:
            return None
        before = self._history if past else None
        self._history = tokens if before is None else torch.cat([before, tokens], dim=1)
        if self._history.shape[1] != past + tokens.shape[1]:
            raise RequestError(
                "a patched or resampled pass must start inside its intervene block, so that every token is known."
            )
        partners = self.model.row_partners if not past else None
        sources = Sources(
            self.model, self._history, partners, mask if mask is None or mask.ndim == 2 else None
        )
        self._looking = True
        try:
            for edit, site in wanted:
                sources.prepare(edit, site.layer)
        finally:
            self._looking = False
        return sources

    def _hook(self, site: Site) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self._looking:
                return None
            x = hidden(output)
            assert self.info is not None
            total: Tensor | None = None
            for context in self.contexts:
                site_edit = context.sites.get(site)
                if site_edit is None:
                    continue
                context.receipt.hook_calls += 1
                delta = site_edit.delta(x, self.info, context.receipts)
                if delta is not None:
                    total = delta if total is None else total + delta
            return None if total is None else with_hidden(output, add_delta(x, total))

        return hook


def add_delta(x: Resid, delta: Resid) -> Resid:
    """x + Δ in float32, back in x's dtype; positions with Δ = 0 keep their bits."""
    changed = (delta != 0).any(-1, keepdim=True)
    return torch.where(changed, (x.float() + delta).to(x.dtype), x)


def loaded(edit: Intervention) -> Intervention:
    """`edit` with its feature's weights read, so that they are not read again for every block."""
    for name in ("feature", "along"):
        value = getattr(edit, name, None)
        if value is not None and not isinstance(value, (Feature, Direction)):
            return replace(edit, **{name: as_feature(value)})
    return edit


@contextmanager
def intervene(model: Model, *edits: Intervention | Sequence[Intervention]) -> Iterator[Receipt]:
    """Run everything inside the block with `edits` applied; hooks come off at its end, also after an exception.

    Works around the caller's own calls too (`model.bridge(...)`, `model.hf.generate(...)`), because the hooks sit on the
    model's modules. Blocks nest: every edit still reads the unedited residual of its site.

    Yields:
        A Receipt that fills while the block runs.

    Raises:
        HookNeverFiredError: at the end, if the edited layers were never run.
        RequestError: an edit that does not fit the model.
    """
    flat = [e for edit in edits for e in (edit if isinstance(edit, (list, tuple)) else [edit])]
    state: _State = model._edits or _State(model)
    context = _Context(model, flat)  # type: ignore[arg-type]
    taken = {e.target for c in state.contexts for e in c.receipts if isinstance(e, FeatureEdit)}
    for edit in context.receipts:
        if isinstance(edit, FeatureEdit) and edit.target in taken:
            raise RequestError(f"{edit.target} is edited twice; an outer intervene block edits it already.")
    model._edits = state
    state.contexts.append(context)
    try:
        state.rebuild()
        yield context.receipt
    finally:
        state.contexts.remove(context)
        state.rebuild()
        if not state.contexts:
            model._edits = None
    if context.sites and not context.receipt.hook_calls:
        raise HookNeverFiredError(
            "no forward pass ran inside the intervene block, so the edit did nothing; run the model, the probe or generate() inside it."
        )
    warn_written_inactive(context.receipt)


def warn_written_inactive(receipt: Receipt) -> None:
    """One warning for each clamp that wrote a negative value into a silent feature, with the share of such positions."""
    for edit in receipt.edits:
        clamp = edit.intervention
        if isinstance(clamp, Clamp) and clamp.when == "always" and clamp.value < 0 and edit.written_inactive:
            share = edit.written_inactive / edit.positions_seen
            warnings.warn(
                f"{clamp.describe()} on {clamp.target} wrote a negative value at {edit.written_inactive} positions where the feature "
                f"had not fired ({share:.0%} of those seen); when='active' leaves them alone.",
                stacklevel=4,
            )
