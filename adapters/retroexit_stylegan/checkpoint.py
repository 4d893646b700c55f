"""Read trained generators from files of NVIDIA's and rosinality's code, without running code from them."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retroexit.errors import CheckpointError
from retroexit_stylegan.convert import convert_rosinality
from retroexit_stylegan.generator import StyleGANGenerator

__all__ = ["load_generator"]

_EXPORT = """NVIDIA's pickled networks hold code. Export the weights in a checkout of stylegan2-ada-pytorch:
    import torch, legacy
    generator = legacy.load_network_pkl(open("{path}", "rb"))["G_ema"]
    torch.save(generator.state_dict(), "{target}")"""


def load_generator(
    path: str | Path, conv_clamp: float | None = None, samples: int = 4096
) -> StyleGANGenerator:
    """Read a generator from a checkpoint; its sizes are inferred from the tensors.

    Two layouts are supported: the state dict of NVIDIA's ``G_ema``, saved by ``torch.save`` or as safetensors,
    and a checkpoint of rosinality's code, ``{"g_ema": ..., ...}``. Nothing but tensors and plain values is
    ever unpickled.

    Args:
        path: File ending in ``.safetensors``, or one written by ``torch.save``.
        conv_clamp: Largest magnitude of any layer's output, which the files do not state: 256 if it was
            trained in mixed precision, the default of NVIDIA's code.
        samples: Number of latent vectors to estimate the mean style vector from, for truncation, if a
            checkpoint of rosinality's code has no ``latent_avg``, as those of its ``train.py``. The vectors are
            the same each time.

    Returns:
        The generator, in eval mode.

    Raises:
        CheckpointError: If the file holds more than tensors and plain values, or no weights of StyleGAN2.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    state, w_avg = _weights(_read(path), path)
    if "input.input" in state:
        state = convert_rosinality(state, w_avg)
        has_mean = w_avg is not None
    elif "synthesis.b4.const" in state:
        has_mean = True
    else:
        raise CheckpointError(
            f"{path} must hold 'synthesis.b4.const' (NVIDIA's layout) or 'input.input' (rosinality's), got "
            f"{sorted(state)[:4]}. Pass the generator's weights.",
            path,
        )
    generator = _generator(state, conv_clamp, path)
    if not has_mean:
        source = torch.Generator().manual_seed(0)
        z = torch.randn(samples, generator.z_dim, generator=source)
        with torch.no_grad():
            generator.mapping.w_avg.copy_(generator.mapping(z)[:, 0].mean(0))
    return generator


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        # train.py also saves its options, a namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol; unreadable files raise below
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
    ) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = _EXPORT.format(path=path.name, target=path.with_suffix(".pth").name)
        raise CheckpointError(
            f"{path} must be a file of tensors and plain values only ({cause}). {advice}", path
        ) from error


def _weights(content: Any, path: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    """Find the generator's state dict in a checkpoint, and the mean style vector beside it."""
    w_avg = None
    for name in ("g_ema", "G_ema"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            w_avg, content = content.get("latent_avg"), content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = list(content)[:6] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path} must hold a state dict, got {keys}. Save the generator's state_dict(), or a checkpoint "
            "that has it under 'g_ema'.",
            path,
        )
    return dict(content), w_avg


def _generator(state: dict[str, Tensor], conv_clamp: float | None, path: Path) -> StyleGANGenerator:
    """Make a generator of the sizes that a state dict in NVIDIA's layout has."""
    numbers = [re.match(r"synthesis\.b(\d+)\.conv1\.weight$", name) for name in state]
    sizes = sorted(int(number[1]) for number in numbers if number)
    layers = sum(bool(re.match(r"mapping\.fc\d+\.weight$", name)) for name in state)
    try:
        w_dim, inputs = state["mapping.fc0.weight"].shape
        c_dim = state["mapping.embed.weight"].shape[1] if "mapping.embed.weight" in state else 0
        generator = StyleGANGenerator(
            z_dim=inputs - (w_dim if c_dim else 0),
            c_dim=c_dim,
            w_dim=w_dim,
            resolution=sizes[-1],
            num_mapping_layers=layers,
            conv_clamp=conv_clamp,
            image_channels=state["synthesis.b4.torgb.bias"].shape[0],
            channels=[state[f"synthesis.b{size}.conv1.bias"].shape[0] for size in sizes],
        )
        generator.load_state_dict(state)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds weights of another architecture than the paper's: "
            f"{' '.join(str(error).split())[:300]}. Wrap the network's own object instead.",
            path,
        ) from error
    return generator.eval()
