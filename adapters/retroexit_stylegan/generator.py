"""StyleGAN2 (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020).

Written from the paper and laid out under the parameter names of NVIDIA's PyTorch networks (stylegan2-ada), so
that the state dict of their ``G_ema`` loads with ``load_state_dict``. The architecture is the paper's: a skip
image through all blocks, noise in every layer. Style mixing is left to callers of ``synthesis``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retroexit_stylegan.layers import Linear, NoiseMode, SynthesisLayer, ToRGB, low_pass_filter, upsample

__all__ = ["MappingNetwork", "StyleGANGenerator", "SynthesisBlock", "SynthesisNetwork"]


class StyleGANGenerator(nn.Module):
    """Turn latent vectors into images: ``mapping`` to style vectors, then ``synthesis``.

    Args:
        z_dim: Width of the latent vector.
        c_dim: Width of the class label; 0 for none.
        w_dim: Width of the style vectors.
        resolution: Height and width of the image, a power of two from 4 up.
        channel_base: A block of resolution r has ``channel_base // r`` channels.
        channel_max: Largest number of channels of a block.
        num_mapping_layers: Layers of the mapping network.
        conv_clamp: Largest magnitude of any layer's output, ``None`` for no limit. It is 256 if it was
            trained in mixed precision.
        image_channels: Channels of the image.
        channels: Channels of every block, from 4x4 up, instead of ``channel_base`` and ``channel_max``.

    Raises:
        ValueError: If ``resolution`` is not a power of two from 4 up, or ``channels`` are more or fewer than
            the blocks.
    """

    def __init__(
        self,
        z_dim: int = 512,
        c_dim: int = 0,
        w_dim: int = 512,
        resolution: int = 256,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_mapping_layers: int = 8,
        conv_clamp: float | None = None,
        image_channels: int = 3,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if resolution < 4 or resolution & (resolution - 1):
            raise ValueError(f"resolution must be a power of two from 4 up, got {resolution}")
        sizes = [2**i for i in range(2, resolution.bit_length())]
        widths = [min(channel_base // size, channel_max) for size in sizes] if channels is None else channels
        if len(widths) != len(sizes):
            raise ValueError(f"channels must be one for each of the blocks {sizes}, got {channels}")
        self.z_dim, self.c_dim, self.w_dim, self.resolution = z_dim, c_dim, w_dim, resolution
        self.synthesis = SynthesisNetwork(w_dim, dict(zip(sizes, widths, strict=True)), conv_clamp, image_channels)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, num_mapping_layers)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: NoiseMode = "const",
        noise: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Draw an image.

        Args:
            z: Latent vectors, standard normal, shape ``(N, z_dim)``.
            c: Class labels, one-hot, shape ``(N, c_dim)``. ``None`` for a generator without classes.
            truncation_psi: 1 for full variety; towards 0, style vectors move to their mean.
            truncation_cutoff: How many style vectors are moved, the coarsest first; ``None`` for all.
            noise_mode: ``"const"`` adds the stored noise, ``"random"`` draws new noise, ``"none"`` adds none.
            noise: Noise to use instead, standard normal: one map ``(N, 1, H, W)`` for each layer, of the
                shapes ``synthesis.noise_shapes``. Being an input, it belongs to its sample at every exit.

        Returns:
            Image, shape ``(N, image_channels, resolution, resolution)``, range about ``[-1, 1]``, not
            clipped.

        Raises:
            ValueError: If ``z``, ``c`` or ``noise`` has another shape, or there is no such noise mode.
        """
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.synthesis(ws, noise_mode, noise)  # type: ignore[no-any-return]


class MappingNetwork(nn.Module):
    """Map latent vectors and class labels to style vectors.

    Args:
        z_dim: Width of the latent vector.
        c_dim: Width of the class label; 0 for none.
        w_dim: Width of the style vectors.
        num_ws: Style vectors that the synthesis network takes.
        num_layers: Linear layers, ``fc0`` and so on.
    """

    w_avg: Tensor

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, num_ws: int, num_layers: int) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.num_ws, self.num_layers = z_dim, c_dim, num_ws, num_layers
        if c_dim:
            self.embed = Linear(c_dim, w_dim)
        width = z_dim + (w_dim if c_dim else 0)
        for i in range(num_layers):
            setattr(self, f"fc{i}", Linear(width, w_dim, activate=True, lr_multiplier=0.01))
            width = w_dim
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self, z: Tensor, c: Tensor | None = None, truncation_psi: float = 1.0, truncation_cutoff: int | None = None
    ) -> Tensor:
        """Map ``z`` ``(N, z_dim)`` and ``c`` ``(N, c_dim)`` to style vectors ``(N, num_ws, w_dim)``."""
        if z.dim() != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z must have the shape (N, {self.z_dim}), got {tuple(z.shape)}")
        labels = z.new_zeros(len(z), 0) if c is None else c
        if labels.shape != (len(z), self.c_dim):
            got = "None" if c is None else tuple(c.shape)
            raise ValueError(f"c must have the shape {(len(z), self.c_dim)}, got {got}")
        x = _normalise(z)
        if self.c_dim:
            x = torch.cat([x, _normalise(self.embed(labels))], 1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        ws = x[:, None].repeat(1, self.num_ws, 1)
        if truncation_psi == 1:
            return ws
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        return torch.cat([self.w_avg.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], 1)


class SynthesisNetwork(nn.Module):
    """Paint an image from style vectors, through blocks ``b4``, ``b8``, ... up to the resolution.

    Args:
        w_dim: Width of the style vectors.
        widths: Channels of every block, by its resolution.
        clamp: Largest magnitude of any layer's output, or ``None``.
        image_channels: Channels of the image.
    """

    def __init__(self, w_dim: int, widths: dict[int, int], clamp: float | None, image_channels: int) -> None:
        super().__init__()
        self.w_dim = w_dim
        self.block_resolutions = list(widths)
        self.num_ws = 2 * len(widths)  # one for each convolution, one for the last block's colours
        channels = 0
        for size, width in widths.items():
            in_channels, channels = channels, width
            block = SynthesisBlock(in_channels, channels, w_dim, size, clamp, image_channels)
            setattr(self, f"b{size}", block)

    @property
    def noise_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of one sample's noise, ``(1, H, W)`` for each layer in turn."""
        return [(1, size, size) for size in self.block_resolutions for _ in range(1 if size == 4 else 2)]

    def forward(self, ws: Tensor, noise_mode: NoiseMode = "const", noise: Sequence[Tensor] | None = None) -> Tensor:
        """Draw an image.

        Args:
            ws: Style vectors, shape ``(N, num_ws, w_dim)``.
            noise_mode: See `StyleGANGenerator.forward`.
            noise: Likewise.

        Returns:
            Image, shape ``(N, image_channels, resolution, resolution)``.

        Raises:
            ValueError: If ``ws`` or ``noise`` has another shape, or there is no such noise mode.
        """
        if ws.dim() != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws must have the shape (N, {self.num_ws}, {self.w_dim}), got {tuple(ws.shape)}")
        if noise_mode not in ("const", "random", "none"):
            raise ValueError(f"noise_mode must be 'const', 'random' or 'none', got {noise_mode!r}")
        if noise is not None and [tuple(one.shape[1:]) for one in noise] != self.noise_shapes:
            raise ValueError(
                f"noise must be maps (N, C, H, W) of the shapes (C, H, W) = {self.noise_shapes}, got "
                f"{[tuple(one.shape[1:]) for one in noise]}"
            )
        x = image = None
        first = 0
        for size in self.block_resolutions:
            block = getattr(self, f"b{size}")
            last = first + block.num_ws - 1  # the vector for the colours is the next block's first as well
            maps = () if noise is None else noise[first:last]
            x, image = block(x, image, ws[:, first : last + 1], noise_mode, *maps)
            first = last
        assert image is not None
        return image


class SynthesisBlock(nn.Module):
    """One resolution: two convolutions (one in the first block), and a contribution to the image.

    Args:
        in_channels: Channels of the input; 0 for the first block, which starts from a learned constant.
        channels: Channels of the output.
        w_dim: Width of the style vectors.
        resolution: Height and width of the output.
        clamp: Largest magnitude of any layer's output, or ``None``.
        image_channels: Channels of the image.
    """

    resample_filter: Tensor

    def __init__(
        self, in_channels: int, channels: int, w_dim: int, resolution: int, clamp: float | None, image_channels: int
    ) -> None:
        super().__init__()
        self.is_first = in_channels == 0
        self.num_ws = 2 if self.is_first else 3
        self.register_buffer("resample_filter", low_pass_filter())
        if self.is_first:
            self.const = nn.Parameter(torch.randn(channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, channels, w_dim, resolution, up=2, clamp=clamp)
        self.conv1 = SynthesisLayer(channels, channels, w_dim, resolution, up=1, clamp=clamp)
        self.torgb = ToRGB(channels, w_dim, clamp, image_channels)

    def forward(
        self, x: Tensor | None, image: Tensor | None, ws: Tensor, noise_mode: NoiseMode, *noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            x: Feature map of half the resolution, ``(N, in_channels, h, w)``; ``None`` for the first block.
            image: Image so far, ``(N, image_channels, h, w)``; ``None`` for the first block.
            ws: Style vectors of this block's layers, ``(N, num_ws, w_dim)``.
            noise_mode: See `StyleGANGenerator.forward`.
            *noise: Likewise, for each of this block's layers.

        Returns:
            Feature map ``(N, channels, 2h, 2w)`` and image ``(N, image_channels, 2h, 2w)``.
        """
        if x is None:  # noqa: SIM108
            x = self.const.repeat(len(ws), 1, 1, 1)
        else:
            x = self.conv0(x, ws[:, 0], noise_mode, *noise[:1])
        x = self.conv1(x, ws[:, -2], noise_mode, *noise[-1:])
        colours = self.torgb(x, ws[:, -1])
        return x, colours if image is None else upsample(image, self.resample_filter) + colours


def _normalise(x: Tensor) -> Tensor:
    """Scale the vectors of a batch ``(N, D)`` to a mean square of 1."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()
