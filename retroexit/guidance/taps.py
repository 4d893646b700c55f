"""Where the keys and the values of a guidance bank come from (paper sections 3.3, 4.1 and 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from retroexit.branch.entry import GuideShape
from retroexit.core.nested import cloned
from retroexit.errors import BankError, OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.keys import key_name, keys_of
from retroexit.guidance.options import WHOLE_IMAGE, Guidance
from retroexit.guidance.provenance import Provenance
from retroexit.split.segments import Cut
from retroexit.split.split import SplitGenerator
from retroexit.stages.decoder import Decoder, Stage, describe_stage
from retroexit.tracing.record import unobserved

__all__ = ["Taps", "find_key_cut", "find_taps", "tap_paths"]


@dataclass(frozen=True)
class Taps:
    """Keys and values of one wrapped generator.

    Attributes:
        value_cut: Behind the map that values are cut from.
        gives_image: Whether that is the backbone's image.
        key_node: Node of the feature that keys are cut from, where no function gives them.
        key: Gives one key per input, where the bank holds whole frames.
        key_shape: Shape ``(D, ...)`` of the map that keys are cut from, for one sample.
        patch: Size of a key's patch in it.
        guide: What a branch has to know.
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
        """Name of what keys come from: a node of the recording, or a function."""
        return self.key_node.name if self.key is None else key_name(self.key)

    @property
    def queries(self) -> int:
        """Number of keys that one sample looks for."""
        return math.prod(size // step for size, step in zip(self.key_shape[1:], self.patch, strict=True))

    def query(self, key_feature: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Give the map ``(N, D, ...)`` that keys are cut from.

        Args:
            key_feature: The feature that `SplitGenerator.begin` gives.
            args: The generator's positional inputs.
            kwargs: Its keyword inputs.

        Raises:
            BankError: If a key function gives no keys.
        """
        if self.key is None:
            return key_feature
        width, *place = self.key_shape
        return keys_of(self.key, args, kwargs, len(key_feature), len(place), width)

    def origin(self, fingerprint: str | None = None) -> Provenance:
        """Say what a bank for this generator is made from."""
        grid = [side // step for side, step in zip(self.key_shape[1:], self.patch, strict=True)]
        return Provenance(
            fingerprint,
            self.key_tap,
            self.value_cut.feature.name,
            tuple(self.patch),
            self.key_shape[0] * math.prod(self.patch),
            tuple(side // count for side, count in zip(self.guide.size, grid, strict=True)),
            self.guide.channels,
        )

    def search_macs(self, bank: GuidanceBank) -> int:
        """MACs of the search in the bank for one sample, as exact search counts them."""
        return int(bank.macs_per_search(self.queries))


def tap_paths(guidance: Guidance | None) -> list[str]:
    """List the module paths that keys and values come from, as far as they are given by path."""
    taps = () if guidance is None else (guidance.key_after, guidance.value_after)
    return [tap for tap in taps if isinstance(tap, str) and tap != WHOLE_IMAGE]


def find_key_cut(decoder: Decoder, guidance: Guidance | None, first: tuple[Stage, Cut]) -> Cut | None:
    """Cut behind the stage that keys come from; ``None`` where that is the first attach point.

    Args:
        decoder: The generator, read.
        guidance: Its settings.
        first: The first attach point.

    Raises:
        AttachPointError, OptionError: If there is no such stage, or the first branch leaves in front of it.
    """
    place = None if guidance is None else guidance.key_after
    if place is None:
        return None
    if isinstance(place, str):
        stage = describe_stage(decoder, place)
    elif not 1 <= place <= len(decoder.stages):
        raise OptionError(
            f"asked for guidance keys after stage {place}; found stages 1 to {len(decoder.stages)}. Choose "
            "one at or before the first attach point, or leave key_after out.",
            place,
        )
    else:
        stage = decoder.stages[place - 1]
    cut, (attached, earliest) = decoder.cut_after(stage), first
    if cut.position > earliest.position:
        raise OptionError(
            f"asked for guidance keys after {stage.path!r}; found that the first branch leaves at "
            f"{attached.path!r}, in front of it, so that its route does not compute them. Choose a stage at "
            "or before the first attach point, or leave key_after out.",
            place,
        )
    return None if cut.feature is earliest.feature else cut


def find_taps(split: SplitGenerator, guidance: Guidance) -> Taps:
    """Find out what keys and values of a split generator look like.

    Args:
        split: The generator in pieces.
        guidance: Its settings.

    Raises:
        AttachPointError, OptionError: If there is no such stage for values.
        BankError: If keys and values do not divide into the same patches, a key function gives no keys, or
            the keys' feature is the same for all inputs.
    """
    value_cut = _value_cut(split.decoder, guidance)
    shape = value_cut.feature.meta["shape"]
    key = guidance.key if callable(guidance.key) else None
    args, kwargs = split.example
    with torch.no_grad(), unobserved(split.generator):
        key_feature = split.begin(cloned(args), cloned(kwargs)).key_feature
        if key is not None:
            key_feature = keys_of(key, args, kwargs, len(key_feature), len(shape) - 2)
    key_node = (split.key_cut or split.cuts[0]).feature
    if split.key_cut is not None and split.any_batch and key_node not in split.batched:
        raise BankError(
            f"asked for guidance keys after {guidance.key_after!r}; found that its output is the same for "
            "all inputs. Choose a later stage.",
            guidance,
        )
    key_shape = tuple(key_feature.shape[1:])
    patch = guidance.patch if key is None else (1,) * (len(shape) - 2)
    for size, side, step in zip(shape[2:], key_shape[1:], patch, strict=True):
        if side % step or size % (side // step):
            raise BankError(
                f"asked for guidance in patches of {patch}; found keys from a feature of {key_shape[1:]} and "
                f"values of {tuple(shape[2:])}, which do not divide into the same patches. Choose another "
                "patch, key_after or value_after.",
                guidance,
            )
    guide = GuideShape(int(shape[1]), tuple(shape[2:]), guidance.inject or "input")
    return Taps(value_cut, guidance.value_after == WHOLE_IMAGE, key_node, key, key_shape, patch, guide)


def _value_cut(decoder: Decoder, guidance: Guidance) -> Cut:
    place = guidance.value_after
    if place == WHOLE_IMAGE:
        return Cut(len(decoder.recording.nodes) - 1, decoder.image, (), ())
    if isinstance(place, str):
        return decoder.cut_after(describe_stage(decoder, place))
    index = (len(decoder.stages) + 1) // 2 if place is None else place
    if not 1 <= index < len(decoder.stages):
        raise OptionError(
            f"asked for guidance values after stage {index}; found stages 1 to {len(decoder.stages)}, of "
            "which the last one has no map for a branch to use. Choose another, or value_after='image'.",
            index,
        )
    return decoder.cut_after(decoder.stages[index - 1])
