"""Generator inputs as a collection of samples, and the random state that each batch is run with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retroexit.core.nested import flatten, rebuild
from retroexit.errors import OptionError

__all__ = ["Samples", "drawing_from", "moved"]


@contextmanager
def drawing_from(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw random numbers from a seed inside the block, and restore the states of CPU and ``device``."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def moved(value: Any, device: torch.device | str) -> Any:
    """Move the tensors of a nested value to a device."""
    return rebuild(value, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


@dataclass
class Samples:
    """Inputs of a generator, one sample at a time, stacked to batches.

    Args:
        items: A sequence. Each item is one sample without the batch axis: a tensor, a tuple or list of
            positional inputs, or a dict of keyword inputs. A tensor ``(S, ...)`` counts as S samples.
        seed: A batch that begins at sample ``i`` is run with the random seed ``seed + i``, so that noise
            drawn inside the generator repeats.

    Raises:
        OptionError: If there are no samples, or the first has a wrong type.
    """

    items: Sequence[Any]
    seed: int = 0

    def __post_init__(self) -> None:
        items: Any = self.items
        is_sequence = hasattr(items, "__len__") and hasattr(items, "__getitem__")
        is_one = isinstance(items, dict) or (isinstance(items, Tensor) and items.dim() == 0)
        if not is_sequence or is_one or len(items) == 0:
            raise OptionError(
                f"inputs must be a non-empty sequence of samples, got {type(self.items).__name__}. A "
                "sample is a tensor, a tuple of inputs, or a dict of keyword inputs, without the batch axis.",
                self.items,
            )
        self.split(self.items[0])

    def __len__(self) -> int:
        return len(self.items)

    @staticmethod
    def split(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read one item as positional and keyword inputs."""
        if isinstance(item, Tensor):
            return (item,), {}
        if isinstance(item, dict):
            return (), item
        if isinstance(item, (tuple, list)):
            return tuple(item), {}
        raise OptionError(
            "a sample must be a tensor, a tuple of positional inputs, or a dict of keyword inputs, got "
            f"{type(item).__name__}",
            item,
        )

    def gather(self, indices: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Stack samples to one batch ``(args, kwargs)``.

        Raises:
            OptionError: If they differ in structure, in shape, or in a value that is not a tensor.
        """
        samples = [self.split(self.items[i]) for i in indices]
        flat = [dict(flatten(sample)) for sample in samples]
        for index, parts in zip(indices, flat, strict=True):
            if parts.keys() != flat[0].keys():
                raise OptionError(
                    f"all samples must have the same structure, sample {index} differs from {indices[0]}",
                    self.items[index],
                )
        stacked = [self._stack(path, [parts[path] for parts in flat]) for path in flat[0]]
        rest = iter(stacked)
        args, kwargs = rebuild(samples[0], lambda leaf: next(rest))
        return args, kwargs

    @staticmethod
    def _stack(path: tuple[Any, ...], leaves: list[Any]) -> Any:
        if not isinstance(leaves[0], Tensor):
            if any(repr(leaf) != repr(leaves[0]) for leaf in leaves):
                raise OptionError(
                    f"values that are not tensors must be equal in all samples, got {path[-1]!r} = "
                    f"{leaves[0]!r} in one and another value in others",
                    leaves,
                )
            return leaves[0]
        shapes = {tuple(leaf.shape) for leaf in leaves}
        if len(shapes) > 1:
            raise OptionError(
                f"the samples of a batch must have one shape, got {sorted(shapes)}. Use batch=1, or "
                "inputs of one size.",
                shapes,
            )
        return torch.stack(leaves)

    def batches(
        self, size: int, first: int = 0
    ) -> Iterator[tuple[list[int], tuple[Any, ...], dict[str, Any]]]:
        """Yield ``(indices, args, kwargs)`` in order, beginning at sample ``first``."""
        for begin in range(first, len(self), size):
            indices = list(range(begin, min(begin + size, len(self))))
            yield (indices, *self.gather(indices))

    def digest(self) -> str:
        """Hash all samples, to check whether a cache belongs to them."""
        total = hashlib.sha256()
        for index in range(len(self)):
            for path, leaf in flatten(self.split(self.items[index])):
                total.update(repr(path).encode())
                if isinstance(leaf, Tensor):
                    raw = leaf.detach().cpu().contiguous()
                    total.update(f"{raw.dtype}{tuple(raw.shape)}".encode())
                    total.update(raw.flatten().view(torch.uint8).numpy().tobytes())
                else:
                    total.update(repr(leaf).encode())
        return total.hexdigest()
