"""Settings of guidance, shared by the bank and the branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from retroexit.errors import OptionError

__all__ = ["WHOLE_IMAGE", "Guidance"]

WHOLE_IMAGE = "image"
"""Value of ``value_after`` for the backbone's image."""


@dataclass(frozen=True)
class Guidance:
    """Settings of guidance by retrieval (paper section 3.3).

    There are two kinds of bank: of *patches*, with keys cut from a feature of the backbone (section 4.1), and
    of *frames*, with one key per input from a function (section 4.2). Settings left open are taken from
    the adapter's description, then from the defaults below.

    Attributes:
        value_after: Stage whose output the values are cut from, by number or path, or ``"image"`` for the
            backbone's image. Default: the backbone's middle stage for patches; the image for frames and with
            order 1.
        key_after: Stage whose output the keys are cut from, by number or path; at or before the first attach
            point. Default: the first attach point.
        key: Function that makes a bank of frames: called with the generator's own arguments, it returns the
            key of every input, ``(N, D)``. ``False`` for patches even if the adapter has a key function. It
            is not saved with a model: pass it to `retroexit.load` again.
        patch: Height and width of a key's patch; not for frames. The paper's OASIS bank uses ``(1, 1)``.
        inject: ``"input"`` passes the guide to each branch's input (section 4.1), ``"every_stage"`` to each
            branch module (section 4.2). Default: the former for patches, the latter for frames and with order
            1.
        order: 0 for the paper's guide, the value of the nearest key; 1 for a guide that follows the query
            between keys by a linear map fitted around each of them (`with_slopes`). Use it for values of few
            numbers, such as the image.
        size: Number of pairs after thinning.
        thin: ``"fps"`` (farthest points, section 4.1), ``"kmeans"``, ``"random"`` or ``"none"``.
        retriever: Name of the search back-end.

    Raises:
        OptionError: If a setting is out of range, or ``key`` comes with ``key_after`` or a ``patch``.
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
            raise OptionError(f"inject must be 'input' or 'every_stage', got {self.inject!r}", self.inject)
        if self.order not in (0, 1):
            raise OptionError(f"order must be 0 or 1, got {self.order!r}", self.order)
        if self.size < 1:
            raise OptionError(f"size must be >= 1, got {self.size}", self.size)
        if self.key not in (None, False) and not callable(self.key):
            raise OptionError(
                f"key must be a function of the generator's arguments returning (N, D), got {self.key!r}",
                self.key,
            )
        if self.key and (self.key_after is not None or max(self.patch) > 1):
            other = f"key_after={self.key_after!r}" if self.key_after is not None else f"patch={self.patch}"
            raise OptionError(
                f"key must not be combined with {other}: a key of a whole input is not cut from a feature. "
                "Remove one of them.",
                self,
            )

    def completed(
        self,
        key: Callable[..., Tensor] | None = None,
        key_after: int | str | None = None,
        value_after: int | str | None = None,
    ) -> Guidance:
        """Fill in what is left open: from an adapter's description, then by default.

        The adapter's key function is used unless ``key=False``, ``key_after`` or ``patch`` ask for patches.
        """
        patches = self.key is False or self.key_after is not None or max(self.patch) > 1
        function = None if patches else self.key or key
        # A stage that an adapter names has too many numbers for slopes.
        stages = (self.value_after, None if self.order else value_after)
        in_image = function is not None or self.order == 1
        return replace(
            self,
            key=function,
            key_after=self.key_after if function is not None or self.key_after is not None else key_after,
            value_after=next(
                (stage for stage in stages if stage is not None), WHOLE_IMAGE if in_image else None
            ),
            inject=self.inject or ("every_stage" if in_image else "input"),
        )
