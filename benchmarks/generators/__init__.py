"""Generators that other people wrote, and a few of our own with the habits that people have."""

from __future__ import annotations

from generators import checkouts, families, latent, own, published
from generators.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = (*own.ENTRIES, *latent.ENTRIES, *published.ENTRIES, *families.ENTRIES, *checkouts.ENTRIES)
