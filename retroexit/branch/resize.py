"""Give a copied tail other sizes, and fresh weights where its own are not wanted."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from retroexit.branch.widths import WidthPlan

__all__ = ["correct_fan_in", "reshape", "start_from_scratch"]


def reshape(tail: nn.Module, plan: WidthPlan) -> None:
    """Give a tail's parameters, buffers and attributes the plan's sizes, in place; contents are undefined."""
    modules = dict(tail.named_modules(remove_duplicate=False))
    resized: dict[int, nn.Parameter] = {}
    for name, old in list(tail.named_parameters(remove_duplicate=False)):
        shape = plan.shapes.get(name)
        if id(old) not in resized and shape is not None and tuple(old.shape) != shape:
            resized[id(old)] = nn.Parameter(old.new_empty(shape))
    # A tied parameter is planned under its first name and stays tied under all of them.
    for name, old in list(tail.named_parameters(remove_duplicate=False)):
        if id(old) in resized:
            path, _, leaf = name.rpartition(".")
            setattr(modules[path], leaf, resized[id(old)])
    for name, buffer in list(tail.named_buffers()):
        shape = plan.shapes.get(name)
        if shape is not None and tuple(buffer.shape) != shape:
            path, _, leaf = name.rpartition(".")
            setattr(modules[path], leaf, buffer.new_empty(shape))
    for (path, name), value in plan.attributes.items():
        setattr(modules[path], name, value)
    for module in tail.modules():
        _sync_descriptions(module)


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
