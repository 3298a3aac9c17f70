"""Where a module's tensors are, also where accelerate keeps them elsewhere between passes.

Under a `device_map` layers sit on several devices; with offloading a module's parameters are empty (`meta`) between its passes and
come from memory or disk for each. What is read outside a pass (rows of the unembedding, the final norm) is then brought in the same
way, and what is added to a layer's output goes to the device that the layer runs on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """The device a module runs on: its accelerate hook's, or that of its first parameter."""
    for part in module.modules():
        if (device := _hook_device(part)) is not None:
            return torch.device(device)
        if (parameter := next(part.parameters(recurse=False), None)) is not None:
            return parameter.device
    return torch.device("cpu")


def widest_float(device: torch.device) -> torch.dtype:
    """float64, but float32 on MPS, which has no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_offloaded(module: nn.Module) -> bool:
    """Whether a parameter of the module itself is elsewhere between passes."""
    return any(p.is_meta for p in module.parameters(recurse=False))


def resident(module: nn.Module, name: str) -> Tensor:
    """A parameter of the module itself, on the device it runs on, brought there where it is kept elsewhere."""
    if not is_offloaded(module):
        return getattr(module, name)
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name).detach()


def unhooked_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a small module in another dtype, with weights of its own and no hook that would replace them."""
    import copy

    twin = copy.deepcopy(module)
    if hasattr(twin, "_hf_hook"):
        from accelerate.hooks import remove_hook_from_module

        for name, _ in list(module.named_parameters(recurse=False)):
            setattr(twin, name, nn.Parameter(resident(module, name).clone(), requires_grad=False))
        setattr(twin, "_hf_hook", _NoHook())  # noqa: B010 - the copied hook would offload the copy when it is taken off
        remove_hook_from_module(twin)
    return twin.to(dtype)


class _NoHook:
    """Detaches without touching the module."""

    def detach_hook(self, module: nn.Module) -> nn.Module:
        return module


def stored_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of `state_dict()`, offloaded parameters brought in one at a time."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            owner, _, short = name.rpartition(".")
            tensor = resident(modules[owner], short)
        yield name, tensor


def _hook_device(module: nn.Module) -> Any:
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "execution_device", None) is not None:
            return one.execution_device
    return None
