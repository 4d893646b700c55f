"""Rows of images for the report that show which exit made which part of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retroexit.evaluation.strips import Strip
from retroexit.regions.pictures import exit_map_picture

if TYPE_CHECKING:
    from retroexit.evaluation.measure import Measurement

__all__ = ["region_strips"]


@torch.no_grad()
def region_strips(run: Measurement, indices: Sequence[int], thresholds: Sequence[float]) -> list[Strip]:
    """Render samples with exits inside the image: the backbone's image, ours, and the heat map of exits.

    Args:
        run: What is being measured.
        indices: Samples.
        thresholds: Largest loss to accept, one column pair each.

    Returns:
        One strip per sample; none where the model has no regions.
    """
    router = run.model.regions
    if router is None:
        return []
    strips, exits = [], len(run.model.branches) + 1
    for index in indices:
        args, kwargs = run.samples.gather([index])
        whole = run.limits.to_signed(run.model.image(run.model.route(args, kwargs)))[0]
        shown = [("backbone", _pixels(whole))]
        for threshold in thresholds:
            (layout,), canvas = router.plan(run.model, *args, threshold=threshold, **kwargs)
            output, where = router.route(run.model, args, kwargs, threshold, "image")
            image = run.limits.to_signed(run.model.image(output))[0]
            share = (layout.macs + canvas.overhead) / canvas.prices.fixed(exits - 1)
            loss = float(run.metric(image[None], whole[None]))
            shown.append((f"{loss:.3f} with {100 * share:.0f} % of the compute", _pixels(image)))
            used = " and ".join(str(n) for n in sorted({*where.flatten().tolist()}))
            heat = exit_map_picture(image, where[0], canvas.edges, exits)
            shown.append((f"exits {used} of {exits} at threshold {threshold:.3f}", heat))
        strips.append(Strip(f"exits inside the image (sample {index}), darker is deeper", shown, None))
    return strips


def _pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    """Turn ``(C, H, W)`` in [-1, 1] into ``(H, W, 3)`` bytes."""
    image = image.detach().float().cpu()
    image = image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
    return np.asarray(
        ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), dtype=np.uint8
    )
