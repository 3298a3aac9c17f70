"""Where in a model's modules a site is: the module, and whether the tensor is what it is given or what it gives back.

A layer that has a norm of its own after the MLP (Gemma 2 and later, OLMo 2) adds the norms' outputs to the residual: there `attn_out` and
`mlp_out` are those. It is where TransformerLens puts them and where Gemma Scope was trained (Lieberum et al. 2024, arXiv:2408.05147).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.models.architectures import at_path
from sae_bias.models.model import Model, _innermost, ours

_NORMS_AFTER = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}


def site_module(model: Model, site: Site) -> nn.Module:
    """The module that gives a site's tensor back; for `z`, the one that is given it.

    Raises:
        RequestError: a layer the model lacks, or a kind of site that its architecture is not known to have.
    """
    layer = model.layer(site.layer)
    if site.is_resid_post:
        return layer
    path = {
        "attn_out": model.arch.attn,
        "mlp_out": model.arch.mlp,
        "z": f"{model.arch.attn}.{model.arch.attn_proj}",
    }[site.kind]
    if site.kind != "z" and hasattr(layer, _NORMS_AFTER["mlp_out"]):
        path = _NORMS_AFTER[site.kind]
    try:
        return at_path(layer, path)
    except AttributeError:
        raise RequestError(
            f"{site}: layer {site.layer} of {model.name} ({model.arch.name}) has no {path}; sae-bias reads its resid_post only."
        ) from None


def site_width(model: Model, site: Site) -> int:
    """Dimensions of a site's tensor: d_model, or n_heads · d_head where heads are concatenated."""
    if site.kind != "z":
        return model.d_model
    projection: Any = _innermost(site_module(model, site))
    return int(projection.in_features if hasattr(projection, "in_features") else projection.weight.shape[0])


def hook_site(model: Model, site: Site, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Let `see` have the tensor at a site in every pass, and replace it by what `see` returns, where it returns one."""
    module = site_module(model, site)
    if site.kind == "z":

        @ours
        def before(module: nn.Module, args: Any) -> Any:
            new = see(args[0])
            return None if new is None else (new, *args[1:])

        return module.register_forward_pre_hook(before)

    @ours
    def after(module: nn.Module, args: Any, output: Any) -> Any:
        new = see(hidden(output))
        return None if new is None else with_hidden(output, new)

    return module.register_forward_hook(after)


def hidden(output: Any) -> Tensor:
    """The tensor in a module's output (itself, or the first of a tuple)."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Any, new: Tensor) -> Any:
    """`output` with that tensor replaced."""
    return (new, *output[1:]) if isinstance(output, tuple) else new
