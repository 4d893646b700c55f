"""What a bank was made from, and whether that is what it shall guide."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from retroexit.errors import BankError

__all__ = ["Provenance", "check_provenance"]


@dataclass(frozen=True)
class Provenance:
    """Where keys and values come from; what is ``None`` is unknown, and fits everything.

    Attributes:
        fingerprint: Of the backbone.
        key_tap: What keys are cut from, or the function that gives them.
        value_tap: What values are cut from.
        patch: Size of a key's patch.
        key_width: Numbers of a key.
        value_patch: Size of a value's patch.
        value_channels: Channels of a value.
    """

    fingerprint: str | None = None
    key_tap: str | None = None
    value_tap: str | None = None
    patch: tuple[int, ...] | None = None
    key_width: int | None = None
    value_patch: tuple[int, ...] | None = None
    value_channels: int | None = None


_WORDS = {
    "fingerprint": "backbone",
    "key_tap": "keys from",
    "value_tap": "values from",
    "patch": "key patches of",
    "key_width": "numbers per key:",
    "value_patch": "value patches of",
    "value_channels": "channels per value:",
}


def check_provenance(found: Provenance, wanted: Provenance, what: Any, whose: str = "the bank") -> None:
    """Compare what a bank is made from with what it shall serve.

    Args:
        found: Of the bank.
        wanted: Of the wrapped generator.
        what: The bank, for the error.
        whose: What to call it there.

    Raises:
        BankError: If both know something that differs; the first such thing is named.
    """
    for field in fields(Provenance):
        has, needs = getattr(found, field.name), getattr(wanted, field.name)
        if has is None or needs is None or has == needs:
            continue
        raise BankError(
            f"asked to guide a generator with {whose}; found {_WORDS[field.name]} {has!r}, this one has "
            f"{needs!r}. Build a bank for it, or wrap it with the guidance of the bank.",
            what,
        )
