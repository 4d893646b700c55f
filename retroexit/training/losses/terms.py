"""Terms of the loss that need no discriminator, and factors that equalise the gradients of all terms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from retroexit.core.modules import clone_module
from retroexit.core.nested import tensors
from retroexit.errors import CheckpointError, TrainingError
from retroexit.training.distributed import average

_FACTOR_LIMIT = 1e4  # a term with a tiny gradient at first may have a large one later


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of two tensors of one shape, a scalar (L_1 of equation 4)."""
    return (a.float() - b.float()).abs().mean()


class L1:
    """Mean absolute difference (L_1 of equation 4)."""

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """Compare two batches of images ``(N, C, H, W)``; returns a scalar."""
        return l1(image, target)


class Gaze:
    """Mean absolute difference of a gaze network's outputs for both images (L_GL of equation 4).

    The network takes images ``(N, C, H, W)`` in [-1, 1]; it is copied, frozen and run in eval mode.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = clone_module(network).eval().requires_grad_(False)

    def to(self, device: torch.device) -> Gaze:
        """Move the network."""
        self.network.to(device)
        return self

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """Compare two batches of images; returns a scalar. The network must be differentiable."""
        outputs = [x for x in tensors(self.network(image)) if x.is_floating_point()]
        if not outputs or (image.requires_grad and not any(x.requires_grad for x in outputs)):
            raise TrainingError(
                f"the gaze network must be differentiable from image to gaze, got "
                f"{'outputs without gradient' if outputs else 'no floating point output'} from "
                f"{type(self.network).__name__}. Pass another network as gaze=module.",
                self.network,
            )
        with torch.no_grad():
            targets = [x for x in tensors(self.network(target)) if x.is_floating_point()]
        return torch.stack([l1(a, b) for a, b in zip(outputs, targets, strict=True)]).mean()


class Equaliser:
    """Factors that give all terms a gradient of the same length (paper sections 4.1 and 4.2).

    During the first ``steps`` steps the root mean square of each term's gradient by one image is measured.
    The factor is the geometric mean over all terms divided by the term's value; 1 without gradient.
    """

    def __init__(self, names: Sequence[str], steps: int = 50) -> None:
        self.names, self.steps = list(names), steps
        self._squares = torch.zeros(len(self.names), dtype=torch.float64)
        self._count = 0

    def observe(self, values: Mapping[str, Tensor], image: Tensor) -> None:
        """Measure the terms of one step by name, means over images ``(N, C, H, W)``, which need a gradient."""
        if self._count >= self.steps or not image.requires_grad or not torch.is_grad_enabled():
            return
        squares = torch.stack([_squared_gradient(values[name], image) for name in self.names])
        average([squares])
        squares = squares.cpu()
        if bool(torch.isfinite(squares).all()):
            self._squares += squares
            self._count += 1

    def factor(self, name: str) -> float:
        """Return the factor of a term's weight, from what was measured until now."""
        lengths = dict(zip(self.names, self._squares.sqrt().tolist(), strict=True))
        logs = [math.log(length) for length in lengths.values() if length > 0]
        if not logs or lengths[name] == 0:
            return 1.0
        factor = math.exp(sum(logs) / len(logs) - math.log(lengths[name]))
        return min(max(factor, 1 / _FACTOR_LIMIT), _FACTOR_LIMIT)

    def state(self) -> dict[str, Tensor]:
        """Return the measurements, for a checkpoint."""
        return {"squares": self._squares.clone(), "count": torch.tensor(self._count)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned; raises `CheckpointError` if it was measured on other terms."""
        squares, count = state.get("squares"), state.get("count")
        if squares is None or count is None or squares.shape != self._squares.shape:
            raise CheckpointError(
                f"the checkpoint must have equalised weights of {', '.join(self.names)}, got "
                f"{'none' if squares is None else f'{squares.numel()} terms'}. Use another folder, or the "
                "losses of the first run.",
                state,
            )
        self._squares, self._count = squares.to("cpu", torch.float64).clone(), int(count)


def _squared_gradient(value: Tensor, image: Tensor) -> Tensor:
    """Mean square length of the gradient of a mean over images with respect to one image."""
    if not value.requires_grad:
        return torch.zeros((), dtype=torch.float64, device=image.device)
    (gradient,) = torch.autograd.grad(value, image, retain_graph=True, materialize_grads=True)
    # (1/N) sum_i |N g_i|^2, where g_i is the gradient of the mean at image i: independent of the batch size.
    return len(image) * gradient.double().square().sum()
