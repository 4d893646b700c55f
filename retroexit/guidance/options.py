"""How branches are guided: the part of a wrap's settings that the bank and the branches share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retroexit.errors import OptionError

__all__ = ["Guidance"]


@dataclass(frozen=True)
class Guidance:
    """Settings of guidance by retrieval (paper section 3.3).

    Attributes:
        value_after: Stage whose output the values are cut from; number or path. By default the backbone's
            middle stage.
        patch: Height and width of a key's patch in the feature at the first attach point. The paper's OASIS
            bank uses single locations, ``(1, 1)``.
        inject: ``"input"`` hands the guide to each branch's input (section 4.1), ``"every_stage"`` to each
            branch module's (section 4.2).
        size: Number of pairs after thinning.
        thin: ``"fps"`` (farthest points, section 4.1), ``"random"`` or ``"none"``.
        retriever: Name of the search back-end.
    """

    value_after: int | str | None = None
    patch: tuple[int, ...] = (1, 1)
    inject: Literal["input", "every_stage"] = "input"
    size: int = 1024
    thin: Literal["fps", "random", "none"] = "fps"
    retriever: str = "exact"

    def __post_init__(self) -> None:
        if self.inject not in ("input", "every_stage"):
            raise OptionError(
                f"asked for inject={self.inject!r}; it is 'input' or 'every_stage'.", self.inject
            )
        if self.size < 1:
            raise OptionError(f"asked for a bank of size={self.size}; found no integer >= 1.", self.size)
