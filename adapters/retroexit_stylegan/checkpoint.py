"""Read trained generators from files of NVIDIA's and rosinality's code, without running code from them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retroexit.core.files import check_finite, read_torch, reading
from retroexit.errors import CheckpointError, WeightsError
from retroexit_stylegan.convert import convert_rosinality
from retroexit_stylegan.generator import StyleGANGenerator

__all__ = ["load_generator"]

_EXPORT = """NVIDIA's pickled networks hold code. Export the weights in a checkout of stylegan2-ada-pytorch:
    import torch, legacy
    generator = legacy.load_network_pkl(open("{path}", "rb"))["G_ema"]
    torch.save(generator.state_dict(), "{target}")"""


def load_generator(path: str | Path, conv_clamp: float | None = None, samples: int = 4096) -> StyleGANGenerator:
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
        CheckpointError: If the file is damaged, holds more than tensors and plain values, or no weights of StyleGAN2.
        WeightsError: If there is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"no checkpoint at {path}. Check the path.")
    state, w_avg = _weights(_read(path), path)
    check_finite(state | ({} if w_avg is None else {"latent_avg": w_avg}), path, CheckpointError)
    if "input.input" in state:
        with reading(path, "Pass the checkpoint's 'g_ema'."):
            state = convert_rosinality(state, w_avg)
        has_mean = w_avg is not None
    elif "synthesis.b4.const" in state:
        has_mean = True
    else:
        raise CheckpointError(
            f"{path} must hold 'synthesis.b4.const' (NVIDIA's layout) or 'input.input' (rosinality's), got "
            f"{sorted(state)[:4]}. Pass the generator's weights."
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

        with reading(path):
            return load_file(path)
    advice = _EXPORT.format(path=path.name, target=path.with_suffix(".pth").name)
    # train.py also saves its options, a namespace of plain values.
    return read_torch(path, advice, CheckpointError, [argparse.Namespace])


def _weights(content: Any, path: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    """Find the generator's state dict in a checkpoint, and the mean style vector beside it."""
    w_avg = None
    for name in ("g_ema", "G_ema"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            w_avg, content = content.get("latent_avg"), content[name]
            if w_avg is not None and not isinstance(w_avg, Tensor):
                raise CheckpointError(
                    f"latent_avg in {path} must be a tensor, got {type(w_avg).__name__}. Copy the file again."
                )
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = list(content)[:6] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path} must hold a state dict, got {keys}. Save the generator's state_dict(), or a checkpoint "
            "that has it under 'g_ema'."
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
    except Exception as error:
        raise CheckpointError(
            f"{path} holds weights of another architecture than the paper's: "
            f"{' '.join(str(error).split())[:300]}. Wrap the network's own object instead."
        ) from error
    return generator.eval()
