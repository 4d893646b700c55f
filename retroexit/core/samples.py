"""Generator inputs as a collection of samples, and the random state each batch of them is run with."""

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
    """Draw random numbers from a seed inside the block; the states before it are put back.

    Args:
        seed: The seed, ``>= 0``.
        device: Device whose state is kept, beside the CPU's.
    """
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def moved(value: Any, device: torch.device | str) -> Any:
    """Move the tensors of a nested value to a device."""
    return rebuild(value, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


@dataclass
class Samples:
    """Inputs of a generator, one sample at a time, put together to batches.

    Args:
        items: A sequence; each item is one sample without the batch axis: a tensor, a tuple or list of
            positional inputs, or a dict of keyword inputs. A tensor ``(S, ...)`` counts as S samples.
        seed: A batch that begins at sample ``i`` is run with the random state ``seed + i``, so that noise
            drawn inside the generator repeats.

    Raises:
        OptionError: If there are no samples, or the first is of another kind.
    """

    items: Sequence[Any]
    seed: int = 0

    def __post_init__(self) -> None:
        items: Any = self.items
        is_sequence = hasattr(items, "__len__") and hasattr(items, "__getitem__")
        is_one = isinstance(items, dict) or (isinstance(items, Tensor) and items.dim() == 0)
        if not is_sequence or is_one or len(items) == 0:
            raise OptionError(
                f"asked for a pass over inputs; found {type(self.items).__name__} without samples. Pass a "
                "sequence of samples: tensors, tuples of positional inputs, or dicts of keyword inputs, each "
                "without the batch axis.",
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
            f"asked for a sample; found a {type(item).__name__}. A sample is a tensor, a tuple of positional "
            "inputs, or a dict of keyword inputs.",
            item,
        )

    def gather(self, indices: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Stack samples to one batch of ``(args, kwargs)``.

        Raises:
            OptionError: If they differ in structure, in shape, or in a value that is no tensor.
        """
        picked = [self.split(self.items[i]) for i in indices]
        flat = [dict(flatten(sample)) for sample in picked]
        for index, parts in zip(indices, flat, strict=True):
            if parts.keys() != flat[0].keys():
                raise OptionError(
                    f"asked for a batch; found that sample {index} has other parts than sample {indices[0]}. "
                    "Give every sample the same structure.",
                    self.items[index],
                )
        stacked: list[Any] = []
        for path in flat[0]:
            leaves: list[Any] = [parts[path] for parts in flat]
            if not isinstance(leaves[0], Tensor):
                if any(repr(leaf) != repr(leaves[0]) for leaf in leaves):
                    raise OptionError(
                        f"asked for a batch of {len(indices)} samples; found {path[-1]!r} = {leaves[0]!r} in "
                        "one and another value in others. Values that are no tensors must be equal in all "
                        "samples.",
                        leaves,
                    )
                stacked.append(leaves[0])
                continue
            shapes = {tuple(leaf.shape) for leaf in leaves}
            if len(shapes) > 1:
                raise OptionError(
                    f"asked for a batch of {len(indices)} samples; found shapes {sorted(shapes)}. Use "
                    "batch=1, or inputs of one size.",
                    shapes,
                )
            stacked.append(torch.stack(leaves))
        rest = iter(stacked)
        args, kwargs = rebuild(picked[0], lambda leaf: next(rest))
        return args, kwargs

    def batches(
        self, size: int, first: int = 0
    ) -> Iterator[tuple[list[int], tuple[Any, ...], dict[str, Any]]]:
        """Yield ``(indices, args, kwargs)`` in order, beginning at sample ``first``."""
        for begin in range(first, len(self), size):
            indices = list(range(begin, min(begin + size, len(self))))
            yield (indices, *self.gather(indices))

    def digest(self) -> str:
        """Hash all samples, to tell whether a cache belongs to them."""
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
