"""The guiding database of the paper (section 3.3): patches, their thinning, and the bank that holds them."""

from retroexit.guidance.bank import GuidanceBank, Retrieved
from retroexit.guidance.first_order import with_slopes
from retroexit.guidance.patches import cut, glue
from retroexit.guidance.sampling import central_points, coverage, farthest_points, random_points, thin

__all__ = [
    "GuidanceBank",
    "Retrieved",
    "central_points",
    "coverage",
    "cut",
    "farthest_points",
    "glue",
    "random_points",
    "thin",
    "with_slopes",
]
