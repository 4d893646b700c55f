"""How branches are guided: the part of a wrap's settings that the bank and the branches share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from retroexit.errors import OptionError

__all__ = ["WHOLE_IMAGE", "Guidance"]

WHOLE_IMAGE = "image"
"""Value of ``value_after`` that stands for the backbone's image."""


@dataclass(frozen=True)
class Guidance:
    """Settings of guidance by retrieval (paper section 3.3).

    Two kinds of bank: of *patches*, whose keys are cut from a feature of the backbone (section 4.1), and of
    whole *frames*, where a function gives one key per input (section 4.2). What is left open here an adapter
    may fill in, and then the defaults below do.

    Attributes:
        value_after: Stage whose output the values are cut from, by number or path, or ``"image"`` for the
            backbone's image. By default the backbone's middle stage for patches, the image for frames and for
            patches of order 1.
        key_after: Stage whose output the keys are cut from, by number or path; at or before the first attach
            point, since every route has to compute it. By default the first attach point.
        key: Function that makes a bank of frames: it is called with the generator's own arguments and returns
            the key of every input, ``(N, D)``. ``False`` for patches even where an adapter knows a key
            function. It is not saved with a model: hand it to `retroexit.load` again.
        patch: Height and width of a key's patch in the feature that keys are cut from. The paper's OASIS bank
            uses single locations, ``(1, 1)``. Frames have none.
        inject: ``"input"`` hands the guide to each branch's input (section 4.1), ``"every_stage"`` to each
            branch module's (section 4.2). By default the former for patches, the latter for frames and for
            patches of order 1.
        order: 0 for the paper's guide, which holds what the patch of the nearest key held; 1 for one that
            follows the query between the keys, by a linear map fitted around each of them (`with_slopes`). A
            few hundred pairs say more then than 100,000 plain ones. Values must be of few numbers, as the
            image's are.
        size: Number of pairs after thinning.
        thin: ``"fps"`` (farthest points, section 4.1), ``"kmeans"``, ``"random"`` or ``"none"``.
        retriever: Name of the search back-end.

    Raises:
        OptionError: If a setting is out of range, or ``key`` stands beside ``key_after`` or a ``patch``.
    """

    value_after: int | str | None = None
    key_after: int | str | None = None
    key: Callable[..., Tensor] | Literal[False] | None = None
    patch: tuple[int, ...] = (1, 1)
    inject: Literal["input", "every_stage"] | None = None
    order: Literal[0, 1] = 0
    size: int = 1024
    thin: Literal["fps", "kmeans", "random", "none"] = "fps"
    retriever: str = "exact"

    def __post_init__(self) -> None:
        if self.inject not in (None, "input", "every_stage"):
            raise OptionError(
                f"asked for inject={self.inject!r}; it is 'input' or 'every_stage'.", self.inject
            )
        if self.order not in (0, 1):
            raise OptionError(f"asked for guidance of order={self.order!r}; it is 0 or 1.", self.order)
        if self.size < 1:
            raise OptionError(f"asked for a bank of size={self.size}; found no integer >= 1.", self.size)
        if self.key not in (None, False) and not callable(self.key):
            raise OptionError(
                f"asked for guidance with key={self.key!r}; found no function. Pass one that takes the "
                "generator's arguments and returns keys (N, D).",
                self.key,
            )
        if self.key and (self.key_after is not None or max(self.patch) > 1):
            other = f"key_after={self.key_after!r}" if self.key_after is not None else f"patch={self.patch}"
            raise OptionError(
                f"asked for guidance with a key function and {other}; found that a key of a whole input is "
                "cut from no feature. Leave one of them out.",
                self,
            )

    def completed(
        self,
        key: Callable[..., Tensor] | None = None,
        key_after: int | str | None = None,
        value_after: int | str | None = None,
    ) -> Guidance:
        """Fill in what is left open: from an adapter's hints, then by default.

        Args:
            key: The adapter's key function; it makes a bank of frames unless patches are asked for, by
                ``key=False``, ``key_after`` or ``patch``.
            key_after: The adapter's stage for keys of patches.
            value_after: The adapter's stage for values.

        Returns:
            Settings with ``inject`` decided and ``key`` a function or ``None``.
        """
        wants_patches = self.key is False or self.key_after is not None or max(self.patch) > 1
        own = None if wants_patches else self.key or key
        # A stage that an adapter names has too many numbers for slopes.
        hints = (self.value_after, None if self.order else value_after)
        in_image = own is not None or self.order == 1
        return replace(
            self,
            key=own,
            key_after=self.key_after if own is not None or self.key_after is not None else key_after,
            value_after=next((v for v in hints if v is not None), WHOLE_IMAGE if in_image else None),
            inject=self.inject or ("every_stage" if in_image else "input"),
        )
