"""The small street-scene generator that ships with the package, so that a demo needs no download.

It has the layout of OASIS (paper, section 4.1): six SPADE residual blocks that see the label map. To stay
small, the noise is one style vector and fixed texture planes, the second convolution of a modulation is 1x1,
and the shortcut is not modulated.
"""

import hashlib
import itertools
import json
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from retroexit.demo.scenes import CLASSES, PLANES, SCENE_SIZE, STYLE, TEST_SEEDS, draw_scene, texture_planes
from retroexit.errors import CheckpointError, InputMismatchError, OptionError, WeightsError, cause_of

CHANNELS = (192, 128, 96, 64, 48, 32)
UPSAMPLE_AFTER = (1, 3, 5)
HIDDEN = 32
CHECKPOINT = "scene_generator"


class Modulation(nn.Module):
    """SPADE: normalise, then scale and shift every position by maps computed from the condition."""

    def __init__(self, channels: int, condition: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.shared = nn.Conv2d(condition, hidden, 3, padding=1)
        self.gamma = nn.Conv2d(hidden, channels, 1)
        self.beta = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Modulate ``x (N, C, H, W)`` by ``condition (N, K, H, W)``."""
        hidden = F.relu(self.shared(condition))
        return self.norm(x) * (1 + self.gamma(hidden)) + self.beta(hidden)


class SceneBlock(nn.Module):
    """SPADE residual block, with a learned shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, condition: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        middle = min(in_channels, out_channels)
        self.norm_0 = Modulation(in_channels, condition, hidden)
        self.conv_0 = nn.Conv2d(in_channels, middle, 3, padding=1)
        self.norm_1 = Modulation(middle, condition, hidden)
        self.conv_1 = nn.Conv2d(middle, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map ``x (N, in_channels, H, W)`` to ``(N, out_channels, H, W)``, the condition shrunk to match."""
        condition = F.adaptive_avg_pool2d(condition, (x.shape[-2], x.shape[-1]))
        y = self.conv_0(F.leaky_relu(self.norm_0(x, condition), 0.2))
        y = self.conv_1(F.leaky_relu(self.norm_1(y, condition), 0.2))
        return self.shortcut(x) + y


class SceneGenerator(nn.Module):
    """Street scenes from label maps: the stages in `body` work at 8x16, 16x32, 16x32, 32x64, 32x64, 64x128 pixels.

    ``channels`` are the output widths of the blocks, ``hidden`` is the width inside the modulations.
    """

    planes: Tensor

    def __init__(self, channels: tuple[int, ...] = CHANNELS, hidden: int = HIDDEN) -> None:
        super().__init__()
        condition = len(CLASSES) + len(STYLE) + len(PLANES)
        self.start = (SCENE_SIZE[0] >> len(UPSAMPLE_AFTER), SCENE_SIZE[1] >> len(UPSAMPLE_AFTER))
        self.register_buffer("planes", torch.from_numpy(texture_planes().copy())[None], persistent=False)
        self.fc = nn.Conv2d(condition, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.body = nn.ModuleList(SceneBlock(a, b, condition, hidden) for a, b in itertools.pairwise(widths))
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
                f"labels must be (N, {len(CLASSES)}, {SCENE_SIZE[0]}, {SCENE_SIZE[1]}) and z "
                f"(N, {len(STYLE)}), got {tuple(labels.shape)} and {tuple(z.shape)}. Make both with "
                "scene_inputs().",
                (tuple(labels.shape), tuple(z.shape)),
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


def load_scene_generator(folder: Path | None = None) -> SceneGenerator:
    """Load the trained generator of the package, or of a folder, in eval mode, on the CPU, in float32.

    Raises:
        WeightsError, CheckpointError: If a file is missing, changed, or does not fit.
    """
    source: Traversable = folder if folder is not None else resources.files("retroexit.demo")
    weights, record = source / f"{CHECKPOINT}.safetensors", source / f"{CHECKPOINT}.json"
    for file in (weights, record):
        if not file.is_file():
            raise WeightsError(f"no file {file.name} in {source}. Reinstall retroexit.", str(file))
    content = weights.read_bytes()
    try:
        expected, actual = (json.loads(record.read_text("utf-8"))["sha256"], hashlib.sha256(content).hexdigest())
    except Exception as error:
        message = f"cannot read {record}: {cause_of(error)}. Reinstall retroexit."
        raise CheckpointError(message, str(record)) from error
    if actual != expected:
        raise CheckpointError(
            f"sha256 of {weights} must be {expected[:12]}..., got {actual[:12]}.... Reinstall retroexit.", str(weights)
        )
    generator = SceneGenerator()
    try:  # stored in half precision; loading converts it to float32
        generator.load_state_dict(load(content))
    except RuntimeError as error:
        raise CheckpointError(
            f"{CHECKPOINT}.safetensors does not fit SceneGenerator: {error}. Export it again with "
            "examples/train_scene_generator.py.",
            CHECKPOINT,
        ) from error
    return generator.eval()


def scene_inputs(count: int, seed: int = 0, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Draw held-out scenes as inputs: one-hot labels ``(len(CLASSES), 64, 128)`` and style ``(len(STYLE),)``.

    Sample ``i`` has scene seed ``TEST_SEEDS[1000 * seed + first + i]``, which no training has seen; it must
    exist.
    """
    start = 1000 * seed + first
    if min(count, seed, first) < 0 or start + count > len(TEST_SEEDS):
        raise OptionError(
            "count, seed and first must be >= 0 and 1000 * seed + first + count at most "
            f"{len(TEST_SEEDS)}, got count={count}, seed={seed}, first={first}",
            (count, seed, first),
        )
    inputs = []
    for scene in map(draw_scene, TEST_SEEDS[start : start + count]):
        labels = F.one_hot(torch.from_numpy(scene.labels).long(), len(CLASSES)).permute(2, 0, 1)
        inputs.append((labels.float().contiguous(), torch.from_numpy(scene.z)))
    return inputs
