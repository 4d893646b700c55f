"""How far an exit's image is from the backbone's: LPIPS and MS-SSIM.

A quality metric is a *loss*: 0 for equal images, larger is worse. The paper states every threshold as LPIPS
to the backbone's own output (sections 3.2 and 3.4); MS-SSIM is one of its training losses (equation 4).
"""

from __future__ import annotations

import importlib.metadata
import math
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from retroexit.errors import MissingExtraError, OptionError, closest
from retroexit.metrics.weights import digest, empty_lpips, fill_lpips, hub_file

__all__ = ["LPIPS", "MSSSIM", "QualityMetric"]

# Below this many pixels on the shorter side a pooling layer of the network has no output.
_SMALLEST_SIDE = {"alex": 31, "squeeze": 17, "vgg": 16}
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest scale first
_SSIM_WINDOW = 11


class QualityMetric(nn.Module, ABC):
    """A loss between two batches of images; lower is better and 0 means equal.

    Subclasses set ``name`` and write :meth:`compare`. A metric never trains: its parameters are frozen and it
    stays in eval mode, whatever module it is put into.

    Attributes:
        name: Name under which thresholds, manifests and reports refer to the metric.
    """

    name: str

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare two batches of images, sample by sample.

        Args:
            a: Images, shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, range ``[-1, 1]``.
            b: Images of the same shape and range.

        Returns:
            Loss of each sample, shape ``(N,)``; differentiable in both arguments.

        Raises:
            OptionError: If the shapes differ, the number of channels is neither 1 nor 3, the images are not
                floating point or sit on different devices, or they are too small for the metric.
        """
        if a.shape != b.shape:
            raise OptionError(f"{self.name} needs two equal shapes, found {_shape(a)} and {_shape(b)}", a)
        if a.ndim != 4 or a.shape[1] not in (1, 3):
            raise OptionError(
                f"{self.name} needs images of shape (N, 3, H, W) or (N, 1, H, W), found {_shape(a)}", a
            )
        if not (a.is_floating_point() and b.is_floating_point()):
            raise OptionError(f"{self.name} needs floating-point images, found {a.dtype} and {b.dtype}", a)
        own = next(self.parameters(), a).device
        if not a.device == b.device == own:
            raise OptionError(
                f"the images are on {a.device} and {b.device}, {self.name} on {own}: move them to one device"
            )
        if a.shape[1] == 1:
            a, b = a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)
        return self.compare(a, b)

    @abstractmethod
    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare checked images of shape ``(N, 3, H, W)``, range ``[-1, 1]``; return ``(N,)``."""

    def describe(self) -> dict[str, Any]:
        """Return what a manifest must hold for a threshold to mean the same later, as plain JSON types."""
        return {"name": self.name, "versions": _versions("torch")}

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: the linear heads of LPIPS hold dropout, which would make the loss random."""
        return super().train(False)


class LPIPS(QualityMetric):
    """Learned perceptual distance, version 0.1 (Zhang et al. 2018; thresholds in the paper are LPIPS).

    The network comes from the ``lpips`` package, its weights from the first of: ``weights``, torch hub's
    cache folder, a download into that folder. Whatever the source, wrong or missing weights are an error.

    Args:
        net: Feature network: ``"alex"``, ``"squeeze"`` or ``"vgg"``.
        weights: File with the network's convolutions: a torchvision state dict (``features.N.*``; the linear
            heads then come from the ``lpips`` package), or a dict with such a ``"backbone"`` and the heads as
            ``"lin"`` (``linK.model.1.weight``).

    Raises:
        OptionError: If ``net`` is unknown.
        WeightsError: If the weights are nowhere to be found, or are damaged or another network's.
        MissingExtraError: If the ``lpips`` package is not installed.
    """

    def __init__(self, net: str = "alex", weights: str | Path | None = None) -> None:
        super().__init__()
        if net not in _SMALLEST_SIDE:
            raise OptionError(f"no LPIPS network {net!r}; there is {closest(net, _SMALLEST_SIDE)}", net)
        self.net = net
        self.name = f"lpips-{net}"
        self._network = empty_lpips(net)
        path = hub_file(net) if weights is None else Path(weights)
        fill_lpips(self._network, net, path)
        self.requires_grad_(False)
        self.eval()
        self._file, self.source = path.name, str(path)
        self._last: tuple[weakref.ref[Tensor], tuple[Any, ...], Any] | None = None
        self._sha256 = digest(self._network)

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare checked images of shape ``(N, 3, H, W)``, range ``[-1, 1]``; return ``(N,)``."""
        # (N, 1, h, w) -> (N,); added in the network's order, deeper layers last
        return sum(
            (m.mean(dim=(1, 2, 3)) for m in self.maps(a, b)), a.new_zeros(a.shape[0], dtype=self._dtype)
        )

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def maps(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """Compare images place by place: one map ``(N, 1, h, w)`` per layer, coarser and coarser.

        The loss is the sum of their means. Images are as in :meth:`compare`.
        """
        smallest = _SMALLEST_SIDE[self.net]
        if min(a.shape[-2:]) < smallest:
            raise OptionError(
                f"{self.name} needs images of at least {smallest}x{smallest} pixels, found "
                f"{a.shape[-2]}x{a.shape[-1]}; enlarge them or use another metric",
                a,
            )
        features = [self.features(a.to(self._dtype)), self._target_features(b, self._dtype)]
        pairs = zip(self._network.lins, *features, strict=True)
        return [head((_unit(x) - _unit(y)) ** 2) for head, x, y in pairs]

    def features(self, x: Tensor) -> Any:
        """Maps of the network's layers, ``(N, C, h, w)`` each, of images ``(N, 3, H, W)`` in [-1, 1]."""
        return self._network.net(self._network.scaling_layer(x))

    def _target_features(self, b: Tensor, dtype: torch.dtype) -> Any:
        """Features of ``b``, computed once where several images are compared with the same one in turn."""
        if b.requires_grad or b.is_inference():
            return self.features(b.to(dtype))
        state = (b._version, dtype, torch.is_autocast_enabled(b.device.type), torch.is_grad_enabled())
        if self._last is None or self._last[0]() is not b or self._last[1] != state:
            self._last = (weakref.ref(b), state, self.features(b.to(dtype)))
        return self._last[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # a weak reference cannot be written down

    def describe(self) -> dict[str, Any]:
        """Return name, network, weight file, hash of the weights in use and library versions.

        ``sha256`` is taken over the numbers in use, not over the file, so it does not depend on the layout.
        """
        return {
            "name": self.name,
            "net": self.net,
            "version": "0.1",
            "file": self._file,
            "sha256": self._sha256,
            "versions": _versions("lpips", "torch", "torchvision"),
        }


class MSSSIM(QualityMetric):
    """One minus the multi-scale structural similarity (Wang et al. 2003; training loss of equation 4).

    The usual five scales need images of 176 pixels; smaller images get as many scales as they have room for,
    with the weights of those scales renormalised. Values at different numbers of scales are not comparable:
    ``describe(size)`` says how many were used.

    Raises:
        MissingExtraError: If torchmetrics is not installed.
    """

    name = "ms-ssim"

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchmetrics.functional.image import structural_similarity_index_measure
        except ImportError as error:
            raise MissingExtraError("MS-SSIM needs torchmetrics: pip install 'retroexit[metrics]'") from error
        self._ssim = structural_similarity_index_measure

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare checked images of shape ``(N, 3, H, W)``, range ``[-1, 1]``; return ``(N,)``."""
        # Variances are small differences of large numbers; bfloat16 would leave nothing of them.
        with torch.autocast(a.device.type, enabled=False):
            return self._compare(a.float(), b.float())

    def _compare(self, a: Tensor, b: Tensor) -> Tensor:
        weights = _scale_weights((a.shape[-2], a.shape[-1]))
        a, b = (a + 1) / 2, (b + 1) / 2
        product = torch.ones(a.shape[0], device=a.device)
        for scale, weight in enumerate(weights):
            if scale:
                a, b = nn.functional.avg_pool2d(a, 2), nn.functional.avg_pool2d(b, 2)
            similarity, contrast = self._ssim(
                a, b, data_range=1.0, reduction="none", return_contrast_sensitivity=True
            )
            product = product * _power(similarity if scale == len(weights) - 1 else contrast, weight)
        return 1 - product

    def describe(self, size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return name and library versions and, for images of ``size`` (height, width), the scales used."""
        facts: dict[str, Any] = {"name": self.name, "versions": _versions("torch", "torchmetrics")}
        if size is not None:
            weights = _scale_weights(size)
            facts |= {"size": list(size), "scales": len(weights), "weights": list(weights)}
        return facts


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def _unit(features: Tensor) -> Tensor:
    """Scale the channels at each place to length 1, as lpips does, with a finite gradient at zero."""
    # lpips writes sqrt(sum(x**2)), whose gradient is NaN at 0; the norm's is 0 there.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _power(x: Tensor, exponent: float) -> Tensor:
    """Raise to a power below 1, 0 for negative x, with gradient 0 instead of infinity near 0."""
    floor = 1e-4
    return torch.where(x > floor, x.clamp(min=floor) ** exponent, 0.0)


def _scale_weights(size: tuple[int, int]) -> tuple[float, ...]:
    """Return the weight of each scale that has room for one SSIM window, finest first, sum 1."""
    side = min(size)
    if side < _SSIM_WINDOW:
        raise OptionError(
            f"ms-ssim needs images of at least {_SSIM_WINDOW}x{_SSIM_WINDOW} pixels, "
            f"found {size[0]}x{size[1]}",
            size,
        )
    scales = min(len(_SCALE_WEIGHTS), int(math.log2(side // _SSIM_WINDOW)) + 1)
    if scales == len(_SCALE_WEIGHTS):
        return _SCALE_WEIGHTS  # already sum to 1 up to rounding; renormalising would change published values
    kept = _SCALE_WEIGHTS[:scales]
    return tuple(weight / sum(kept) for weight in kept)
