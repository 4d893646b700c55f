"""What a bank was made from, compared with the generator that it guides."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from retroexit.errors import BankError

__all__ = ["Provenance", "check_provenance"]


@dataclass(frozen=True)
class Provenance:
    """Where keys and values come from; ``None`` is unknown and matches anything.

    Attributes:
        fingerprint: Of the backbone.
        key_tap: Node that keys are cut from, or the function that returns them.
        value_tap: Node that values are cut from.
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
    "fingerprint": "the backbone of the bank",
    "key_tap": "the source of keys",
    "value_tap": "the source of values",
    "patch": "the patch of a key",
    "key_width": "numbers per key",
    "value_patch": "the patch of a value",
    "value_channels": "channels per value",
}


def check_provenance(bank: Provenance, generator: Provenance, subject: Any) -> None:
    """Compare a bank with the wrapped generator that it guides.

    Args:
        bank: Provenance of the bank.
        generator: What the generator needs.
        subject: The bank, for the error.

    Raises:
        BankError: If a known fact differs; the first one is named.
    """
    for field in fields(Provenance):
        has, needs = getattr(bank, field.name), getattr(generator, field.name)
        if has is not None and needs is not None and has != needs:
            raise BankError(
                f"{_WORDS[field.name]} must be {needs!r}, got {has!r}. Build a bank for this generator, or "
                "wrap it with the guidance of the bank.",
                subject,
            )
