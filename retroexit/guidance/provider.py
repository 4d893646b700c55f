"""Settings of guidance, the source of keys and values, and the guides of a batch (paper, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from retroexit.branch.branch import GuideShape
from retroexit.core.identity import fingerprint
from retroexit.core.nested import cloned
from retroexit.errors import BankError, OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.sampling import Thinning
from retroexit.retrieval import SearchResult
from retroexit.split.split import Begun, SplitGenerator
from retroexit.stages.decoder import Cut, Decoder
from retroexit.stages.stage import Stage
from retroexit.tracing.record import unobserved

_IMAGE = "image"

KeyFunction = Callable[..., Tensor]
"""Returns the key of every input, ``(N, D)``, from the generator's arguments."""


@dataclass(frozen=True)
class Guidance:
    """Settings of guidance by retrieval (paper section 3.3).

    A bank holds *patches*, with keys cut from a feature of the backbone (section 4.1), or *frames*, with one key per
    input from a function (section 4.2). Settings left open are taken from the adapter, then from the defaults.

    Attributes:
        value_after: Stage whose output the values are cut from, by number or path, or ``"image"``. Default: the middle
            stage for patches; the image for frames and with order 1.
        key_after: Stage whose output the keys are cut from, by number or path. Default: the first attach point, which
            it must not follow.
        key: Function that makes a bank of frames: called with the generator's arguments, it returns the keys ``(N,
            D)``. ``False`` for patches whatever the adapter says. Not saved: pass it to `retroexit.load` again.
        patch: Height and width of a key's patch; not for frames. The paper's OASIS bank uses ``(1, 1)``.
        inject: Pass the guide to each branch's ``"input"`` (section 4.1) or to ``"every_stage"`` of it (section 4.2).
            Default: the former for patches, the latter for frames and with order 1.
        order: 0 for the value of the nearest key as in the paper; 1 to follow the query between keys by a linear map
            (`with_slopes`), for values of few numbers, such as the image.
        size: Number of pairs after thinning.
        thin: ``"fps"`` (farthest points, section 4.1), ``"kmeans"``, ``"random"`` or ``"none"``.
        retriever: Name of the search back-end.

    Raises:
        OptionError: If a setting is out of range, or ``key`` comes with ``key_after`` or a ``patch``.
    """

    value_after: int | str | None = None
    key_after: int | str | None = None
    key: KeyFunction | Literal[False] | None = None
    patch: tuple[int, ...] = (1, 1)
    inject: Literal["input", "every_stage"] | None = None
    order: Literal[0, 1] = 0
    size: int = 1024
    thin: Thinning = "fps"
    retriever: str = "exact"

    def __post_init__(self) -> None:
        if self.inject not in (None, "input", "every_stage"):
            raise OptionError(f"inject must be 'input' or 'every_stage', got {self.inject!r}")
        if self.order not in (0, 1):
            raise OptionError(f"order must be 0 or 1, got {self.order!r}")
        if self.size < 1:
            raise OptionError(f"size must be >= 1, got {self.size}")
        if self.key not in (None, False) and not callable(self.key):
            raise OptionError(f"key must be a function of the generator's arguments to (N, D), got {self.key!r}")
        if self.key and self._names_patches:
            other = f"patch={self.patch}" if self.key_after is None else f"key_after={self.key_after!r}"
            raise OptionError(
                f"key must not be combined with {other}: a key of a whole input is not cut from a feature. "
                "Remove one of them."
            )

    @property
    def _names_patches(self) -> bool:
        return self.key_after is not None or max(self.patch) > 1

    def completed(
        self, key: KeyFunction | None = None, key_after: int | str | None = None, value_after: int | str | None = None
    ) -> Guidance:
        """Fill in what is left open: from an adapter's key function and stages, then by default."""
        function = None if self.key is False or self._names_patches else self.key or key
        in_image = function is not None or self.order == 1
        stage = self.value_after
        if stage is None and not self.order:  # a stage that an adapter names has too many numbers for slopes
            stage = value_after
        return replace(
            self,
            key=function,
            key_after=key_after if function is None and self.key_after is None else self.key_after,
            value_after=_IMAGE if stage is None and in_image else stage,
            inject=self.inject or ("every_stage" if in_image else "input"),
        )


@dataclass(frozen=True)
class Taps:
    """Keys and values of one wrapped generator."""

    value_cut: Cut  # cut after the map that values are cut from
    gives_image: bool  # whether that map is the backbone's image
    key_node: fx.Node  # node of the feature that keys are cut from, if no function returns them
    key: KeyFunction | None  # returns one key per input, if the bank holds frames
    key_shape: tuple[int, ...]  # shape (D, ...) of the map that keys are cut from, for one sample
    patch: tuple[int, ...]  # size of a key's patch
    guide: GuideShape  # shape of the guide, for the branches

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


def key_name(key: KeyFunction) -> str:
    """Name a key function as a saved model records it: module and qualified name."""
    named: Any = key
    while hasattr(named, "func"):  # functools.partial
        named = named.func
    if not hasattr(named, "__qualname__"):
        named = type(named)
    return f"{named.__module__}.{named.__qualname__}"


@torch.no_grad()
def _keys_of(key: KeyFunction, args: Any, kwargs: Any, count: int, dims: int, width: int | None = None) -> Tensor:
    """Call a key function for N = ``count`` inputs; return a map of one location, ``(N, D, 1, 1)``."""
    expected = f"({count}, {'D' if width is None else width})"
    try:
        keys = key(*args, **kwargs)
    except Exception as error:
        problem = f"raised {type(error).__name__}: {error}. It is called with the generator's own arguments."
        raise BankError(f"the key function {key_name(key)!r} {problem}") from error
    problem = ""
    if not isinstance(keys, Tensor) or not keys.is_floating_point():
        kind = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
        problem = f"a floating-point tensor {expected}, got {kind}"
    elif keys.dim() != 2 or len(keys) != count or not keys.shape[1] or width not in (None, keys.shape[1]):
        problem = f"one row of numbers per input, {expected}, got {tuple(keys.shape)}"
    if problem:
        raise BankError(f"the key function {key_name(key)!r} must return {problem}")
    return keys.detach().reshape(*keys.shape, *(1,) * dims)  # (N, D) -> (N, D, 1, 1)


def tap_paths(guidance: Guidance | None) -> list[str]:
    """List the module paths named by ``key_after`` and ``value_after``."""
    taps = () if guidance is None else (guidance.key_after, guidance.value_after)
    return [tap for tap in taps if isinstance(tap, str) and tap != _IMAGE]


def find_key_cut(decoder: Decoder, guidance: Guidance | None, first: tuple[Stage, Cut]) -> Cut | None:
    """Cut after the stage that keys come from; ``None`` if that is the first attach point."""
    place = None if guidance is None else guidance.key_after
    if place is None:
        return None
    if isinstance(place, str):
        stage = decoder.describe(place)
    elif not 1 <= place <= len(decoder.stages):
        raise OptionError(f"key_after must be a stage from 1 to {len(decoder.stages)}, got {place}")
    else:
        stage = decoder.stages[place - 1]
    cut, (attached, earliest) = decoder.cut(stage), first
    if cut.position > earliest.position:
        raise OptionError(
            f"key_after must be at or before the first attach point {attached.path!r}, got {stage.path!r}: "
            "the first route does not compute it"
        )
    return None if cut.feature is earliest.feature else cut


def find_taps(split: SplitGenerator, guidance: Guidance) -> Taps:
    """Determine the keys and values of a split generator."""
    value_cut = _find_value_cut(split.decoder, guidance)
    shape = value_cut.feature.meta["shape"]
    key = guidance.key if callable(guidance.key) else None
    args, kwargs = split.example
    with torch.no_grad(), unobserved(split.generator):
        key_feature = split.begin(cloned(args), cloned(kwargs)).key_feature
        if key is not None:
            key_feature = _keys_of(key, args, kwargs, len(key_feature), len(shape) - 2)
    key_node = (split.key_cut or split.cuts[0]).feature
    if split.key_cut is not None and split.any_batch and key_node not in split.batched:
        raise BankError(f"the output of key_after={guidance.key_after!r} is the same for all inputs. Name a later one.")
    key_shape = tuple(key_feature.shape[1:])
    patch = guidance.patch if key is None else (1,) * (len(shape) - 2)
    for size, side, step in zip(shape[2:], key_shape[1:], patch, strict=True):
        if side % step or size % (side // step):
            raise BankError(
                f"keys from a map {key_shape[1:]} and values from a map {tuple(shape[2:])} do not divide "
                f"into the same patches of {patch}. Choose another patch, key_after or value_after."
            )
    guide = GuideShape(int(shape[1]), tuple(shape[2:]), guidance.inject or "input")
    return Taps(value_cut, guidance.value_after == _IMAGE, key_node, key, key_shape, patch, guide)


def _find_value_cut(decoder: Decoder, guidance: Guidance) -> Cut:
    place = guidance.value_after
    if place == _IMAGE:
        return Cut(len(decoder.recording.nodes) - 1, decoder.image, (), ())
    if isinstance(place, str):
        return decoder.cut(decoder.describe(place))
    count = len(decoder.stages)
    index = (count + 1) // 2 if place is None else place
    if not 1 <= index < count:
        raise OptionError(f"value_after must be 'image' or a stage before stage {count}, got {index}")
    return decoder.cut(decoder.stages[index - 1])


class GuideProvider:
    """Owns the guidance bank and looks up guides in it.

    Attributes:
        taps: Where keys and values come from; ``None`` without guidance or before the generator is recorded.
    """

    def __init__(self) -> None:
        self.taps: Taps | None = None
        self._generator: nn.Module | None = None
        self._bank: GuidanceBank | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Taps belong to one recording: a copy takes those of its own.
        return {"taps": None, "_generator": None, "_bank": self._bank}

    @property
    def bank(self) -> GuidanceBank | None:
        """The guidance bank; compared with the generator as soon as that is recorded, else `BankError`."""
        return self._bank

    @bank.setter
    def bank(self, bank: GuidanceBank | None) -> None:
        if self._generator is not None:
            self.check(bank)
        self._bank = bank

    def attach(self, generator: nn.Module, taps: Taps | None) -> None:
        """Take the taps of a recorded generator; changes nothing if the bank does not fit them (`BankError`)."""
        before = (self._generator, self.taps)
        self._generator, self.taps = generator, taps
        try:
            self.check(self._bank)
        except BankError:
            self._generator, self.taps = before
            raise

    def check(self, bank: GuidanceBank | None) -> None:
        """Raise `BankError` for a bank of another backbone, taps or patches, and for one that no branch uses."""
        if bank is None:
            return
        if self.taps is None:
            raise BankError(
                "a bank needs branches that take a guide, but the generator was wrapped without guidance. Pass "
                "guidance=... to retroexit.wrap."
            )
        assert self._generator is not None
        # Hashing all weights takes a while; it is only done where there is a fingerprint to compare with.
        weights = None if bank.meta.get("fingerprint") is None else fingerprint(self._generator)
        bank.check_origin(fingerprint=weights, **self.taps.origin())

    def retrieve(self, begun: Begun, rows: Tensor | None = None) -> SearchResult:
        """Search the bank for the nearest keys of a batch, or of some rows of it."""
        return self._required_bank().search(self._query(begun, rows))

    def guide(self, begun: Begun, rows: Tensor | None = None, retrieved: SearchResult | None = None) -> Tensor | None:
        """Glue guides ``(R, C, ...)`` of a batch, or of some rows of it; ``None`` where branches take none.

        ``retrieved`` is the result of `retrieve` for the whole batch, if there is one. No bank is a `BankError`.
        """
        if self.taps is None or (rows is not None and not len(rows)):
            return None
        bank = self._required_bank()
        if retrieved is None:
            return bank.guide(self._query(begun, rows)).to(begun.key_feature)
        ids = retrieved.ids if rows is None else retrieved.ids[rows.to(retrieved.ids.device)]
        query = self._query(begun, rows) if bank.order else None
        return bank.glue(ids, feature=query).to(begun.key_feature)

    def search_macs(self) -> int:
        """MACs of the search for one sample, counted as exact search."""
        if self._bank is None or self.taps is None:
            return 0
        return self._bank.macs_per_search(self.taps.queries)

    def _query(self, begun: Begun, rows: Tensor | None = None) -> Tensor:
        assert self.taps is not None
        query = self.taps.query(begun.key_feature, begun.args, begun.kwargs)
        return query if rows is None else query[rows]

    def _required_bank(self) -> GuidanceBank:
        if self._bank is None:
            raise BankError(
                "this branch needs a guide, but there is no guidance bank. Run retroexit.fit, or set model.bank."
            )
        return self._bank
