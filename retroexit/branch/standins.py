"""Stand-ins for modules that do not run on symbolic sizes.

A scripted module, a kernel of somebody's own, a forward that leaves PyTorch for NumPy: such a module keeps its
widths. In the symbolic run a stand-in takes its place, which fixes the sizes of what goes in and gives fakes of
what came out in a real run.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from retroexit.branch.sizes import SizeEnv
from retroexit.decoder.lines import is_user_code, show
from retroexit.decoder.replayed_tail import ReplayTail
from retroexit.decoder.structure import rebuild, tensors

__all__ = ["blame", "replace_by_standins"]


class _StandIn(nn.Module):
    def __init__(self, outputs: list[Any], reason: str, mode: FakeTensorMode, env: SizeEnv) -> None:
        super().__init__()
        self.outputs, self.reason, self.mode, self.env = iter(outputs), reason, mode, env

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for tensor in tensors((args, kwargs)):
            for size in tensor.shape:
                self.env.pin(size, self.reason)
        return rebuild(
            next(self.outputs), lambda leaf: self.mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf
        )


def replace_by_standins(
    tail: nn.Module,
    copy: nn.Module,
    values: Sequence[Tensor],
    reasons: dict[str, str],
    mode: FakeTensorMode,
    env: SizeEnv,
) -> None:
    """Put stand-ins into a copy of a tail.

    Args:
        tail: The tail itself, run once to see what the modules return.
        copy: Its copy, changed in place.
        values: Feature and live values.
        reasons: Path of every module that is replaced, and why.
        mode: Makes the fakes.
        env: Where sizes are fixed.
    """
    if not reasons:
        return
    seen: dict[str, list[Any]] = {path: [] for path in reasons}

    def note(path: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            seen[path].append(rebuild(output, lambda x: x.detach().clone() if isinstance(x, Tensor) else x))

        return hook

    hooks = [tail.get_submodule(path).register_forward_hook(note(path)) for path in reasons]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            run = tail.along_every_path if isinstance(tail, ReplayTail) else tail
            run(*(value.clone() for value in values))
    finally:
        for hook in hooks:
            hook.remove()
    for path, reason in reasons.items():
        module, standin = copy.get_submodule(path), _StandIn(seen[path], reason, mode, env)
        for parent in list(copy.modules()):
            for name, child in list(parent._modules.items()):
                if child is module:
                    parent._modules[name] = standin


def blame(error: Exception, paths: dict[int, str], frozen: dict[str, str]) -> tuple[str | None, str]:
    """Find the module in which an error arose.

    Args:
        error: The error.
        paths: Path of every module of the tail, by identity.
        frozen: Modules that have been found before; they are not at fault again.

    Returns:
        Path of the innermost module, ``None`` where it is none in particular; and the line and the error.
    """
    text = (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no text'}"
    )
    path, line = None, ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        found = paths.get(id(module)) if isinstance(module, nn.Module) else None
        path = found if found is not None and found not in frozen else path
        if is_user_code(frame.f_code.co_filename):
            line = show((frame.f_code.co_filename, number))
    return (
        path,
        f"{line or 'code that is not Python'}, which does not run on symbolic sizes ({text})",
    )
