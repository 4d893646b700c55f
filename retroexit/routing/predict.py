"""Ask the predictor about a batch: what it reads, what it says, who is too far from what it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from retroexit.core.nested import tensors
from retroexit.errors import OptionError
from retroexit.routing.predictor import Predictor
from retroexit.split.split import SplitGenerator, Values

if TYPE_CHECKING:
    from collections.abc import Callable

    from retroexit.guidance.bank import Retrieved

__all__ = ["LossPrediction", "guide_distance", "input_map", "predict_losses", "reads_of"]


@dataclass(frozen=True, eq=False)
class LossPrediction:
    """What is known of a batch before it is routed.

    Attributes:
        predicted: Predicted loss of each branch exit, ``(N, K)``.
        far: Whether a sample is too far from the fitting set, bool ``(N,)``.
        found: What the bank holds for all samples, where the predictor reads the distance to it.
    """

    predicted: Tensor
    far: Tensor
    found: Retrieved | None = None

    @property
    def guarded(self) -> Tensor:
        """Predicted losses, infinite where a sample is too far."""
        return self.predicted.masked_fill(self.far[:, None], torch.inf)


def reads_of(predictor: nn.Module | None, source: Callable[..., Tensor] | None) -> str:
    """Tell what a predictor reads; one that does not say takes the adapter's map where there is one."""
    named = predictor.reads if isinstance(predictor, Predictor) else None
    return named or ("features" if source is None else "inputs")


@torch.no_grad()
def predict_losses(
    predictor: nn.Module,
    split: SplitGenerator,
    values: Values,
    call: tuple[Any, dict[str, Any]],
    source: Callable[..., Tensor] | None,
    search: Callable[[], Retrieved],
) -> LossPrediction:
    """Ask a predictor about a batch.

    Args:
        predictor: Gives losses ``(rows, K)``; a `Predictor` tells distances too.
        split: The generator in pieces.
        values: What crosses its first cut.
        call: The generator's inputs.
        source: Makes the predictor's map from these, where an adapter knows one.
        search: Looks the batch up in the bank.
    """
    reads, found = reads_of(predictor, source), None
    feature = split.crossing(values, 0)[0]
    given = [feature]
    if reads == "inputs":
        args, kwargs = call
        given = [input_map(args, kwargs, feature.dim() - 2) if source is None else source(*args, **kwargs)]
    elif reads == "features+distance":
        found = search()
        given.append(guide_distance(found.distances).to(feature.device))
    if isinstance(predictor, Predictor):
        losses, distance = predictor.predict_losses(*given)
    else:
        losses = predictor(*given)
        distance = losses.new_zeros(len(losses))
    size = split.batched.get(split.cuts[0].crossing[0]) or 1
    if reads != "inputs" and size > 1:  # a sample's frames leave together
        losses = losses.unflatten(0, (-1, size)).mean(dim=1)
        distance = distance.unflatten(0, (-1, size)).amax(dim=1)
    return LossPrediction(losses, distance > 1, found)


def guide_distance(squared: Tensor) -> Tensor:
    """Mean distance of a sample's patches to their guides: squared distances ``(N, ...) -> (N, 1)``."""
    return squared.clamp_min(0).sqrt().flatten(1).mean(1, keepdim=True)


def input_map(args: Any, kwargs: Any, dims: int) -> Tensor:
    """Put all tensors of a generator's inputs into one map.

    Maps are brought to the size of the largest; vectors are spread over it; other tensors are left out.

    Args:
        args: Positional inputs.
        kwargs: Keyword inputs.
        dims: Spatial axes of the map.

    Returns:
        ``(N, C, ...)``, float32.

    Raises:
        OptionError: If no input is a map or a vector.
    """
    usable = [t.float() for t in tensors((args, kwargs)) if t.dim() > 0 and not t.is_complex()]
    maps = [t for t in usable if t.dim() == dims + 2]
    vectors = [t[:, None] if t.dim() == 1 else t for t in usable if t.dim() in (1, 2) and t.dim() != dims + 2]
    if not maps and not vectors:
        raise OptionError(
            "asked for a predictor that reads the inputs; found neither a map (N, C, ...) nor a vector "
            "(N, D) among them. Use predict_from='features'.",
            (args, kwargs),
        )
    size = max((t.shape[2:] for t in maps), key=lambda s: s.numel(), default=torch.Size((1,) * dims))
    parts = [t if t.shape[2:] == size else functional.interpolate(t, tuple(size)) for t in maps]
    parts += [t[(...,) + (None,) * dims].expand(*t.shape, *size) for t in vectors]
    return torch.cat(parts, 1)
