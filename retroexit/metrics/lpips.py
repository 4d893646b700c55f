"""LPIPS, the paper's quality metric."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retroexit.core.identity import fingerprint
from retroexit.errors import OptionError, closest
from retroexit.metrics.base import LastTarget, QualityMetric, versions_of
from retroexit.metrics.weights import empty_lpips, fill_lpips, hub_file

# Below this many pixels on the shorter side a pooling layer of the network has no output.
_SMALLEST_SIDE = {"alex": 31, "squeeze": 17, "vgg": 16}


class LPIPS(QualityMetric):
    """Learned perceptual distance, version 0.1 (Zhang et al. 2018), with the network of the ``lpips`` package.

    Args:
        net: Feature network: ``"alex"``, ``"squeeze"`` or ``"vgg"``.
        weights: A torchvision state dict (``features.N.*``), with the heads of the ``lpips`` package, or a dict of such
            a ``"backbone"`` and the heads as ``"lin"`` (``linK.model.1.weight``). Default: torch hub's cache folder, or
            a download into it.

    Raises:
        OptionError: If ``net`` is unknown.
        WeightsError: If the weights are missing, damaged, or another network's.
    """

    def __init__(self, net: str = "alex", weights: str | Path | None = None) -> None:
        super().__init__()
        if net not in _SMALLEST_SIDE:
            raise OptionError(f"no LPIPS network {net!r}; closest: {closest(net, _SMALLEST_SIDE)}")
        self.net = net
        self.name = f"lpips-{net}"
        self._network = empty_lpips(net)
        path = hub_file(net) if weights is None else Path(weights)
        fill_lpips(self._network, net, path)
        self.requires_grad_(False)
        self.eval()
        self.source = str(path)
        self._file = path.name
        self._target = LastTarget()
        self._sha256 = fingerprint(self._network)

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare checked images of shape ``(N, 3, H, W)``, range ``[-1, 1]``; return ``(N,)``."""
        smallest, (height, width) = _SMALLEST_SIDE[self.net], a.shape[-2:]
        if min(height, width) < smallest:
            raise OptionError(
                f"the images for {self.name} must have at least {smallest}x{smallest} pixels, got "
                f"{height}x{width}. Use larger images or crops, or metric='ms-ssim'."
            )
        # The order of the network's layers fixes the rounding of the sum.
        dtype = next(self.parameters()).dtype
        loss, targets = a.new_zeros(a.shape[0], dtype=dtype), self._target.features(b, self.features, dtype)
        for head, x, y in zip(self._network.lins, self.features(a), targets, strict=True):
            loss = loss + head((_unit(x) - _unit(y)) ** 2).mean(dim=(1, 2, 3))  # (N, 1, h, w) -> (N,)
        return loss

    def features(self, x: Tensor) -> Any:
        """Return the maps of the network's layers, ``(N, C, h, w)`` each, of images in [-1, 1]."""
        return self._network.net(self._network.scaling_layer(x.to(next(self.parameters()).dtype)))

    def describe(self) -> dict[str, Any]:
        """Return name, network, weight file, hash of the numbers in use and library versions."""
        return {
            "name": self.name,
            "net": self.net,
            "version": "0.1",
            "file": self._file,
            "sha256": self._sha256,
            "versions": versions_of("lpips", "torch", "torchvision"),
        }


def _unit(features: Tensor) -> Tensor:
    """Scale the channels at each place to length 1, as lpips does, with a finite gradient at zero."""
    # lpips writes sqrt(sum(x**2)), whose gradient is NaN at 0; that of the norm is 0 there.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
