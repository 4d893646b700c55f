"""The generator of OASIS (Schönfeld et al., "You Only Need Adversarial Supervision", ICLR 2021).

Written from the paper and laid out under the parameter names of the official checkpoints, so that their EMA
state dicts load with ``load_state_dict``. Width and depth are the ones the official code trains with.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm  # the old form, whose names are in the checkpoints

from retroexit_oasis.datasets import dataset

__all__ = ["OASISGenerator", "SPADEBlock", "SPADENorm"]

WIDTHS = (16, 16, 16, 8, 4, 2, 1)
"""Channels before and after each of the six blocks, as multiples of the base width."""


class OASISGenerator(nn.Module):
    """Turn a label map, and noise, into an image through six SPADE blocks ``body.0`` .. ``body.5``.

    The noise is joined to the label map and seen by every block: 3-D, in the paper's words. The official code
    draws one vector per image and repeats it at every place; here it may vary from place to place.

    Args:
        num_labels: Channels of the label map; 35 for Cityscapes (34 classes and "unknown").
        z_dim: Width of the noise vector.
        channels: Base width; the blocks have 16 to 1 times as many channels.
        crop: Height and width of the image, both multiples of 32.
        spade_hidden: Hidden channels of every SPADE normalisation.
        use_noise3d: Whether there is noise at all.

    Raises:
        ValueError: If ``crop`` cannot be halved five times.
    """

    def __init__(
        self,
        num_labels: int = 35,
        z_dim: int = 64,
        channels: int = 64,
        crop: tuple[int, int] = (256, 512),
        spade_hidden: int = 128,
        use_noise3d: bool = True,
    ) -> None:
        super().__init__()
        halvings = len(WIDTHS) - 2
        if any(side <= 0 or side % 2**halvings for side in crop):
            raise ValueError(f"crop must be (height, width) in multiples of {2**halvings}, got {crop}")
        self.num_labels = num_labels
        self.z_dim = z_dim if use_noise3d else 0
        self.crop = crop
        self.start = (crop[0] >> halvings, crop[1] >> halvings)
        widths = [multiple * channels for multiple in WIDTHS]
        condition = self.num_labels + self.z_dim
        self.conv_img = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2)
        self.body = nn.ModuleList(
            SPADEBlock(c_in, c_out, condition, spade_hidden) for c_in, c_out in itertools.pairwise(widths)
        )
        self.fc = nn.Conv2d(condition, widths[0], 3, padding=1)

    @classmethod
    def for_dataset(cls, name: str, use_noise3d: bool = True) -> OASISGenerator:
        """Make the generator that the official checkpoint of a data set fits.

        Args:
            name: ``"cityscapes"``, ``"ade20k"`` or ``"coco-stuff"``.
            use_noise3d: Whether there is noise at all, as in the published checkpoints.

        Raises:
            ValueError: If there are no settings of this name.
        """
        settings = dataset(name)
        return cls(settings.num_labels, crop=settings.crop, use_noise3d=use_noise3d)

    def forward(self, label: Tensor, z: Tensor | None = None) -> Tensor:
        """Draw an image.

        Args:
            label: One-hot label map, shape ``(N, num_labels, H, W)``.
            z: Noise, shape ``(N, z_dim)`` or ``(N, z_dim, H, W)``. Drawn from the standard normal
                distribution, once and one vector per image, when ``None``: the official generator always does
                that.

        Returns:
            Image of size ``crop``, shape ``(N, 3, H, W)``, range ``[-1, 1]``.

        Raises:
            ValueError: If ``label`` or ``z`` has another number of channels, or ``z`` is passed to a generator
                without noise.
        """
        if label.shape[1] != self.num_labels:
            raise ValueError(f"label map has {label.shape[1]} channels, the generator {self.num_labels} labels")
        seg = self._with_noise(label, z)  # (N, z_dim + num_labels, H, W)
        x = self.fc(F.interpolate(seg, size=self.start))
        for i, block in enumerate(self.body):
            if i:
                x = self.up(x)
            x = block(x, seg)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))

    def _with_noise(self, label: Tensor, z: Tensor | None) -> Tensor:
        n, _, height, width = label.shape
        if not self.z_dim:
            if z is not None:
                raise ValueError("z must be None for a generator made with use_noise3d=False. Leave it out.")
            return label
        if z is None:
            z = torch.randn(n, self.z_dim, dtype=torch.float32, device=label.device)
        elif z.shape not in ((n, self.z_dim), (n, self.z_dim, height, width)):
            raise ValueError(
                f"z must have the shape {(n, self.z_dim)} or {(n, self.z_dim, height, width)}, got {tuple(z.shape)}"
            )
        if z.dim() == 2:
            z = z.view(n, self.z_dim, 1, 1).expand(-1, -1, height, width)
        return torch.cat([z, label], 1)


class SPADEBlock(nn.Module):
    """Residual block with two convolutions, each behind a SPADE normalisation.

    Args:
        c_in: Channels of the input.
        c_out: Channels of the output; where they differ from ``c_in``, the shortcut is learned.
        condition: Channels of the label map with its noise.
        hidden: Hidden channels of the normalisations.
    """

    def __init__(self, c_in: int, c_out: int, condition: int, hidden: int) -> None:
        super().__init__()
        middle = min(c_in, c_out)
        self.learned_shortcut = c_in != c_out
        self.conv_0 = spectral_norm(nn.Conv2d(c_in, middle, 3, padding=1))
        self.conv_1 = spectral_norm(nn.Conv2d(middle, c_out, 3, padding=1))
        if self.learned_shortcut:
            self.conv_s = spectral_norm(nn.Conv2d(c_in, c_out, 1, bias=False))
        self.norm_0 = SPADENorm(c_in, condition, hidden)
        self.norm_1 = SPADENorm(middle, condition, hidden)
        if self.learned_shortcut:
            self.norm_s = SPADENorm(c_in, condition, hidden)

    def forward(self, x: Tensor, seg: Tensor) -> Tensor:
        """Run the block on a feature map ``(N, c_in, h, w)``, conditioned on ``(N, condition, H, W)``."""
        shortcut = self.conv_s(self.norm_s(x, seg)) if self.learned_shortcut else x
        dx = self.conv_0(F.leaky_relu(self.norm_0(x, seg), 0.2))
        dx = self.conv_1(F.leaky_relu(self.norm_1(dx, seg), 0.2))
        return shortcut + dx


class SPADENorm(nn.Module):
    """Batch normalisation whose scale and shift are painted by the label map (Park et al., CVPR 2019).

    Args:
        channels: Channels of the feature map.
        condition: Channels of the label map with its noise.
        hidden: Channels between the two convolutions.
    """

    def __init__(self, channels: int, condition: int, hidden: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(channels, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(condition, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor, seg: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(N, channels, h, w)``; ``seg`` is brought to its size."""
        painted = self.mlp_shared(F.interpolate(seg, size=x.shape[2:], mode="nearest"))
        return self.first_norm(x) * (1 + self.mlp_gamma(painted)) + self.mlp_beta(painted)
