"""Replace narrowed stages by thin ones that an adapter builds through the stage's own constructor.

Narrowing keeps a stage's structure: an identity shortcut stays one, so the feature must first be projected to
the branch's width. A stage that is built anew can have a learned shortcut: the first one takes the whole
feature, and every stage takes the guide as further channels (paper sections 4.1 and 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from retroexit.core.nested import tensors
from retroexit.stages.decoder import Cut

__all__ = ["BuildStage", "StageShape", "first_stage", "inherit_stage", "settle_norms", "stage_shapes"]

BuildStage = Callable[[nn.Module, int, int], nn.Module | None]
"""``(stage, in_channels, out_channels)`` -> a thin stage of the same kind, or ``None``."""


@dataclass(frozen=True)
class StageShape:
    """Channels and spatial size of the input map of a stage, and channels of its output map."""

    channels: int
    size: tuple[int, ...]
    out_channels: int


def stage_shapes(tail: nn.Module, values: Sequence[Tensor], paths: Sequence[str]) -> dict[str, StageShape]:
    """Run a narrowed tail once and note the shapes of its stages."""
    shapes: dict[str, StageShape] = {}

    def note(path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs = [t for t in (*args, *tensors((args, kwargs))) if isinstance(t, Tensor) and t.dim() >= 3]
        outputs = [t for t in tensors(output) if t.dim() >= 3]
        if inputs:
            x = inputs[0]
            shapes[path] = StageShape(x.shape[1], tuple(x.shape[2:]), outputs[0].shape[1] if outputs else 0)

    hooks = [tail.get_submodule(path).register_forward_hook(partial(note, path), with_kwargs=True) for path in paths]
    try:
        tail(*values)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def first_stage(tail: nn.Module, cut: Cut, paths: Sequence[str]) -> str | None:
    """Find the stage that takes the feature directly, resized at most.

    ``None`` if a layer with weights, a sum with another value or a second reader of the feature comes before
    it, since each of them needs the feature at the branch's width.
    """
    value = cut.feature
    while True:
        readers = [n for n in cut.rest if value in n.all_input_nodes and not n.meta.get("size")]
        if len(readers) != 1 or readers[0].op == "output":
            return None
        node = readers[0]
        if node.op == "call_module" and str(node.target) in paths:
            return str(node.target)
        if any(n is not value and not n.meta.get("size") for n in node.all_input_nodes):
            return None
        if node.op == "call_module":
            module = tail.get_submodule(str(node.target))
            if [*module.parameters(), *module.buffers()]:
                return None
        value = node


@torch.no_grad()
def inherit_stage(
    built: nn.Module,
    full: nn.Module,
    kept: Callable[[str, int], Tensor | None],
    in_channels: int,
    guide_channels: int,
    is_first: bool,
) -> None:
    """Copy the backbone's channels into a built stage, wherever names and dimensions match.

    A dimension matches if it has as many channels as the backbone's stage or as its narrowed copy. Others, such
    as a shortcut that the backbone does not have, keep the constructor's weights; those of the guide are small.

    Args:
        built: The stage to fill.
        full: The backbone's stage.
        kept: For a parameter's name and axis the channels that the narrowed copy keeps; ``None`` for all.
        in_channels: Channels that the built stage takes, including the guide's, which are the last ones.
        guide_channels: Channels of the guide among them.
        is_first: Whether it takes the whole feature.
    """
    source = dict(full.named_parameters()) | dict(full.named_buffers())
    for name, tensor in [*built.named_parameters(), *built.named_buffers()]:
        old = source.get(name)
        if old is None or old.dim() != tensor.dim():
            continue
        part, target = old.detach(), tensor.detach()
        for axis in range(old.dim()):
            sizes = [tensor.shape[axis]]
            if guide_channels > 0 and tensor.shape[axis] == in_channels:
                sizes.insert(0, tensor.shape[axis] - guide_channels)
            narrow, every = kept(name, axis), torch.arange(old.shape[axis])
            choices = [every] if narrow is None else [every, narrow] if is_first else [narrow, every]
            match = next((c for size in sizes for c in choices if len(c) == size), None)
            if match is None:
                break
            part = part.index_select(axis, match.to(part.device))
            if axis == 1 and len(match) < tensor.shape[axis]:
                tensor.detach().narrow(axis, len(match), tensor.shape[axis] - len(match)).mul_(0.1)
            target = target.narrow(axis, 0, len(match))
        else:
            target.copy_(part)


@torch.no_grad()
def settle_norms(stage: nn.Module, rounds: int = 30) -> None:
    """Iterate spectral norms to the singular vectors of a stage's weights, which eval mode keeps fixed."""
    for module in stage.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                for _ in range(rounds):
                    setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=True))
        if parametrize.is_parametrized(module):
            parametrizations: Any = module.parametrizations
            modes = [(part, part.training) for part in parametrizations.modules()]
            parametrizations.train()
            for name in parametrizations:
                for _ in range(rounds):
                    getattr(module, name)
            for part, mode in modes:
                part.training = mode
