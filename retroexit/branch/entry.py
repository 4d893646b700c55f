"""Where feature and guide enter a branch (paper sections 3.3 and 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GuideEntry", "GuideShape", "Inject"]

Inject = Literal["input", "every_stage"]


@dataclass(frozen=True)
class GuideShape:
    """What a branch must know about its guide before there is one.

    Attributes:
        channels: Channels of the guide.
        size: Its spatial size for the example inputs.
        inject: ``"input"`` concatenates it to the branch's input (paper section 4.1), ``"every_stage"`` to
            the input of every branch module (section 4.2).
    """

    channels: int
    size: tuple[int, ...]
    inject: Inject = "input"


class GuideEntry(nn.Module):
    """Bring feature and guide together: resize the guide, concatenate, project to the branch's width.

    Args:
        channels: Channels of the feature.
        out_channels: Channels that the branch module takes; ``None`` where it takes all that there are.
        size: Spatial size of the feature, for the example inputs.
        guide: The guide's shape, or ``None`` for a projection of the feature alone.
        guide_channels: Channels of the resized guide.

    Reference: paper section 4.1, "concatenating it to each branch's input after due resizing performed by a
        convolution".
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None,
        size: tuple[int, ...],
        guide: GuideShape | None,
        guide_channels: int,
    ) -> None:
        super().__init__()
        convolution: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
        self.resize: nn.Module | None = None
        if guide is not None:
            stride = tuple(max(1, g // s) for g, s in zip(guide.size, size, strict=True))
            self.resize = convolution(guide.channels, guide_channels, stride, stride=stride)
        else:
            guide_channels = 0
        self.project: nn.Module | None = None
        if out_channels is not None:
            self.project = convolution(channels + guide_channels, out_channels, 1)

    def forward(self, x: Tensor, guide: Tensor | None) -> Tensor:
        """Join a feature ``(N, C, ...)`` and a guide ``(N, G, ...)`` to ``(N, out_channels, ...)``."""
        if self.resize is not None and guide is not None:
            resized = self.resize(guide)
            if resized.shape[2:] != x.shape[2:]:
                resized = functional.interpolate(resized, size=x.shape[2:], mode="nearest")
            x = torch.cat([x, resized], 1)
        out: Tensor = x if self.project is None else self.project(x)
        return out

    @torch.no_grad()
    def start(self, kept: Tensor | None) -> None:
        """Begin as a plain selection of the feature's channels; the guide's weights stay random but small."""
        if self.project is None:
            return
        weight = self.project.get_parameter("weight")
        kept = torch.arange(weight.shape[0]) if kept is None else kept
        weight.mul_(0.1)
        weight[:, : weight.shape[1] - self._guide_channels()].zero_()
        weight[torch.arange(len(kept)), kept] = 1.0
        self.project.get_parameter("bias").zero_()

    def _guide_channels(self) -> int:
        return 0 if self.resize is None else int(self.resize.out_channels)  # type: ignore[arg-type]
