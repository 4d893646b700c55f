"""Weights that make all terms of a loss pull equally hard (paper sections 4.1 and 4.2).

The paper chose its coefficients "in order to equalize the losses' contribution" (equation 3) and "to
harmonize the losses' effects" (equation 4). Here that is measured: during the first steps, the length of the
gradient that each term has with respect to the image. From then on the weights stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from retroexit.errors import CheckpointError

__all__ = ["Equaliser"]

_LIMIT = 1e4  # a term that hardly pulls at first may do so later


class Equaliser:
    """Measures how hard every term pulls at the image, and evens that out.

    The pull of a term is the root mean square, over images and steps, of the length of its gradient with
    respect to one image. Its factor is the geometric mean of all pulls divided by its own, so that the
    product of all factors is 1. A term without any gradient keeps the factor 1.

    Args:
        names: Names of the terms.
        steps: For how many steps to measure, ``>= 1``.
    """

    def __init__(self, names: Sequence[str], steps: int = 50) -> None:
        self.names, self.steps = list(names), steps
        self._squares = torch.zeros(len(self.names), dtype=torch.float64)
        self._count = 0

    def observe(self, values: Mapping[str, Tensor], image: Tensor) -> None:
        """Take in one step, as long as measuring goes on.

        Args:
            values: The terms, scalars: means over the images.
            image: What they were computed from, ``(N, C, H, W)``; without gradient, nothing is measured.
        """
        if self._count >= self.steps or not image.requires_grad or not torch.is_grad_enabled():
            return
        squares = torch.stack([_pull(values[name], image) for name in self.names])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(squares)
            squares = squares / dist.get_world_size()
        squares = squares.cpu()
        if bool(torch.isfinite(squares).all()):
            self._squares += squares
            self._count += 1

    def factor(self, name: str) -> float:
        """Say by what the weight of a term is multiplied, as far as is known by now."""
        pulls = dict(zip(self.names, self._squares.sqrt().tolist(), strict=True))
        felt = [math.log(pull) for pull in pulls.values() if pull > 0]
        if not felt or pulls[name] == 0:
            return 1.0
        factor = math.exp(sum(felt) / len(felt) - math.log(pulls[name]))
        return min(max(factor, 1 / _LIMIT), _LIMIT)

    def state(self) -> dict[str, Tensor]:
        """Give what was measured, for a checkpoint."""
        return {"squares": self._squares.clone(), "count": torch.tensor(self._count)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: If it was measured on other terms.
        """
        squares, count = tensors.get("squares"), tensors.get("count")
        if squares is None or count is None or squares.shape != self._squares.shape:
            found = "nothing" if squares is None else f"{squares.numel()} terms"
            raise CheckpointError(
                f"asked to go on with equalised weights of {', '.join(self.names)}; found {found} measured. "
                "Use another folder, or the losses it began with.",
                tensors,
            )
        self._squares, self._count = squares.to("cpu", torch.float64).clone(), int(count)


def _pull(value: Tensor, image: Tensor) -> Tensor:
    """Mean square length of a term's gradient with respect to one image; the term is the images' mean."""
    if not value.requires_grad:
        return torch.zeros((), dtype=torch.float64, device=image.device)
    (gradient,) = torch.autograd.grad(value, image, retain_graph=True, materialize_grads=True)
    # (1/N) sum_i |N g_i|^2, where g_i is the gradient of the mean at image i: free of the batch size.
    return len(image) * gradient.double().square().sum()
