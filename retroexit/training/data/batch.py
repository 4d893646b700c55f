"""What the losses of one training step are computed from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["TrainingBatch"]


@dataclass(frozen=True)
class TrainingBatch:
    """Some samples in one training step of one branch.

    Attributes:
        image: The branch's images ``(N, C, H, W)``, in [-1, 1]; carries the gradient.
        target: The backbone's images, same shape and range.
        args: The generator's positional inputs for these samples, cut to the same windows where they are
            maps.
        kwargs: Its keyword inputs, likewise.
    """

    image: Tensor
    target: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
