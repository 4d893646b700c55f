"""Hold the layers of a branch to the backbone's, beside its images.

A branch that inherits channels knows for every layer which channels of the backbone its output stands for.
Beyond the paper, which compares images alone: the distance of those outputs, each in units of what the
backbone's vary by, can be a term of the loss (`FitSettings.features`). It costs a pass of the backbone's rest
per training step, and nothing once the branch is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.branch.branch import Branch
from retroexit.model import EarlyExitGenerator
from retroexit.tracing.record import unobserved

__all__ = ["FeatureDistance"]


class FeatureDistance:
    """Compares the layers of a branch with the backbone's.

    Args:
        model: The wrapped generator; it is not changed.
        index: Which branch, from 0.
        weight: Weight in the loss.

    Attributes:
        paths: The layers that are compared; none for a branch that inherits nothing.
    """

    def __init__(self, model: EarlyExitGenerator, index: int, weight: float) -> None:
        branch = model.branches[index]
        assert isinstance(branch, Branch)
        self.model, self.branch, self.weight = model, branch, weight
        self.full = model.split.tail(index, share=True)
        thin = dict(branch.tail.named_modules())
        self.paths = [path for path in branch.kept if path in thin]
        self._wanted: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self, values: Sequence[Tensor]) -> None:
        """Run the backbone's rest on what the branch is about to read."""
        self._wanted.clear()
        with _noting(self.full, self.paths, self._wanted), unobserved(self.model.generator):
            self.full(*values)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Take note of what the branch's layers give."""
        self._found.clear()
        with _noting(self.branch.tail, self.paths, self._found):
            yield

    def __call__(self) -> Tensor:
        """Give the mean squared distance of the layers, in units of the backbone's variance, weighed."""
        terms = []
        for path, found in self._found.items():
            kept, wanted = self.branch.kept[path], self._wanted.get(path)
            if wanted is None:
                continue
            axis = -1 if isinstance(self.full.get_submodule(path), nn.Linear) else 1
            wanted = wanted if kept is None else wanted.index_select(axis, kept.to(wanted.device))
            if wanted.shape == found.shape:
                terms.append((found - wanted).square().mean() / (wanted.var() + 1e-12))
        self._found.clear()
        return self.weight * torch.stack(terms).mean() if terms else torch.zeros(())


@contextmanager
def _noting(root: nn.Module, paths: Sequence[str], into: dict[str, Tensor]) -> Iterator[None]:
    def note(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def seen(_module: nn.Module, _args: Any, output: Any) -> None:
            # What a layer gives may be written into afterwards.
            if isinstance(output, Tensor):
                into[path] = output.float() if output.dtype != torch.float32 else output.clone()

        return seen

    hooks = [root.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
