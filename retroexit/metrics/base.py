"""The class of quality metrics: losses between an exit's image and the backbone's (paper, section 3.2)."""

from __future__ import annotations

import importlib.metadata
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from retroexit.errors import OptionError


class LastTarget:
    """Remembers the features of the last target, since the images of several exits are compared with the same one."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], tuple[Any, ...], Any] | None = None

    def features(self, target: Tensor, compute: Callable[[Tensor], Any], *key: Any) -> Any:
        """Return ``compute(target)``, which depends on ``key``."""
        if target.requires_grad or target.is_inference():
            return compute(target)
        state = (target._version, torch.is_autocast_enabled(target.device.type), torch.is_grad_enabled(), *key)
        last = self._last  # another thread may replace it at any time
        if last is None or last[0]() is not target or last[1] != state:
            self._last = last = (weakref.ref(target), state, compute(target))
        return last[2]

    def __reduce__(self) -> tuple[type[LastTarget], tuple[()]]:
        return LastTarget, ()  # weak references cannot be pickled


class QualityMetric(nn.Module, ABC):
    """A loss between two batches of images; lower is better and 0 means equal.

    Subclasses set ``name``, which thresholds and files refer to, and write :meth:`compare`. Parameters are frozen, and
    the metric stays in eval mode inside any parent module.
    """

    name: str

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare two batches of images; returns the loss of each sample, ``(N,)``, differentiable in both.

        Args:
            a: Images, shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, range ``[-1, 1]``.
            b: Images of the same shape and range.

        Raises:
            OptionError: If shapes, dtypes or devices do not fit, or the images are too small for the metric.
        """
        problem, shapes = "", f"{tuple(a.shape)} and {tuple(b.shape)}"
        device = next(self.parameters(), a).device
        if a.shape != b.shape:
            problem = f"must have equal shapes, got {shapes}"
        elif a.ndim != 4 or a.shape[1] not in (1, 3):
            problem = f"must have 1 or 3 channels, (N, 3, H, W) or (N, 1, H, W), got {shapes}.{_advice(a)}"
        elif not (a.is_floating_point() and b.is_floating_point()):
            problem = f"must be floating point, got {a.dtype} and {b.dtype}"
        elif not a.device == b.device == device:
            problem = f"must be on the metric's device {device}, got {a.device} and {b.device}"
        if problem:
            raise OptionError(f"the images for {self.name} {problem}")
        if a.shape[1] == 1:
            a, b = a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)
        return self.compare(a, b)

    @abstractmethod
    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare checked images of shape ``(N, 3, H, W)``, range ``[-1, 1]``; return ``(N,)``."""

    def describe(self) -> dict[str, Any]:
        """Return what a manifest must hold for a threshold to mean the same later, as plain JSON types."""
        return {"name": self.name, "versions": versions_of("torch")}

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: dropout in the linear heads of LPIPS would make the loss random."""
        return super().train(False)


def _advice(image: Tensor) -> str:
    """Say how a module around the generator can make an image that metrics compare."""
    if image.ndim != 4:
        return ""
    if image.shape[-1] in (1, 3, 4):
        return " The channels are last: wrap a module that returns image.permute(0, 3, 1, 2)."
    part = ":3" if image.shape[1] > 3 else ":1"
    return f" Wrap a module that returns image[:, {part}]."


def versions_of(*packages: str) -> dict[str, str]:
    """Return the installed version of each package."""
    return {package: importlib.metadata.version(package) for package in packages}
