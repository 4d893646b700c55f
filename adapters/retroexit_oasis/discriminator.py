"""The discriminator of OASIS: a segmentation network with one class more than there are labels.

Written from the paper and laid out under the parameter names of the official checkpoints (``*_D.pth``).
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm  # the old form, whose names are in the checkpoints

from retroexit_oasis.datasets import dataset

__all__ = ["DiscriminatorBlock", "OASISDiscriminator"]

DOWN = (2, 2, 4, 4, 8, 8)
"""Channels after each of the six blocks of the encoder, as multiples of the base width."""
UP = (8, 4, 4, 2, 2, 1)
"""Channels after each of the six blocks of the decoder, as multiples of the base width."""


class OASISDiscriminator(nn.Module):
    """Classify every pixel as one of the labels, or as fake.

    A U-Net: six blocks ``body_down.0`` .. ``body_down.5`` halve the map, six blocks ``body_up.0`` ..
    ``body_up.5`` double it again; from the second on they also take the encoder's map of the same size.

    Args:
        num_labels: Channels of the label map.
        channels: Base width; the blocks have 8 to 1 times as many channels.

    Reference: Schönfeld et al., section 3.1.
    """

    def __init__(self, num_labels: int = 35, channels: int = 64) -> None:
        super().__init__()
        self.num_labels = num_labels
        down = (3, *(multiple * channels for multiple in DOWN))
        up = tuple(multiple * channels for multiple in UP)
        self.body_down = nn.ModuleList(
            DiscriminatorBlock(c_in, c_out, "down" if i else "first")
            for i, (c_in, c_out) in enumerate(itertools.pairwise(down))
        )
        skips = (0, *down[-2:0:-1])
        befores = (down[-1], *up)
        self.body_up = nn.ModuleList(
            DiscriminatorBlock(before + skip, c_out, "up")
            for before, skip, c_out in zip(befores, skips, up, strict=False)
        )
        self.layer_up_last = nn.Conv2d(up[-1], num_labels + 1, 1)

    @classmethod
    def for_dataset(cls, name: str) -> OASISDiscriminator:
        """Make the discriminator of a data set.

        Args:
            name: ``"cityscapes"``, ``"ade20k"`` or ``"coco-stuff"``.

        Raises:
            ValueError: If there are no settings of this name.
        """
        return cls(dataset(name).num_labels)

    def forward(self, image: Tensor) -> Tensor:
        """Score every pixel of images.

        Args:
            image: Shape ``(N, 3, H, W)``, range ``[-1, 1]``; both sides multiples of 64.

        Returns:
            Logits ``(N, 1 + num_labels, H, W)``: of "fake" first, then of every label.

        Raises:
            ValueError: If a side cannot be halved six times.
        """
        unit = 2 ** len(self.body_down)
        if image.shape[-2] % unit or image.shape[-1] % unit:
            raise ValueError(f"image must be a multiple of {unit} high and wide, got {tuple(image.shape)}")
        skips = []
        x = image
        for block in self.body_down:
            x = block(x)
            skips.append(x)
        skips.pop()
        for i, block in enumerate(self.body_up):
            x = block(torch.cat([skips.pop(), x], 1) if i else x)
        logits: Tensor = self.layer_up_last(x)
        return logits


class DiscriminatorBlock(nn.Module):
    """Residual block with two 3x3 convolutions that halves or doubles the map.

    Args:
        c_in: Channels of the input.
        c_out: Channels of the output; where they differ from ``c_in``, the shortcut is a 1x1 convolution.
        kind: ``"first"`` takes the image and halves it, ``"down"`` halves, ``"up"`` doubles.
    """

    def __init__(self, c_in: int, c_out: int, kind: Literal["first", "down", "up"]) -> None:
        super().__init__()
        self.kind = kind
        conv_1 = spectral_norm(nn.Conv2d(c_in, c_out, 3, padding=1))
        before: dict[str, list[nn.Module]] = {
            "first": [],
            "down": [nn.LeakyReLU(0.2)],
            "up": [nn.LeakyReLU(0.2), nn.Upsample(scale_factor=2)],
        }
        self.conv1 = nn.Sequential(*before[kind], conv_1)
        self.conv2 = nn.Sequential(nn.LeakyReLU(0.2), spectral_norm(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.conv_s = spectral_norm(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on a map ``(N, c_in, H, W)``."""
        dx = self.conv2(self.conv1(x))
        if self.kind == "up":
            return self._shortcut(nn.functional.interpolate(x, scale_factor=2)) + dx
        halve = nn.functional.avg_pool2d
        # The first block halves before its shortcut's convolution, the others behind it.
        x = self._shortcut(halve(x, 2)) if self.kind == "first" else halve(self._shortcut(x), 2)
        return x + halve(dx, 2)

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.conv_s is None else self.conv_s(x)
