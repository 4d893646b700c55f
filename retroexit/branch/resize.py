"""Give a copied tail other sizes, and fresh weights where its own are not wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.branch.widths.int_attributes import set_attribute
from retroexit.branch.widths.plan import WidthPlan
from retroexit.core.modules import clone_module

__all__ = ["correct_fan_in", "emptied", "resized", "start_from_scratch"]


def resized(tail: nn.Module, plan: WidthPlan, content: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Copy a tail with the plan's sizes.

    Args:
        tail: The full-width tail; it is not changed.
        plan: The chosen widths.
        content: Makes the copy of a parameter or buffer, from its name and the original.

    Returns:
        The copy; what is tied in the tail is tied in it.
    """
    memo: dict[int, Any] = {}
    made: dict[str, Tensor] = {}
    for name, old in [*tail.named_parameters(), *tail.named_buffers()]:
        new = made[name] = content(name, old.detach())
        memo[id(old)] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
    thin = clone_module(tail, memo)
    modules = dict(thin.named_modules(remove_duplicate=False))
    for (path, name), value in plan.attributes.items():
        set_attribute(modules[path], name, value)
    for path, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            # Scripted modules copy their weights without looking into the memo.
            for name, _ in module.named_parameters(recurse=False):
                new = made[f"{path}.{name}"]
                setattr(module, name, nn.Parameter(new, requires_grad=new.is_floating_point()))
            for name, _ in module.named_buffers(recurse=False):
                setattr(module, name, made[f"{path}.{name}"])
            continue
        # A narrowed buffer cannot be made again from the generator; it is saved.
        module._non_persistent_buffers_set -= {
            name for name in module._buffers if _is_resized(tail, plan, f"{path}.{name}" if path else name)
        }
        _sync_descriptions(module)
    return thin


def emptied(tail: nn.Module, plan: WidthPlan) -> nn.Module:
    """Copy a tail with the plan's sizes; the contents of what is narrower are undefined."""

    def content(name: str, old: Tensor) -> Tensor:
        return old.new_empty(plan.shapes[name]) if _is_resized(tail, plan, name) else old.clone()

    return resized(tail, plan, content)


def _is_resized(tail: nn.Module, plan: WidthPlan, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    old = getattr(tail.get_submodule(path), leaf)
    return isinstance(old, Tensor) and plan.shapes.get(name, tuple(old.shape)) != tuple(old.shape)


def start_from_scratch(thin: nn.Module, full: nn.Module, seed: int = 0) -> None:
    """Replace every weight of a branch by a fresh random one, in place.

    Layers that know how (``reset_parameters``) do it themselves; any other parameter is drawn from a normal
    distribution with the mean and spread of the backbone's own, so that constants stay constants.
    """
    originals = dict(full.named_parameters())
    devices = {parameter.device for parameter in thin.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        torch.manual_seed(seed)
        for path, module in thin.named_modules():
            owned = _own_parameters(module)
            before = {name: parameter._version for name, parameter in owned.items()}
            reset = getattr(module, "reset_parameters", None)
            if before and callable(reset):
                reset()
            for name, parameter in owned.items():
                if parameter._version == before[name] and parameter.is_floating_point():
                    original = originals[f"{path}.{name}" if path else name]
                    spread = float(original.std()) if original.numel() > 1 else 0.0
                    parameter.normal_(float(original.mean()), spread) if spread else parameter.fill_(
                        float(original.mean())
                    )


def correct_fan_in(thin: nn.Module, full: nn.Module) -> None:
    """Recompute equalised learning rates: float attributes that are ``gain / sqrt(fan in)`` of a weight."""
    wide = dict(full.named_modules())
    for path, module in thin.named_modules():
        for name, value in list(vars(module).items()):
            if type(value) is not float or not math.isfinite(value) or value <= 0:
                continue
            originals = _own_parameters(wide[path])
            for leaf, parameter in _own_parameters(module).items():
                if parameter.dim() < 2:
                    continue
                original = originals[leaf]
                old, new = _fan_in(original), _fan_in(parameter)
                gain = value * math.sqrt(old)
                if old != new and any(
                    math.isclose(gain, g, rel_tol=1e-4) for g in (1.0, math.sqrt(2.0), 0.01, 0.1)
                ):
                    setattr(module, name, gain / math.sqrt(new))
                    break


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a module itself holds; scripted modules keep theirs where only this way leads."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _fan_in(weight: Tensor) -> int:
    # StyleGAN's modulated weights have a leading axis of one.
    shape = weight.shape[1:] if weight.shape[0] == 1 and weight.dim() > 2 else weight.shape
    return math.prod(shape[1:])


def _sync_descriptions(module: nn.Module) -> None:
    """Let the channel counts that a built-in layer prints (and that profilers read) follow its weight."""
    if not type(module).__module__.startswith("torch.nn.modules"):
        return
    weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
    if weight is None:
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        axis_out, axis_in = (1, 0) if module.transposed else (0, 1)
        out, into = weight.shape[axis_out], weight.shape[axis_in]
        module.out_channels = out * (module.groups if module.transposed else 1)
        module.in_channels = into * (1 if module.transposed else module.groups)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]
