"""What an independent judge sees in generated street scenes: labels (ESPNet), and their statistics as a set.

ESPNet (Mehta et al., "ESPNet: Efficient Spatial Pyramid of Dilated Convolutions for Semantic Segmentation",
ECCV 2018) was trained on the photographs of the same split. Written from the paper, laid out under the names
of its authors' checkpoint.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.image.fid import FrechetInceptionDistance

from retroexit.metrics import LPIPS

__all__ = ["ESPNet", "SqueezeFeatures", "frechet_distance", "mean_iou"]

READS_AT = (240, 480)
"""Height and width that images are enlarged to before the judge reads them."""
BGR_MEAN, BGR_STD = (110.3314, 108.4092, 105.0335), (72.1252, 72.6885, 69.9026)


class NormAct(nn.Module):
    """Batch norm and PReLU, after a convolution if ``c_in`` is set."""

    def __init__(self, channels: int, c_in: int | None = None, stride: int = 1) -> None:
        super().__init__()
        if c_in is not None:
            self.conv = nn.Conv2d(c_in, channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)``."""
        return self.act(self.bn(self.conv(x) if hasattr(self, "conv") else x))


class Conv(nn.Module):
    """A convolution alone, that keeps the size at stride 1."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)``."""
        return self.conv(x)


class Pyramid(nn.Module):
    """Reduce, convolve at five dilations, add up hierarchically, join; halves the map where asked."""

    DILATIONS = (1, 2, 4, 8, 16)

    def __init__(self, c_in: int, c_out: int, halve: bool = False, add: bool = False) -> None:
        super().__init__()
        narrow = c_out // 5
        self.add = add
        self.c1 = Conv(c_in, narrow, 3, 2) if halve else Conv(c_in, narrow, 1)
        for dilation in self.DILATIONS:
            width = c_out - 4 * narrow if dilation == 1 else narrow
            self.add_module(f"d{dilation}", Conv(narrow, width, dilation=dilation))
        self.bn: nn.Module = nn.BatchNorm2d(c_out, eps=1e-3) if halve else NormAct(c_out)
        self.act: nn.Module = nn.PReLU(c_out) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, c_in, H, W)`` to ``(N, c_out, H, W)``, or to half the size."""
        reduced = self.c1(x)
        first, *others = (self.get_submodule(f"d{dilation}")(reduced) for dilation in self.DILATIONS)
        joined = torch.cat([first, *itertools.accumulate(others)], 1)
        return self.act(self.bn(joined + x if self.add else joined))


class Encoder(nn.Module):
    """Three levels, each seeing the image at its own size beside what came before."""

    def __init__(self, classes: int, blocks: tuple[int, int]) -> None:
        super().__init__()
        self.level1 = NormAct(16, 3, 2)
        self.b1 = NormAct(16 + 3)
        self.level2_0 = Pyramid(16 + 3, 64, halve=True)
        self.level2 = nn.ModuleList(Pyramid(64, 64, add=True) for _ in range(blocks[0]))
        self.b2 = NormAct(2 * 64 + 3)
        self.level3_0 = Pyramid(2 * 64 + 3, 128, halve=True)
        self.level3 = nn.ModuleList(Pyramid(128, 128, add=True) for _ in range(blocks[1]))
        self.b3 = NormAct(2 * 128)
        self.classifier = Conv(2 * 128, classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features at 1/2 (19 channels) and 1/4 (131), and logits at 1/8 of the image."""
        half = F.avg_pool2d(x, 3, 2, 1)
        quarter = F.avg_pool2d(half, 3, 2, 1)
        one = self.b1(torch.cat([self.level1(x), half], 1))
        entry = two = self.level2_0(one)
        for block in self.level2:
            two = block(two)
        two = self.b2(torch.cat([two, entry, quarter], 1))
        entry = three = self.level3_0(two)
        for block in self.level3:
            three = block(three)
        return one, two, self.classifier(self.b3(torch.cat([entry, three], 1)))


class ESPNet(nn.Module):
    """Label photographs of streets: BGR images in, logits of the same size out."""

    def __init__(self, classes: int = 12, blocks: tuple[int, int] = (2, 8)) -> None:
        super().__init__()
        self.encoder = Encoder(classes, blocks)
        self.level3_C = Conv(2 * 64 + 3, classes, 1)
        self.br = nn.BatchNorm2d(classes, eps=1e-3)
        self.conv = NormAct(classes, 16 + 3 + classes)
        self.up_l3 = nn.Sequential(nn.ConvTranspose2d(classes, classes, 2, 2, bias=False))
        self.combine_l2_l3 = nn.Sequential(NormAct(2 * classes), Pyramid(2 * classes, classes))
        self.up_l2 = nn.Sequential(nn.ConvTranspose2d(classes, classes, 2, 2, bias=False), NormAct(classes))
        self.classifier = nn.ConvTranspose2d(classes, classes, 2, 2, bias=False)

    @classmethod
    def load(cls, weights: Path) -> ESPNet:
        """Read the authors' checkpoint, strictly."""
        judge = cls()
        judge.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        return judge.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Judge normalised BGR images ``(N, 3, H, W)``, sides in multiples of 8: logits ``(N, 12, H, W)``."""
        one, two, three = self.encoder(x)
        deep = self.up_l3(self.br(three))
        both = self.up_l2(self.combine_l2_l3(torch.cat([self.level3_C(two), deep], 1)))
        return self.classifier(self.conv(torch.cat([both, one], 1)))

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        """Label images ``(N, 3, H, W)`` in [-1, 1], enlarged to 480x240 first: numbers ``(N, 240, 480)``."""
        large = F.interpolate(images, READS_AT, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (BGR_MEAN, BGR_STD))
        return self((127.5 * (large.flip(1) + 1) - mean) / std / 255).argmax(1)


class SqueezeFeatures(nn.Module):
    """The last map of LPIPS's SqueezeNet, of length 1 at each place as in LPIPS, averaged: ``(N, 512)``."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.metric = LPIPS("squeeze", weights)
        self.num_features = 512

    def forward(self, images: Tensor) -> Tensor:
        """Describe images ``(N, 3, H, W)`` in [-1, 1]."""
        return F.normalize(self.metric.features(images)[-1], dim=1).mean((2, 3))


def mean_iou(judge: ESPNet, images: Tensor, labels: Tensor) -> float:
    """Compare the labels that the judge recognises with the input maps.

    Args:
        judge: Reads the images.
        images: Shape ``(S, 3, H, W)``, range ``[-1, 1]``.
        labels: What they should show, ``(S, h, w)``: 0 for unknown, which does not count, then the classes.

    Returns:
        Intersection over union of all pixels of a class, averaged over the eleven classes.
    """
    score = MulticlassJaccardIndex(12, average="none", ignore_index=11)
    for image, label in zip(images.split(8), labels.split(8), strict=True):
        numbers = (label.long() - 1) % 12  # the judge's order: unknown last
        large = F.interpolate(numbers[:, None].float(), READS_AT, mode="nearest-exact")[:, 0].long()
        score.update(judge.labels(image), large)
    return float(score.compute()[:11].mean())


def frechet_distance(features: SqueezeFeatures, images: Tensor, reference: Tensor) -> float:
    """Frechet distance between two sets of images, on SqueezeNet features instead of Inception's.

    Not comparable with published FIDs; and of a few hundred images, larger than of many.
    """
    distance = FrechetInceptionDistance(feature=features, normalize=False, input_img_size=(3, *images.shape[2:]))
    for batch in reference.split(32):
        distance.update(batch, real=True)
    for batch in images.split(32):
        distance.update(batch, real=False)
    return float(distance.compute())
