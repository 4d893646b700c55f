"""Differences of the features of a pretrained network (L_VGG of equations 3 and 4)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from retroexit.core.identity import fingerprint
from retroexit.errors import OptionError, WeightsError, closest
from retroexit.metrics.base import LastTarget
from retroexit.metrics.weights import fill_trunk, hub_file

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for images in [0, 1]


@dataclass(frozen=True)
class _Network:
    """A network up to the last compared layer: ``taps`` are weights by layer, ``net=None`` is random."""

    builder: str
    net: str | None
    taps: dict[int, float]
    smallest: int


# relu1_1, 2_1, 3_1, 4_1, 5_1 with the weights of Wang et al. 2018 (pix2pixHD), which OASIS took over.
_VGG19 = {1: 1 / 32, 6: 1 / 16, 11: 1 / 8, 20: 1 / 4, 29: 1.0}

PERCEPTUAL = {
    "vgg": _Network("vgg19", "vgg19", _VGG19, 16),
    "features-alex": _Network("alexnet", "alex", dict.fromkeys((1, 4, 7, 9, 11), 0.2), 31),
    "features-squeeze": _Network("squeezenet1_1", "squeeze", dict.fromkeys((1, 4, 7, 9, 10, 11, 12), 1 / 7), 17),
    "features-random": _Network("vgg19", None, dict.fromkeys((1, 6, 11, 20), 0.25), 8),
}
"""Networks by the name of the term; the paper's is ``"vgg"``."""


class Perceptual(nn.Module):
    """Weighted sum over layers of the mean absolute difference of features (Johnson et al. 2016).

    Args:
        name: ``"vgg"`` (VGG19), ``"features-alex"`` or ``"features-squeeze"`` (the networks of LPIPS), or
            ``"features-random"`` (VGG19 up to relu4_1, the same random weights on all machines).
        weights: Torchvision state dict of the convolutions, or the ``"backbone"`` of an LPIPS file; ``None``: torch
            hub's cache, or a download into it.

    Raises:
        OptionError: If there is no such network, or ``weights`` is passed for the random one.
        WeightsError: If the weights are not available, damaged or another network's.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str = "vgg", weights: str | Path | None = None) -> None:
        super().__init__()
        if name not in PERCEPTUAL:
            raise OptionError(f"no perceptual loss {name!r}; closest: {closest(name, PERCEPTUAL)}")
        self.name, self._network = name, PERCEPTUAL[name]
        self.network = self._network.builder
        self._target = LastTarget()
        self.trunk = _empty_trunk(self._network)
        self.source = "random numbers, the same everywhere"
        if self._network.net is None:
            if weights is not None:
                raise OptionError(f"weights must be None for {name!r}, got {weights}")
            _fill_randomly(self.trunk)
        else:
            path = _hub_file(name, self._network.net) if weights is None else Path(weights)
            self.source = str(path)
            fill_trunk(self.trunk, f"the loss {name!r} ({self._network.builder})", path)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(_DEVIATION).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Compare images ``(N, 3, H, W)`` or ``(N, 1, H, W)`` in [-1, 1]; returns ``(N,)``."""
        _check(self.name, image, self._network.smallest)
        with torch.no_grad():
            targets = self._target.features(target, self.features)
        total = image.new_zeros(len(image), dtype=torch.float32)
        features = self.features(image)
        for weight, a, b in zip(self._network.taps.values(), features, targets, strict=True):
            total = total + weight * (a.float() - b.float()).abs().mean((1, 2, 3))  # (N, C, h, w) -> (N,)
        return total

    def features(self, image: Tensor) -> list[Tensor]:
        """Return the features of images in [-1, 1] after every tap, ``(N, C, h, w)`` each."""
        x = (((image + 1) / 2).expand(-1, 3, -1, -1) - self.mean) / self.deviation
        maps = []
        for number, layer in enumerate(self.trunk):
            x = layer(x)
            if number in self._network.taps:
                maps.append(x)
        return maps

    def describe(self) -> dict[str, str]:
        """Return its name and a hash of its weights."""
        return {"name": self.name, "sha256": fingerprint(self.trunk)}


def _empty_trunk(network: _Network) -> nn.Sequential:
    """Build the layers up to the last tap, without weights and without drawing random numbers."""
    from torchvision import models

    with torch.device("meta"):
        features = getattr(models, network.builder)(weights=None).features
    trunk: nn.Sequential = features[: max(network.taps) + 1]
    for module in trunk.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # it would overwrite the tap before it
    return trunk


def _fill_randomly(trunk: nn.Sequential) -> None:
    """Draw weights that keep the variance of features; the same on every machine."""
    source = torch.Generator().manual_seed(0)
    drawn = {}
    for name, empty in trunk.state_dict().items():
        value = torch.zeros(empty.shape)
        if value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=source)
        drawn[name] = value
    trunk.load_state_dict(drawn, assign=True)


def _hub_file(name: str, net: str) -> Path:
    try:
        return hub_file(net, f"the loss {name!r}")
    except WeightsError as error:
        others = ", ".join(repr(other) for other in PERCEPTUAL if other != name and other.startswith("feat"))
        raise WeightsError(f"{str(error).removesuffix('.')}. Other networks: {others}.") from error


def _check(name: str, image: Tensor, smallest: int) -> None:
    if image.dim() != 4 or image.shape[1] not in (1, 3) or min(image.shape[2:]) < smallest:
        raise OptionError(
            f"the loss {name!r} takes images (N, 3, H, W) or (N, 1, H, W) of at least {smallest}x{smallest} "
            f"pixels, got {tuple(image.shape)}. Train on larger windows, or leave the term out."
        )
