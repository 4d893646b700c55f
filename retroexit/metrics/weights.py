"""Find the weights of LPIPS, check them, and put them into the network; random weights are never used.

The order is: an explicit file, torch hub's cache folder, a download. Torch hub does not check a cached file, so the
hash in torchvision's file names is checked here.
"""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.core.files import check_finite, read_torch, sha256_of
from retroexit.errors import WeightsError

logger = logging.getLogger(__name__)


def empty_lpips(net: str) -> Any:
    """Build the lpips network on the meta device, so that no random numbers are drawn."""
    # torchvision warns about the arguments that lpips passes to it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips

        with torch.device("meta"):
            return lpips.LPIPS(pretrained=False, pnet_rand=True, net=net, verbose=False)


def fill_lpips(network: Any, net: str, path: Path) -> None:
    """Load convolutions and linear heads into an empty lpips network."""
    import lpips

    content, owner = _read(path), f"LPIPS {net!r}"
    heads = content.get("lin") or _read(Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth")
    # slice3.6.bias -> features.6.bias
    trunk = {name: f"features.{name.partition('.')[2]}" for name in network.net.state_dict()}
    _fill(network.net, trunk, content.get("backbone", content), path, owner)
    linear = [name for name in network.state_dict() if name.startswith("lin") and not name.startswith("lins")]
    _fill(network, dict(zip(linear, linear, strict=True)), heads, path, owner)  # also ``lins``


def fill_trunk(trunk: nn.Module, owner: str, path: Path) -> None:
    """Load the convolutions of a torchvision network, ``features.N.*`` in the file, into empty ones.

    The file is a torchvision state dict, or a dict with one as its ``"backbone"``. ``owner`` is for messages.
    """
    content = _read(path)
    names = {name: f"features.{name}" for name in trunk.state_dict()}
    _fill(trunk, names, content.get("backbone", content), path, owner)


def _fill(module: nn.Module, keys: Mapping[str, str], content: Mapping[str, Any], path: Path, owner: str) -> None:
    """Load ``keys`` (name in the module: key in the file) out of a state dict, with checks."""
    expected, picked = module.state_dict(), {}
    for name, key in keys.items():
        value = content.get(key)
        if not isinstance(value, Tensor) or value.shape != expected[name].shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else "nothing"
            raise WeightsError(
                f"{path} does not hold the weights of {owner}: {key} must have shape "
                f"{tuple(expected[name].shape)}, got {shape}. Pass the file of the right network."
            )
        picked[name] = value.float()
    check_finite(picked, path, WeightsError)
    module.load_state_dict(picked, strict=False, assign=True)


def _read(path: Path) -> dict[str, Any]:
    """Read a weight file without running any code in it."""
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}. Leave it out to use torch hub's cache.")
    content = read_torch(path, "Copy it again, or leave it out to use torch hub's cache.", WeightsError)
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a state dict, got {type(content).__name__}")
    return content


def hub_path(net: str) -> Path:
    """Return the place of torchvision's weights for ``net`` in torch hub's cache, whether they are there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / _hub_address(net).rpartition("/")[2]


def _hub_address(net: str) -> str:
    """Return the address of torchvision's ImageNet weights; the file name ends in the start of its sha256."""
    from torchvision import models

    names = {"alex": "AlexNet", "squeeze": "SqueezeNet1_1", "vgg": "VGG16", "vgg16": "VGG16", "vgg19": "VGG19"}
    return str(models.get_weight(f"{names[net]}_Weights.IMAGENET1K_V1").url)


def hub_file(net: str, owner: str | None = None) -> Path:
    """Find torchvision's weights for ``net`` in torch hub's cache, or download them; check the hash."""
    address, path = _hub_address(net), hub_path(net)
    prefix = path.stem.rpartition("-")[2]
    if not path.is_file():
        logger.info("downloading %s to %s", address, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"{owner or f'LPIPS {net!r}'} needs {path.name}, which is not in {path.parent} and could not "
                f"be downloaded from {address} ({error}). Put the file, whose sha256 starts with {prefix}, "
                "there, or pass weights=<file>."
            ) from error
    sha256 = sha256_of(path)
    if not sha256.startswith(prefix):
        raise WeightsError(
            f"{path} is damaged: its sha256 must start with {prefix}, got {sha256[: len(prefix)]}. Delete it "
            f"and download {address} again."
        )
    return path
