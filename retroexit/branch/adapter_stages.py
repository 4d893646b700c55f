"""Exchange narrowed stages for thin ones that an adapter builds through the stage's own constructor.

Narrowing keeps a stage's structure: an identity shortcut stays one, so the feature must first be projected to
the branch's width. A stage that is built anew can grow a shortcut: the first one takes the whole feature
instead, and every stage takes the guide as further channels (paper sections 4.1 and 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from retroexit.core.nested import tensors
from retroexit.stages.cuts import Cut

__all__ = [
    "BuildStage",
    "StageShape",
    "exchanged",
    "first_stage",
    "inherit_stage",
    "look_at_stages",
    "settle_norms",
]

BuildStage = Callable[[nn.Module, int, int], nn.Module | None]
"""From a full-width stage, input and output channels to a thin stage of its kind, or ``None``."""


@dataclass(frozen=True)
class StageShape:
    """What goes through a stage of a narrowed tail.

    Attributes:
        channels: Channels of its input map.
        size: Spatial size of its input map.
        out_channels: Channels of its output map.
    """

    channels: int
    size: tuple[int, ...]
    out_channels: int


def look_at_stages(
    tail: nn.Module, values: Sequence[Tensor], width: int, paths: Sequence[str]
) -> dict[str, StageShape]:
    """Run a narrowed tail once and note what goes into its stages and what comes out.

    Args:
        tail: The tail.
        values: Example feature at full width, and live values.
        width: Channels that the tail takes.
        paths: The stages.
    """
    inputs: dict[str, torch.Size] = {}
    found: dict[str, StageShape] = {}

    def note_input(path: str) -> Callable[[Tensor], Tensor]:
        def seen(x: Tensor) -> Tensor:
            inputs[path] = x.shape
            return x

        return seen

    def note_output(path: str) -> Callable[[nn.Module, object, object], None]:
        def seen(_module: nn.Module, _args: object, output: object) -> None:
            maps = [t for t in tensors(output) if t.dim() >= 3]
            shape = inputs.get(path)
            if shape is not None:
                channels = maps[0].shape[1] if maps else 0
                found[path] = StageShape(shape[1], tuple(shape[2:]), channels)

        return seen

    hooks = [tail.get_submodule(path).register_forward_hook(note_output(path)) for path in paths]
    try:
        with torch.no_grad():
            live = [value.clone() for value in values[1:]]
            tail(values[0][:, :width].clone(), *live, before={path: note_input(path) for path in paths})
    finally:
        for hook in hooks:
            hook.remove()
    return found


def first_stage(tail: nn.Module, cut: Cut, paths: Sequence[str]) -> str | None:
    """Find the stage that takes the feature, and that alone, with nothing that has a width in between.

    Resizing on the way is allowed; a layer with weights, a sum with something else, or a second reader of the
    feature is not, since each of them needs the feature at the branch's width.

    Returns:
        Its path, or ``None``.
    """
    value = cut.feature
    while True:
        readers = [n for n in cut.rest if value in n.all_input_nodes and not n.meta.get("size")]
        if len(readers) != 1 or readers[0].op == "output":
            return None
        node = readers[0]
        if node.op == "call_module" and str(node.target) in paths:
            return str(node.target)
        others = [n for n in node.all_input_nodes if n is not value and not n.meta.get("size")]
        if others or _has_width(tail, node):
            return None
        value = node


def _has_width(tail: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = tail.get_submodule(str(node.target))
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


@contextmanager
def exchanged(tail: nn.Module, stages: dict[str, nn.Module]) -> Iterator[None]:
    """Put other stages into a tail; if what follows raises, its own are put back."""
    own = {path: tail.get_submodule(path) for path in stages}
    try:
        for path, stage in stages.items():
            tail.set_submodule(path, stage)
        yield
    except BaseException:
        for path, stage in own.items():
            tail.set_submodule(path, stage)
        raise


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

    A dimension matches if it has as many channels as the backbone's stage (then all are taken) or as its
    narrowed copy (then the selected ones). What matches nothing, such as a shortcut that the backbone does
    not have, stays as the constructor made it; weights that read the guide are made small.

    Args:
        built: The stage to fill.
        full: The backbone's stage.
        kept: For a parameter's name and axis the channels that the narrowed copy keeps; ``None`` for all.
        in_channels: Channels that the built stage takes, those of the guide included.
        guide_channels: How many of them, the last ones, are the guide's.
        is_first: Whether it takes the whole feature.
    """
    source = dict(full.named_parameters()) | dict(full.named_buffers())
    for name, tensor in [*built.named_parameters(), *built.named_buffers()]:
        old = source.get(name)
        if old is None or old.dim() != tensor.dim():
            continue
        part, target = old.detach(), tensor.detach()
        for axis in range(old.dim()):
            reads_guide = guide_channels > 0 and tensor.shape[axis] == in_channels
            sizes = [tensor.shape[axis]]
            if reads_guide:
                sizes.insert(0, tensor.shape[axis] - guide_channels)
            where = kept(name, axis)
            every = torch.arange(old.shape[axis])
            choices = [every] if where is None else [every, where] if is_first else [where, every]
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
    """Let spectral norms in a stage find the singular vectors of its weights, which eval mode keeps fixed."""
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
