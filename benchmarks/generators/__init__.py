"""Generators that other people wrote, and a few of our own with the habits that people have."""

from __future__ import annotations

from generators import audio, checkouts, gans, latent, medical, own, segmentation
from generators.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES: tuple[Entry, ...] = (
    *own.ENTRIES,
    *latent.ENTRIES,
    *medical.ENTRIES,
    *segmentation.ENTRIES,
    *gans.ENTRIES,
    *audio.ENTRIES,
    *checkouts.ENTRIES,
)
