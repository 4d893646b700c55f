"""Where the keys and the values of a guidance bank come from (paper sections 3.3, 4.1 and 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from retroexit.branch.branch import GuideShape
from retroexit.core.nested import cloned
from retroexit.errors import BankError, OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.options import WHOLE_IMAGE, Guidance
from retroexit.split.split import SplitGenerator
from retroexit.stages.decoder import Cut, Decoder
from retroexit.stages.stage import Stage
from retroexit.tracing.record import unobserved

__all__ = ["Taps", "find_key_cut", "find_taps", "key_name", "tap_paths"]


@dataclass(frozen=True)
class Taps:
    """Keys and values of one wrapped generator.

    Attributes:
        value_cut: Cut after the map that values are cut from.
        gives_image: Whether that map is the backbone's image.
        key_node: Node of the feature that keys are cut from, if no function returns them.
        key: Returns one key per input, if the bank holds frames.
        key_shape: Shape ``(D, ...)`` of the map that keys are cut from, for one sample.
        patch: Size of a key's patch.
        guide: Shape of the guide, for the branches.
    """

    value_cut: Cut
    gives_image: bool
    key_node: fx.Node
    key: Callable[..., Tensor] | None
    key_shape: tuple[int, ...]
    patch: tuple[int, ...]
    guide: GuideShape

    @property
    def key_tap(self) -> str:
        """Name of the source of keys: a node of the recording, or a function."""
        return self.key_node.name if self.key is None else key_name(self.key)

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of key patches along each dimension."""
        return tuple(size // step for size, step in zip(self.key_shape[1:], self.patch, strict=True))

    @property
    def queries(self) -> int:
        """Number of key patches of one sample."""
        return math.prod(self.grid)

    def query(self, key_feature: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Return the map ``(N, D, ...)`` that keys are cut from, a key function's or the key feature."""
        if self.key is None:
            return key_feature
        width, *place = self.key_shape
        return _keys_of(self.key, args, kwargs, len(key_feature), len(place), width)

    def origin(self) -> dict[str, Any]:
        """Return the facts that a bank for this generator has, see `GuidanceBank.check_origin`."""
        return {
            "key_tap": self.key_tap,
            "value_tap": self.value_cut.feature.name,
            "patch": tuple(self.patch),
            "key_width": self.key_shape[0] * math.prod(self.patch),
            "value_patch": tuple(side // n for side, n in zip(self.guide.size, self.grid, strict=True)),
            "value_channels": self.guide.channels,
        }

    def search_macs(self, bank: GuidanceBank) -> int:
        """MACs of the search in the bank for one sample, as exact search counts them."""
        return int(bank.macs_per_search(self.queries))


def key_name(key: Callable[..., Tensor]) -> str:
    """Name a key function as a saved model records it: module and qualified name."""
    named: Any = key
    while hasattr(named, "func"):  # functools.partial
        named = named.func
    if not hasattr(named, "__qualname__"):
        named = type(named)
    return f"{named.__module__}.{named.__qualname__}"


@torch.no_grad()
def _keys_of(
    key: Callable[..., Tensor], args: Any, kwargs: Any, count: int, dims: int, width: int | None = None
) -> Tensor:
    """Call a key function for N = ``count`` inputs; return a map of one location, ``(N, D, 1, 1)``."""
    name, expected = key_name(key), f"({count}, {'D' if width is None else width})"
    try:
        keys = key(*args, **kwargs)
    except Exception as error:
        raise BankError(
            f"the key function {name!r} raised {type(error).__name__}: {error}. It is called with the "
            "generator's own arguments.",
            key,
        ) from error
    if not isinstance(keys, Tensor) or not keys.is_floating_point():
        kind = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
        raise BankError(
            f"the key function {name!r} must return a floating-point tensor {expected}, got {kind}", key
        )
    if keys.dim() != 2 or len(keys) != count or not keys.shape[1] or width not in (None, keys.shape[1]):
        raise BankError(
            f"the key function {name!r} must return one row of numbers per input, {expected}, got "
            f"{tuple(keys.shape)}",
            key,
        )
    return keys.detach().reshape(*keys.shape, *(1,) * dims)  # (N, D) -> (N, D, 1, 1)


def tap_paths(guidance: Guidance | None) -> list[str]:
    """List the module paths named by ``key_after`` and ``value_after``."""
    taps = () if guidance is None else (guidance.key_after, guidance.value_after)
    return [tap for tap in taps if isinstance(tap, str) and tap != WHOLE_IMAGE]


def find_key_cut(decoder: Decoder, guidance: Guidance | None, first: tuple[Stage, Cut]) -> Cut | None:
    """Cut after the stage that keys come from; ``None`` if that is the first attach point.

    Raises:
        AttachPointError, OptionError: If there is no such stage, or it lies behind the first attach point.
    """
    place = None if guidance is None else guidance.key_after
    if place is None:
        return None
    if isinstance(place, str):
        stage = decoder.describe(place)
    elif not 1 <= place <= len(decoder.stages):
        raise OptionError(f"key_after must be a stage from 1 to {len(decoder.stages)}, got {place}", place)
    else:
        stage = decoder.stages[place - 1]
    cut, (attached, earliest) = decoder.cut(stage), first
    if cut.position > earliest.position:
        raise OptionError(
            f"key_after must be at or before the first attach point {attached.path!r}, got {stage.path!r}: "
            "the first route does not compute it",
            place,
        )
    return None if cut.feature is earliest.feature else cut


def find_taps(split: SplitGenerator, guidance: Guidance) -> Taps:
    """Determine the keys and values of a split generator.

    Raises:
        AttachPointError, OptionError: If there is no such stage for values.
        BankError: If keys and values do not divide into the same patches, a key function does not return
            valid keys, or the keys' feature is the same for all inputs.
    """
    value_cut = _value_cut(split.decoder, guidance)
    shape = value_cut.feature.meta["shape"]
    key = guidance.key if callable(guidance.key) else None
    args, kwargs = split.example
    with torch.no_grad(), unobserved(split.generator):
        key_feature = split.begin(cloned(args), cloned(kwargs)).key_feature
        if key is not None:
            key_feature = _keys_of(key, args, kwargs, len(key_feature), len(shape) - 2)
    key_node = (split.key_cut or split.cuts[0]).feature
    if split.key_cut is not None and split.any_batch and key_node not in split.batched:
        raise BankError(
            f"the output of key_after={guidance.key_after!r} is the same for all inputs. Name a later one.",
            guidance,
        )
    key_shape = tuple(key_feature.shape[1:])
    patch = guidance.patch if key is None else (1,) * (len(shape) - 2)
    for size, side, step in zip(shape[2:], key_shape[1:], patch, strict=True):
        if side % step or size % (side // step):
            raise BankError(
                f"keys from a map {key_shape[1:]} and values from a map {tuple(shape[2:])} do not divide "
                f"into the same patches of {patch}. Choose another patch, key_after or value_after.",
                guidance,
            )
    guide = GuideShape(int(shape[1]), tuple(shape[2:]), guidance.inject or "input")
    return Taps(value_cut, guidance.value_after == WHOLE_IMAGE, key_node, key, key_shape, patch, guide)


def _value_cut(decoder: Decoder, guidance: Guidance) -> Cut:
    place = guidance.value_after
    if place == WHOLE_IMAGE:
        return Cut(len(decoder.recording.nodes) - 1, decoder.image, (), ())
    if isinstance(place, str):
        return decoder.cut(decoder.describe(place))
    count = len(decoder.stages)
    index = (count + 1) // 2 if place is None else place
    if not 1 <= index < count:
        raise OptionError(
            f"value_after must be 'image' or a stage before the last of {count}, got {index}", index
        )
    return decoder.cut(decoder.stages[index - 1])
