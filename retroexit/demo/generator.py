"""The small street-scene generator that ships with the package, so that a demo needs no download.

It has the layout of OASIS (paper, section 4.1): six SPADE residual blocks that see the label map. To stay small, the
noise is one style vector and fixed texture planes, the second convolution of a modulation is 1x1, and the shortcut is
not modulated.
"""

import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from retroexit.core.files import reading
from retroexit.demo.scenes import CLASSES, PLANES, SCENE_SIZE, STYLE, TEST_SEEDS, draw_scene, texture_planes
from retroexit.errors import InputMismatchError, OptionError

CHANNELS = (192, 128, 96, 64, 48, 32)
UPSAMPLE_AFTER = (1, 3, 5)
HIDDEN = 32
CHECKPOINT = "scene_generator"


class Modulation(nn.Module):
    """SPADE: normalise, then scale and shift every position by maps computed from the condition."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.shared = nn.Conv2d(condition, HIDDEN, 3, padding=1)
        self.gamma = nn.Conv2d(HIDDEN, channels, 1)
        self.beta = nn.Conv2d(HIDDEN, channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Modulate ``x (N, C, H, W)`` by ``condition (N, K, H, W)``."""
        hidden = F.relu(self.shared(condition))
        return self.norm(x) * (1 + self.gamma(hidden)) + self.beta(hidden)


class SceneBlock(nn.Module):
    """SPADE residual block, with a learned shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, condition: int) -> None:
        super().__init__()
        middle = min(in_channels, out_channels)
        self.norm_0 = Modulation(in_channels, condition)
        self.conv_0 = nn.Conv2d(in_channels, middle, 3, padding=1)
        self.norm_1 = Modulation(middle, condition)
        self.conv_1 = nn.Conv2d(middle, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map ``x (N, in_channels, H, W)`` to ``(N, out_channels, H, W)``, the condition shrunk to match."""
        if condition.shape[-2:] != x.shape[-2:]:
            condition = F.adaptive_avg_pool2d(condition, (x.shape[-2], x.shape[-1]))
        y = self.conv_0(F.leaky_relu(self.norm_0(x, condition), 0.2))
        y = self.conv_1(F.leaky_relu(self.norm_1(y, condition), 0.2))
        return self.shortcut(x) + y


class SceneGenerator(nn.Module):
    """Street scenes from label maps: the stages in `body` work at 8x16, 16x32, 16x32, 32x64, 32x64, 64x128 pixels.

    ``channels`` are the output widths of the blocks.
    """

    planes: Tensor

    def __init__(self, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        condition = len(CLASSES) + len(STYLE) + len(PLANES)
        self.start = (SCENE_SIZE[0] >> len(UPSAMPLE_AFTER), SCENE_SIZE[1] >> len(UPSAMPLE_AFTER))
        self.register_buffer("planes", torch.from_numpy(texture_planes().copy())[None], persistent=False)
        self.fc = nn.Conv2d(condition, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.body = nn.ModuleList(SceneBlock(a, b, condition) for a, b in itertools.pairwise(widths))
        self.up = nn.Upsample(scale_factor=2)
        self.conv_img = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, labels: Tensor, z: Tensor) -> Tensor:
        """Generate RGB pictures ``(N, 3, 64, 128)`` in ``[-1, 1]``.

        Args:
            labels: One-hot label map, float ``(N, len(CLASSES), 64, 128)``.
            z: Style, float ``(N, len(STYLE))``, made for ``[-1, 1]``.
        """
        if labels.shape[1:] != (len(CLASSES), *SCENE_SIZE) or z.shape != (labels.shape[0], len(STYLE)):
            raise InputMismatchError(
                f"labels must be (N, {len(CLASSES)}, {SCENE_SIZE[0]}, {SCENE_SIZE[1]}) and z (N, {len(STYLE)}), got "
                f"{tuple(labels.shape)} and {tuple(z.shape)}. Make both with scene_inputs()."
            )
        count = labels.shape[0]
        style = z[:, :, None, None].expand(-1, -1, *SCENE_SIZE)
        condition = torch.cat([labels, style, self.planes.expand(count, -1, -1, -1)], dim=1)
        x = self.fc(F.adaptive_avg_pool2d(condition, self.start))
        for number, block in enumerate(self.body, start=1):
            x = block(x, condition)
            if number in UPSAMPLE_AFTER:
                x = self.up(x)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


def load_scene_generator() -> SceneGenerator:
    """Load the trained generator of the package, in eval mode, on the CPU; `CheckpointError` if its file is damaged."""
    path, generator = Path(__file__).with_name(f"{CHECKPOINT}.safetensors"), SceneGenerator()
    with reading(path, "Reinstall retroexit."):
        generator.load_state_dict(load_file(path))  # stored in half precision; loading converts it to float32
    return generator.eval()


def scene_inputs(count: int, seed: int = 0, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Draw held-out scenes as inputs: one-hot labels ``(len(CLASSES), 64, 128)`` and style ``(len(STYLE),)``.

    Sample ``i`` has scene seed ``TEST_SEEDS[1000 * seed + first + i]``, which no training has seen.
    """
    start = 1000 * seed + first
    if min(count, seed, first) < 0 or start + count > len(TEST_SEEDS):
        raise OptionError(
            "count, seed and first must be >= 0 and 1000 * seed + first + count at most "
            f"{len(TEST_SEEDS)}, got count={count}, seed={seed}, first={first}"
        )
    inputs = []
    for scene in map(draw_scene, TEST_SEEDS[start : start + count]):
        labels = F.one_hot(torch.from_numpy(scene.labels).long(), len(CLASSES)).permute(2, 0, 1)
        inputs.append((labels.float().contiguous(), torch.from_numpy(scene.z)))
    return inputs
