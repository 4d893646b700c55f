"""Give a copied tail other sizes, and new random weights if they are not inherited."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.branch.widths.plan import WidthPlan
from retroexit.core.modules import clone_module

__all__ = ["correct_fan_in", "emptied", "int_attributes", "resized", "start_from_scratch"]

_MAX_DEPTH = 3


def int_attributes(module: nn.Module) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """List the attributes of a module, or of its configuration, that are integers or lists or tuples of some.

    Yields:
        The name (``channels``, ``cfg.width``, ``widths.16``), the dictionary that holds it, and its key.
        Parameters, buffers, submodules and private names are left out.
    """
    yield from _int_items("", vars(module), _MAX_DEPTH, {id(module)})


def _int_items(
    prefix: str, owner: dict[Any, Any], depth: int, seen: set[int]
) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    for key, value in list(owner.items()):
        name = str(key)
        if type(key) not in (str, int) or name.startswith("_") or "." in name:
            continue
        if type(value) is int or (type(value) in (list, tuple) and any(type(v) is int for v in value)):
            yield prefix + name, owner, key
        elif depth > 0 and id(value) not in seen:
            content = value if type(value) is dict else _settings(value)
            if content is not None:
                yield from _int_items(f"{prefix}{name}.", content, depth - 1, seen | {id(value)})


def _settings(value: Any) -> dict[Any, Any] | None:
    """Return the attributes of a configuration object."""
    is_other = isinstance(value, (nn.Module, Tensor, type)) or callable(value)
    is_builtin = type(value).__module__.partition(".")[0] in ("builtins", "torch", "numpy", "collections")
    return None if is_other or is_builtin else getattr(value, "__dict__", None)


def resized(tail: nn.Module, plan: WidthPlan, content: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Copy a tail with the plan's sizes; tied weights stay tied.

    Args:
        tail: The full-width tail; it is not changed.
        plan: The chosen widths.
        content: Makes the copy of a parameter or buffer from its name and the original.
    """
    memo: dict[int, Any] = {}
    for name, old in [*tail.named_parameters(), *tail.named_buffers()]:
        new = content(name, old.detach())
        memo[id(old)] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
    thin = clone_module(tail, memo)
    modules = dict(thin.named_modules(remove_duplicate=False))
    for (path, attribute), value in plan.attributes.items():
        for name, owner, key in int_attributes(modules[path]):
            if name == attribute:
                owner[key] = type(owner[key])(value)
    for path, module in modules.items():
        if not isinstance(module, torch.jit.ScriptModule):  # these keep their widths
            # A narrowed buffer cannot be made again from the generator, so it is saved.
            module._non_persistent_buffers_set -= {
                name
                for name in module._buffers
                if _is_resized(tail, plan, f"{path}.{name}" if path else name)
            }
            _update_descriptions(module)
    return thin


def emptied(tail: nn.Module, plan: WidthPlan) -> nn.Module:
    """Copy a tail with the plan's sizes; the contents of narrowed tensors are undefined."""

    def content(name: str, old: Tensor) -> Tensor:
        return old.new_empty(plan.shapes[name]) if _is_resized(tail, plan, name) else old.clone()

    return resized(tail, plan, content)


def _is_resized(tail: nn.Module, plan: WidthPlan, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    old = getattr(tail.get_submodule(path), leaf)
    return isinstance(old, Tensor) and plan.shapes.get(name, tuple(old.shape)) != tuple(old.shape)


def start_from_scratch(thin: nn.Module, full: nn.Module, seed: int = 0) -> None:
    """Initialise every weight of a branch at random, in place.

    Layers with ``reset_parameters`` use it; other parameters are drawn from a normal distribution with the
    mean and standard deviation of the backbone's, so that constants stay constants.
    """
    originals = dict(full.named_parameters())
    devices = {parameter.device for parameter in thin.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        torch.manual_seed(seed)
        for path, module in thin.named_modules():
            owned = _direct_parameters(module)
            before = {name: parameter._version for name, parameter in owned.items()}
            reset = getattr(module, "reset_parameters", None)
            if before and callable(reset):
                reset()
            for name, parameter in owned.items():
                if parameter._version == before[name] and parameter.is_floating_point():
                    original = originals[f"{path}.{name}" if path else name]
                    std = float(original.std()) if original.numel() > 1 else 0.0
                    parameter.normal_(float(original.mean()), std)


def correct_fan_in(thin: nn.Module, full: nn.Module) -> None:
    """Recompute equalised learning rates: float attributes ``gain / sqrt(fan_in)`` of a weight."""
    wide = dict(full.named_modules())
    for path, module in thin.named_modules():
        for name, value in list(vars(module).items()):
            if type(value) is not float or not math.isfinite(value) or value <= 0:
                continue
            originals = _direct_parameters(wide[path])
            for leaf, parameter in _direct_parameters(module).items():
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


def _direct_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a module itself, scripted modules included."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _fan_in(weight: Tensor) -> int:
    # StyleGAN's modulated weights have a leading axis of one.
    shape = weight.shape[1:] if weight.shape[0] == 1 and weight.dim() > 2 else weight.shape
    return math.prod(shape[1:])


def _update_descriptions(module: nn.Module) -> None:
    """Update the channel counts that a PyTorch layer prints, and that profilers read."""
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
