"""The key under which FIANCEE's frame bank stores pictures of the source face (section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["frame_key"]

ANGLES, EXPRESSION = 3, 512


def frame_key(angles: Tensor, expression: Tensor) -> Tensor:
    """Join head direction and expression to a key for a guidance bank.

    A face has one key, a map of a single location, whose value is the whole frame. The paper does not say how
    angles and expression are weighted; neither is scaled here, so bring them to comparable units first.

    Args:
        angles: Angles of the head, shape ``(N, 3)``.
        expression: Encoded expression, shape ``(N, 512)``.

    Returns:
        Keys, shape ``(N, 515, 1, 1)``, in the wider of the two dtypes.

    Raises:
        ValueError: If a shape is wrong, or the numbers of faces differ.

    Reference: paper section 4.2.
    """
    if angles.dim() != 2 or angles.shape[1] != ANGLES:
        raise ValueError(f"angles must have the shape (N, {ANGLES}), got {tuple(angles.shape)}")
    if expression.shape != (len(angles), EXPRESSION):
        raise ValueError(f"expression must have the shape {(len(angles), EXPRESSION)}, got {tuple(expression.shape)}")
    return torch.cat([angles, expression], 1)[:, :, None, None]
