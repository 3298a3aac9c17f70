"""Applying interventions: edits become one delta a site, the delta becomes a forward hook, the hook reports what it did.

All edits at one site read one, unedited residual x, and their deltas add up (chaining hooks would re-encode an edited x and
give something else). Encoders, thresholds and deltas are float32 whatever the model's dtype. Special tokens are left alone by
id, never by index: under a KV cache index 0 is the newest token. Positions count from the start of the sequence, the cached
part included, so prefill, cached decoding and left padding follow one contract.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sae_bias.core.errors import RequestError, SaeBiasError
from sae_bias.core.site import Site
from sae_bias.core.types import Resid
from sae_bias.models.forward import check_site
from sae_bias.models.model import Model, ours
from sae_bias.models.placement import widest_float
from sae_bias.models.sites import hook_site
from sae_bias.steering.context import Change, EditContext, PassInfo, position_mask
from sae_bias.steering.donors import Sources
from sae_bias.steering.edits import Clamp
from sae_bias.steering.intervention import Intervention
from sae_bias.steering.receipt import EditReceipt, Receipt


class HookNeverFiredError(SaeBiasError):
    """The model was not run inside `intervene`, or not through the edited layer: the edit silently did nothing."""


class SiteEdit:
    """All edits of one `intervene` block at one site, bound to the model, as one function x → Δ."""

    def __init__(self, model: Model, site: Site, edits: Sequence[Intervention]):
        self.model = model
        self.site = site
        self.edits = [edit.bind(model) for edit in edits]

    def receipts(self) -> list[EditReceipt]:
        """An empty receipt for each edit, in their order."""
        return [EditReceipt(edit) for edit in self.edits]

    def delta(self, x: Resid, info: PassInfo, receipts: Sequence[EditReceipt] | None = None) -> Resid | None:
        """Δ in float32, zero where nothing changes; None where nothing changes at all."""
        x32 = x.float()
        total: Tensor | None = None
        encoded: dict[int, Tensor] = {}
        masks: dict[tuple[str, bool], Tensor] = {}
        for i, edit in enumerate(self.edits):
            key = (edit.positions, edit.include_special)
            if key not in masks:
                special = frozenset() if edit.include_special else self.model.special_ids
                masks[key] = position_mask(info, edit.positions, special).to(x.device)
            change = edit.delta(x32, EditContext(self.site, masks[key], info, encoded))
            if self._note(receipts[i] if receipts else None, change, x32, masks[key], info):
                total = change.delta if total is None else total + change.delta
        return total

    def _note(
        self, receipt: EditReceipt | None, change: Change, x: Tensor, mask: Tensor, info: PassInfo
    ) -> bool:
        """Add one pass to the receipt, in one transfer from the device; whether any position changed."""
        changed = change.changed
        if receipt is None:
            return bool(changed.any())
        markers = torch.tensor(
            sorted(self.model.turn_marker_ids), device=info.tokens.device, dtype=info.tokens.dtype
        )
        marked = changed & torch.isin(info.tokens, markers).to(changed.device)
        size = x.norm(dim=-1).clamp(min=1e-30)
        times = 1 if info.weight is None else info.weight.to(x.device)
        relative = torch.where(changed, change.delta.norm(dim=-1) / size, torch.zeros_like(size))
        sums = [(v * times).sum() for v in (mask, changed, marked, relative)]
        if change.before is not None and change.after is not None:
            before, after, zero = change.before, change.after, torch.zeros_like(change.before)
            active = mask & (before > 0)
            sums += [
                (active * times).sum(),
                (changed & ~active).mul(times).sum(),
                torch.where(active, before, zero).max(),
            ]
            sums += [(torch.where(changed, a, zero) * times).sum() for a in (before, after)]
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


def compile_edits(model: Model, edits: Sequence[Intervention]) -> dict[Site, SiteEdit]:
    """The edits grouped by site, their weights loaded and checked against the model.

    Raises:
        RequestError: an edit for another width or a layer the model lacks; one feature edited twice.
    """
    by_site: dict[Site, list[Intervention]] = {}
    seen: set[str] = set()
    for edit in flat(edits):
        for name in edit.edited:
            if name in seen:
                raise RequestError(f"{name} is edited twice; one feature takes one edit at a time.")
            seen.add(name)
        by_site.setdefault(check_site(model, edit.site), []).append(edit)
    return {site: SiteEdit(model, site, group) for site, group in by_site.items()}


def flat(edits: Sequence[Intervention]) -> list[Intervention]:
    """The edits one by one, sets taken apart."""
    for edit in edits:
        if not isinstance(edit, Intervention):
            raise RequestError(
                f"expected interventions such as sb.Ablate(feature), not {type(edit).__name__}."
            )
    return [part for edit in edits for part in edit.parts]


class _Context:
    """One `intervene` block: its compiled edits and its receipt."""

    def __init__(self, model: Model, edits: Sequence[Intervention]):
        self.sites = compile_edits(model, edits)
        self.receipts = {site: site_edit.receipts() for site, site_edit in self.sites.items()}
        in_turn = {site: iter(found) for site, found in self.receipts.items()}
        self.receipt = Receipt([next(in_turn[edit.site]) for edit in flat(edits)])

    @property
    def edits(self) -> list[Intervention]:
        """Every edit, bound."""
        return [edit for site_edit in self.sites.values() for edit in site_edit.edits]


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

    @property
    def roles(self) -> frozenset[str] | None:
        """Positions other than all at which the open edits act; None where one of them needs whole sequences (`models.tree`)."""
        edits = [edit for context in self.contexts for edit in context.edits]
        if any(edit.needs_pairs or not edit.by_position for edit in edits):
            return None
        return frozenset(edit.positions for edit in edits) - {"all"}

    @property
    def looks_elsewhere(self) -> bool:
        """Whether an open edit reads what another prompt or model says."""
        return any(edit.looks_elsewhere for context in self.contexts for edit in context.edits)

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
            self.handles.append(hook_site(self.model, site, self._change(site)))

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
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) else None
        prompt_len, subject_start = self.model.row_positions
        if prompt_len is None:
            if past == 0 or self._prompt_len is None or len(self._prompt_len) != len(tokens):
                self._prompt_len = _prompt_ends(tokens, past, mask)
            prompt_len = self._prompt_len
        sources, tree = self._look(tokens, past, mask), self.model.row_tree
        place, weight = (None, None) if tree is None else (tree.place, tree.weight)
        self.info = PassInfo(tokens, past, mask, prompt_len, subject_start, sources, place, weight)
        return (args, kwargs | {"logits_to_keep": 0}) if kwargs.get("logits_to_keep") else None

    def _look(self, tokens: Tensor, past: int, mask: Tensor | None) -> Sources | None:
        """Read what edits take from elsewhere, over the whole sequence so far, with every edit switched off."""
        wanted = [edit for context in self.contexts for edit in context.edits if edit.looks_elsewhere]
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
            self.model,
            self._history,
            partners,
            mask if mask is None or mask.ndim == 2 else None,
            self.model.row_tree,
        )
        self._looking = True
        try:
            for edit in wanted:
                edit.prepare(sources)
        finally:
            self._looking = False
        return sources

    def _change(self, site: Site) -> Callable[[Tensor], Tensor | None]:
        def change(x: Tensor) -> Tensor | None:
            if self._looking:
                return None
            assert self.info is not None
            total: Tensor | None = None
            for context in self.contexts:
                site_edit = context.sites.get(site)
                if site_edit is None:
                    continue
                context.receipt.hook_calls += 1
                delta = site_edit.delta(x, self.info, context.receipts[site])
                if delta is not None:
                    total = delta if total is None else total + delta
            return None if total is None else add_delta(x, total)

        return change


def _prompt_ends(tokens: Tensor, past: int, mask: Tensor | None) -> Tensor:
    """[batch] end of each row: after its last token that is not padding, on whichever side the padding stands."""
    n = past + tokens.shape[1]
    if mask is None or mask.ndim != 2 or mask.shape[1] != n:
        return torch.full((len(tokens),), n)
    place = torch.arange(1, n + 1, device=mask.device)
    return (mask.bool() * place).amax(1).cpu()


def add_delta(x: Resid, delta: Resid) -> Resid:
    """x + Δ in float32, back in x's dtype; positions with Δ = 0 keep their bits."""
    changed = (delta != 0).any(-1, keepdim=True)
    return torch.where(changed, (x.float() + delta).to(x.dtype), x)


@contextmanager
def intervene(model: Model, *edits: Intervention | Sequence[Intervention]) -> Iterator[Receipt]:
    """Run everything inside the block with `edits` applied; hooks come off at its end, also after an exception.

    Works around the caller's own calls too (`model.bridge(...)`, `model.hf.generate(...)`), because the hooks sit on the
    model's modules. Blocks nest: every edit still reads the unedited residual of its site. Training mode and `requires_grad` stay as
    they are in and after the block; `model.release()` gives a caller's own model back as it came to `load_model`.

    Yields:
        A Receipt that fills while the block runs.

    Raises:
        HookNeverFiredError: at the end, if the edited layers were never run.
        RequestError: an edit that does not fit the model.
    """
    given = [e for edit in edits for e in (edit if isinstance(edit, (list, tuple)) else [edit])]
    state: _State = model._edits or _State(model)
    context = _Context(model, given)  # type: ignore[arg-type]
    taken = {name for c in state.contexts for edit in c.edits for name in edit.edited}
    for name in (name for edit in context.edits for name in edit.edited):
        if name in taken:
            raise RequestError(f"{name} is edited twice; an outer intervene block edits it already.")
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
