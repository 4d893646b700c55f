"""Find the weights of LPIPS, check them, and put them into the network.

Order: an explicit file, torch hub's cache folder, a download into that folder. Torch hub trusts a cached
file without looking at it, so the hash in torchvision's file names is checked here. No route ends in random
weights.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.errors import MissingExtraError, WeightsError

__all__ = ["digest", "empty_lpips", "fill_lpips", "fill_trunk", "hub_file"]

logger = logging.getLogger(__name__)


def empty_lpips(net: str) -> Any:
    """Build the lpips network on the meta device: no random weights, no random numbers drawn, no waste."""
    # torchvision warns about the arguments that lpips passes to it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import lpips
        except ImportError as error:
            raise MissingExtraError("LPIPS needs the lpips package: pip install lpips") from error
        with torch.device("meta"):
            return lpips.LPIPS(pretrained=False, pnet_rand=True, net=net, verbose=False)


def fill_lpips(network: Any, net: str, path: Path) -> None:
    """Load convolutions and linear heads into an empty lpips network."""
    content = _read(path)
    convolutions = content.get("backbone", content)
    heads = content.get("lin") or _read(_packaged_heads(net))
    # slice3.6.bias -> features.6.bias
    trunk = {name: f"features.{name.partition('.')[2]}" for name in network.net.state_dict()}
    linear = [name for name in network.state_dict() if name.startswith("lin") and not name.startswith("lins")]
    network.net.load_state_dict(_pick(trunk, convolutions, network.net, path, _lpips(net)), assign=True)
    picked = _pick({name: name for name in linear}, heads, network, path, _lpips(net))
    network.load_state_dict(picked, strict=False, assign=True)  # the heads appear again as ``lins``


def fill_trunk(trunk: nn.Module, what: str, path: Path) -> None:
    """Load the convolutions of a torchvision network, ``features.N.*`` in the file, into empty ones.

    Args:
        trunk: Its ``features``, or the first of them.
        what: What to call the network in messages.
        path: A torchvision state dict, or a dict with one as its ``"backbone"``.

    Raises:
        WeightsError: If the file is missing, damaged, or another network's.
    """
    content = _read(path)
    names = {name: f"features.{name}" for name in trunk.state_dict()}
    trunk.load_state_dict(_pick(names, content.get("backbone", content), trunk, path, what), assign=True)


def _lpips(net: str) -> str:
    return f"LPIPS {net!r}"


def _pick(
    wanted: Mapping[str, str], found: Mapping[str, Any], module: nn.Module, path: Path, what: str
) -> dict[str, Tensor]:
    """Take ``wanted`` (name in the module: key in the file) out of a state dict, with checks."""
    expected, picked = module.state_dict(), {}
    for name, key in wanted.items():
        value = found.get(key)
        if not isinstance(value, Tensor) or value.shape != expected[name].shape:
            was = _shape(value) if isinstance(value, Tensor) else "nothing"
            raise WeightsError(
                f"{path} does not hold the weights of {what}: {key} should be "
                f"{_shape(expected[name])}, found {was}; pass the file of the right network",
                path,
            )
        picked[name] = value.float()
    return picked


def _packaged_heads(net: str) -> Path:
    import lpips

    return Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"


def _read(path: Path) -> dict[str, Any]:
    """Read a weight file without running any code in it."""
    if not path.is_file():
        raise WeightsError(
            f"no weight file at {path}; check it, or leave it out to use torch hub's cache", path
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{path} is no weight file that torch can read safely: {error}", path) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}; a state dict is needed", path)
    return content


def _hub_address(net: str) -> str:
    """Address of torchvision's ImageNet weights; the file name ends in the first digits of its sha256."""
    from torchvision import models

    weights = {
        "alex": models.AlexNet_Weights.IMAGENET1K_V1,
        "squeeze": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
        "vgg": models.VGG16_Weights.IMAGENET1K_V1,
        "vgg16": models.VGG16_Weights.IMAGENET1K_V1,
        "vgg19": models.VGG19_Weights.IMAGENET1K_V1,
    }
    return str(weights[net].url)


def hub_file(net: str, what: str | None = None) -> Path:
    """Find torchvision's weights in torch hub's cache, or download them there; check the hash either way.

    Args:
        net: Which network.
        what: What needs them, for messages; LPIPS if ``None``.
    """
    address = _hub_address(net)
    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    prefix = path.stem.rpartition("-")[2]
    if not path.is_file():
        logger.info("downloading %s to %s", address, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"{what or _lpips(net)} needs {path.name}, which is not in {path.parent} and could not be "
                f"downloaded from {address} ({error}); put the file, whose sha256 starts with {prefix}, "
                "there, or pass weights=<file>",
                path,
            ) from error
    found = _file_digest(path)
    if not found.startswith(prefix):
        raise WeightsError(
            f"{path} is damaged: its sha256 starts with {found[: len(prefix)]}, its name says {prefix}; "
            f"delete it and fetch {address} again",
            path,
        )
    return path


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(network: nn.Module) -> str:
    """Hash names and numbers of all weights in use, so that equal weights hash alike from any file layout."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))
