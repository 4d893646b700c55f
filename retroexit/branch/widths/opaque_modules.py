"""Stand-ins for modules that do not run on symbolic sizes.

A scripted module, a kernel of somebody's own, a forward that leaves PyTorch for NumPy: such a module keeps
its widths. In the symbolic run a stand-in takes its place, which fixes the sizes of what goes in and gives
fakes of what came out in a real run.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.branch.widths.shape_env import SizeEnv
from retroexit.core.modules import clone_module
from retroexit.core.nested import rebuild, tensors
from retroexit.split.replay.tail import ReplayTail
from retroexit.tracing.source_lines import is_user_code, show

__all__ = ["Fault", "blame", "exchange", "replace_by_standins"]


Fake = Callable[[Tensor], Tensor]


class _StandIn(nn.Module):
    def __init__(self, outputs: list[Any], reason: str, fake: Fake, env: SizeEnv) -> None:
        super().__init__()
        self.outputs, self.reason, self.fake, self.env = iter(outputs), reason, fake, env

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for tensor in tensors((args, kwargs)):
            for size in tensor.shape:
                self.env.pin(size, self.reason)
        return rebuild(next(self.outputs), lambda leaf: self.fake(leaf) if isinstance(leaf, Tensor) else leaf)


class _Witness(nn.Module):
    """Keeps what a module returns; it holds the module out of sight, to be found under its own name only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.call = (module,)
        self.outputs: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.call[0](*args, **kwargs)
        self.outputs.append(rebuild(output, lambda x: x.detach().clone() if isinstance(x, Tensor) else x))
        return output


def replace_by_standins(
    tail: nn.Module,
    copy: nn.Module,
    values: Sequence[Tensor],
    reasons: dict[str, str],
    fake: Fake,
    env: SizeEnv,
) -> None:
    """Put stand-ins into a copy of a tail.

    Args:
        tail: The tail itself, run once to see what the modules return.
        copy: Its copy, changed in place.
        values: Feature and live values.
        reasons: Path of every module that is replaced, and why.
        fake: Makes a fake of a tensor.
        env: Where sizes are fixed.
    """
    if not reasons:
        return
    seen = {path: _Witness(tail.get_submodule(path)) for path in reasons}
    watched = clone_module(tail, share=True)
    for path, witness in seen.items():
        exchange(watched, path, witness)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        run = watched.along_every_path if isinstance(watched, ReplayTail) else watched
        run(*(value.clone() for value in values))
    for path, reason in reasons.items():
        exchange(copy, path, _StandIn(seen[path].outputs, reason, fake, env))


def exchange(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put another module in place of one, wherever it occurs."""
    old = root.get_submodule(path)
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


@dataclass(frozen=True)
class Fault:
    """Where an error arose.

    Attributes:
        path: Path of the innermost module, ``None`` where it is none in particular.
        namespace: Global names of the innermost file that is the user's.
        reason: The line and the error.
    """

    path: str | None
    namespace: dict[str, Any] | None
    reason: str


def blame(error: Exception, paths: dict[int, str], frozen: dict[str, str]) -> Fault:
    """Find out where an error arose.

    Args:
        error: The error.
        paths: Path of every module of the tail, by identity.
        frozen: Modules that have been found before; they are not at fault again.
    """
    said = str(error).strip().splitlines() or ["no text"]
    path, namespace, line = None, None, "code that is not Python"
    for frame, number in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        found = paths.get(id(module)) if isinstance(module, nn.Module) else None
        path = found if found is not None and found not in frozen else path
        if is_user_code(frame.f_code.co_filename):
            namespace, line = frame.f_globals, show((frame.f_code.co_filename, number))
    reason = f"{line}, which does not run on other sizes ({type(error).__name__}: {said[0]})"
    return Fault(path, namespace, reason)
