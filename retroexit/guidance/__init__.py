"""Guidance by retrieval (paper, section 3.3). May import `retroexit.branch` and what lies below it."""

from retroexit.guidance.bank import GuidanceBank, cut, glue
from retroexit.guidance.building import build_bank, with_slopes
from retroexit.guidance.sampling import coverage, farthest_points, thin

__all__ = ["GuidanceBank", "build_bank", "coverage", "cut", "farthest_points", "glue", "thin", "with_slopes"]
