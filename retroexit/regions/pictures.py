"""Heat maps of the exits inside images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retroexit.regions.tiles import spread

__all__ = ["exit_colour", "exit_map_picture"]

# From pale yellow (cheap) to dark red (the backbone), as heat maps of effort are read.
_COLOURS = np.array([[255, 245, 170], [254, 178, 76], [240, 80, 50], [140, 0, 40]], dtype=np.float64)


def exit_colour(exit: int, exits: int) -> tuple[int, int, int]:
    """Colour of an exit, from 1; the last of ``exits`` is the backbone."""
    place = (exit - 1) / max(1, exits - 1) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    colour = _COLOURS[low] + (place - low) * (_COLOURS[low + 1] - _COLOURS[low])
    red, green, blue = (round(value) for value in colour)
    return red, green, blue


def exit_map_picture(
    image: Tensor, exit_map: Tensor, edges: Sequence[Sequence[int]], exits: int, strength: float = 0.6
) -> npt.NDArray[np.uint8]:
    """Lay the exits that made an image over it in colour.

    Args:
        image: The image ``(3, H, W)`` or ``(1, H, W)`` in [-1, 1].
        exit_map: Exit of every tile ``(rows, columns)``, from 1, as ``model.routed`` gives it.
        edges: Where tiles begin and end, in pixels, see `retroexit.regions.tiles.edges_of`.
        exits: Number of exits, the backbone counted.
        strength: Share of the colour, the rest is the image in grey.

    Returns:
        Pixels ``(H, W, 3)``.
    """
    grey = ((image.detach().float().mean(0).clamp(-1, 1) + 1) * 127.5).cpu().numpy()[..., None]
    colours = torch.tensor([exit_colour(n, exits) for n in range(1, exits + 1)], dtype=torch.float64)
    painted = colours[spread(exit_map[None].cpu(), edges)[0] - 1].numpy()
    mixed = (1 - strength) * grey + strength * painted
    return np.asarray(mixed.round().clip(0, 255), dtype=np.uint8)
