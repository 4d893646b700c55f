"""Which trained network a module is, whatever it is wrapped in and whichever precision it runs in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 8
_LISTED = 3


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, `nn.DataParallel` and `DistributedDataParallel`."""
    while True:
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):  # torch.compile
            module = module.get_submodule("_orig_mod")
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def fingerprint(module: nn.Module) -> str:
    """Hash a module's class name, parameters and persistent buffers: SHA-256 in hexadecimal.

    Equal weights under equal names give equal fingerprints on every device and inside every wrapper.
    """
    return Identity.of(module).fingerprint


@dataclass(frozen=True)
class Identity:
    """Class and weights of a network, small enough for a manifest.

    ``tensors`` are its parameters and persistent buffers by name: dtype, shape, SHA-256 (16 digits), and
    values at up to eight places, which are compared where the precision differs.
    """

    name: str
    tensors: dict[str, tuple[str, tuple[int, ...], str, tuple[float, ...]]]

    @classmethod
    def of(cls, module: nn.Module) -> Identity:
        """Read the identity of a module; hashes all weights."""
        module = unwrapped(module)
        return cls(type(module).__name__, {name: _summary(tensor) for name, tensor in named_tensors(module)})

    @property
    def fingerprint(self) -> str:
        """SHA-256 of class name, names, dtypes, shapes and values."""
        total = hashlib.sha256(self.name.encode())
        for name, (dtype, shape, digest, _) in sorted(self.tensors.items()):
            total.update(f"{name}{dtype}{shape}{digest}".encode())
        return total.hexdigest()

    def difference(self, other: Identity) -> str:
        """Say how another network differs from this one; empty where it is the same but for rounding."""
        if self.name != other.name:
            return f"its class is {other.name} instead of {self.name}"
        missing, new = self.tensors.keys() - other.tensors.keys(), other.tensors.keys() - self.tensors.keys()
        if missing or new:
            parts = [f"{word} {_some(names)}" for word, names in (("without", missing), ("with new", new)) if names]
            return "it comes " + " and ".join(parts)
        shapes = [name for name, (_, shape, *_) in self.tensors.items() if other.tensors[name][1] != shape]
        if shapes:
            name = shapes[0]
            return f"{name} has the shape {other.tensors[name][1]} instead of {self.tensors[name][1]}"
        weights = [name for name, summary in self.tensors.items() if not _is_same(summary, other.tensors[name])]
        if weights:
            return f"its weights differ in {len(weights)} of {len(self.tensors)} tensors: {_some(weights)}"
        return ""

    def to_json(self) -> dict[str, Any]:
        """Write as JSON types."""
        return {"class": self.name, "tensors": {name: list(summary) for name, summary in self.tensors.items()}}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Identity:
        """Read what `to_json` wrote; raises `KeyError`, `TypeError` or `ValueError` if it is damaged."""
        return cls(
            str(saved["class"]),
            {
                str(name): (str(dtype), tuple(map(int, shape)), str(digest), tuple(map(float, values)))
                for name, (dtype, shape, digest, values) in dict(saved["tensors"]).items()
            },
        )


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, under the names that they have without wrappers of inner modules."""
    named = [(name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor)]
    plain = [".".join(part for part in name.split(".") if part != "_orig_mod") for name, _ in named]
    bare = [".".join(part for part in name.split(".") if part != "module") for name in plain]
    counts = Counter(bare)
    for (_, tensor), name, short in zip(named, plain, bare, strict=True):
        yield (short if short and counts[short] == 1 else name), tensor


def _summary(tensor: Tensor) -> tuple[str, tuple[int, ...], str, tuple[float, ...]]:
    raw = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(raw.reshape(-1).view(torch.uint8).numpy().data).hexdigest()[:16]
    flat = raw.reshape(-1)
    places = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLES, len(flat))).long()
    values = torch.view_as_real(flat[places]).flatten() if raw.is_complex() else flat[places]
    values = values.double().nan_to_num()
    return str(raw.dtype).removeprefix("torch."), tuple(raw.shape), digest, tuple(values.tolist())


def _is_same(summary: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    if summary[0] == other[0]:
        return bool(summary[2] == other[2])
    a, b = torch.tensor(summary[3], dtype=torch.float64), torch.tensor(other[3], dtype=torch.float64)
    dtypes = [getattr(torch, name) for name in (summary[0], other[0])]
    if not all(dtype.is_floating_point for dtype in dtypes):
        return False
    precision = max(torch.finfo(dtype).eps for dtype in dtypes)
    return torch.allclose(a, b, rtol=precision, atol=1e-6)


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
