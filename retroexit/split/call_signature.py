"""What a recording depends on in a call besides shapes and numbers: structure, types, plain values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retroexit.core.nested import flatten

__all__ = ["CallForm"]


@dataclass(frozen=True)
class CallForm:
    """The form of a call.

    Attributes:
        paths: Where tensors are among the arguments.
        dtypes: Their types.
        constants: Path and value of everything that is not a tensor.
    """

    paths: tuple[tuple[Any, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    constants: tuple[tuple[tuple[Any, ...], str], ...]

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> CallForm:
        """Take down the form of a call."""
        leaves = list(flatten((tuple(args), dict(kwargs))))
        given = [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
        others = [(path, repr(leaf)) for path, leaf in leaves if not isinstance(leaf, Tensor)]
        return cls(tuple(path for path, _ in given), tuple(leaf.dtype for _, leaf in given), tuple(others))

    def as_if(self, other: CallForm) -> CallForm:
        """Take over the precision of another call's floating-point tensors."""
        pairs = zip(self.dtypes, other.dtypes, strict=False)  # of unequal length only where paths differ too
        both = (b if a.is_floating_point and b.is_floating_point else a for a, b in pairs)
        return replace(self, dtypes=tuple(both))

    def difference(self, recorded: CallForm) -> str:
        """Say how this call differs from the recorded one, and what to do."""
        what = "asked for an early exit on inputs unlike the recorded ones"
        if self.paths != recorded.paths:
            return (
                f"{what}; found tensors at {list(self.paths)}, recorded {list(recorded.paths)}. "
                "Wrap again with these."
            )
        for path, new, old in zip(self.paths, self.dtypes, recorded.dtypes, strict=True):
            if new != old:
                return (
                    f"{what}; found {new} at {path}, recorded {old}. Convert the input, or "
                    "wrap again with this type."
                )
        for (path, new_value), (_, old_value) in zip(self.constants, recorded.constants, strict=False):
            if new_value != old_value:
                return (
                    f"{what}; found {path[-1]} = {new_value}, recorded {old_value}, and values that are no "
                    "tensors are "
                    "frozen. Wrap again with this value."
                )
        return f"{what}; found {self.constants}, recorded {recorded.constants}. Wrap again with these."
