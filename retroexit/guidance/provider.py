"""Look up the guides of a batch (paper section 3.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from retroexit.core.identity import fingerprint
from retroexit.errors import BankError
from retroexit.guidance.bank import GuidanceBank, Retrieved
from retroexit.guidance.taps import Taps
from retroexit.split.split import Begun

__all__ = ["GuideProvider"]


class GuideProvider:
    """Owns the guidance bank and knows where its keys and values come from.

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
        """The guidance bank; compared with the generator as soon as that is recorded.

        Raises:
            BankError: On setting a bank that does not fit the generator, its taps or its patches.
        """
        return self._bank

    @bank.setter
    def bank(self, bank: GuidanceBank | None) -> None:
        if self._generator is not None:
            self.check(bank)
        self._bank = bank

    def attach(self, generator: nn.Module, taps: Taps | None) -> None:
        """Take the taps of a recorded generator.

        Raises:
            BankError: If the bank does not fit them; then nothing changes.
        """
        before = (self._generator, self.taps)
        self._generator, self.taps = generator, taps
        try:
            self.check(self._bank)
        except BankError:
            self._generator, self.taps = before
            raise

    def check(self, bank: GuidanceBank | None) -> None:
        """Refuse a bank that was made from another backbone, other taps or other patches.

        Raises:
            BankError: If it was, or if no branch takes a guide.
        """
        if bank is None:
            return
        if self.taps is None:
            raise BankError(
                "a bank needs branches that take a guide, but the generator was wrapped without guidance. Pass "
                "guidance=... to retroexit.wrap.",
                bank,
            )
        assert self._generator is not None
        # Hashing all weights takes a while; it is only done where there is a fingerprint to compare with.
        weights = None if bank.meta.get("fingerprint") is None else fingerprint(self._generator)
        bank.check_origin(fingerprint=weights, **self.taps.origin())

    def retrieve(self, begun: Begun, rows: Tensor | None = None) -> Retrieved:
        """Search the bank for the nearest keys of a batch, or of some rows of it.

        Raises:
            BankError: If there is no bank yet.
        """
        return self._needed_bank().search(self._query(begun, rows))

    def guide(
        self, begun: Begun, rows: Tensor | None = None, retrieved: Retrieved | None = None
    ) -> Tensor | None:
        """Glue the guides of a batch, or of some rows of it; ``None`` where branches take none.

        Args:
            begun: The batch at the first cut.
            rows: Rows of the batch, int64 ``(R,)``; ``None`` for all.
            retrieved: What was found for the whole batch, where it has been searched already.

        Returns:
            Guides, ``(R, C, ...)``.

        Raises:
            BankError: If there is no bank yet.
        """
        if self.taps is None or (rows is not None and not len(rows)):
            return None
        bank = self._needed_bank()
        query = self._query(begun, rows) if retrieved is None or bank.order else None
        if retrieved is None:
            assert query is not None
            return bank.guide(query).to(begun.key_feature)
        ids = retrieved.ids if rows is None else retrieved.ids[rows.to(retrieved.ids.device)]
        return bank.glue(ids, feature=query).to(begun.key_feature)

    def search_macs(self) -> int:
        """MACs of the search for one sample, counted as exact search."""
        return 0 if self._bank is None or self.taps is None else self.taps.search_macs(self._bank)

    def _query(self, begun: Begun, rows: Tensor | None = None) -> Tensor:
        assert self.taps is not None
        query = self.taps.query(begun.key_feature, begun.args, begun.kwargs)
        return query if rows is None else query[rows]

    def _needed_bank(self) -> GuidanceBank:
        if self._bank is None:
            raise BankError(
                "this branch needs a guide, but there is no guidance bank. Run retroexit.fit, or set model.bank.",
                self,
            )
        return self._bank
