"""Whether a generator can be wrapped with a description: at every stage, thin and at full width; saving."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retroexit.api import load, wrap
from retroexit.core.nested import tensors
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.host import cause_of
from retroexit.stages.decoder import Decoder
from retroexit.testing.case import Case, Inputs, nearly_equal

__all__ = ["check_routes"]


def check_routes(case: Case, decoder: Decoder, thin_at: Sequence[int] | None = None) -> None:
    """Wrap the generator at every stage but the last; check the exits, a batch of two, saving and loading.

    ``thin_at`` are the stages that thin branches sit at; by default all.
    """
    places = range(1, len(decoder.stages))
    full = None
    with case.found.part("at scale 1 every exit is the generator, bit for bit"):
        full = _wrap(case, places, 1.0, 1)
        if full is not None:
            _check_equal(case, full)
    thin = None
    with case.found.part("thin exits keep the output's shapes"):
        thin = _wrap(case, thin_at or places, case.scale, case.min_channels)
        if thin is not None:
            _check_thin(case, thin, full)
    if thin is None:
        return
    _check_batch(case, thin)
    with (
        case.found.part("saved and loaded, every exit gives the same"),
        tempfile.TemporaryDirectory() as folder,
    ):
        thin.save(folder)
        args, kwargs = case.inputs
        again = load(folder, case.generator, args, kwargs, adapter=case.known)
        for index in range(1, len(thin.branches) + 1):
            if not _same(_leave(case, again, index), _leave(case, thin, index)):
                case.found.wrong(f"exit {index} differs after saving and loading; build_stage must not vary")


def _wrap(case: Case, places: Sequence[int], scale: float, floor: int) -> EarlyExitGenerator | None:
    """Wrap at all places; where that fails, say at which of them."""
    args, kwargs = case.inputs
    options: dict[str, Any] = {"example_inputs": args, "example_kwargs": kwargs, "adapter": case.known}
    try:
        return wrap(case.generator, places, scale, min_channels=floor, **options)
    except Exception as error:
        causes = {}
        for place in places:
            try:
                wrap(case.generator, [place], scale, min_channels=floor, **options)
            except Exception as single:
                causes[place] = cause_of(single)
        if not causes:
            raise error
        for place, cause in causes.items():
            case.found.wrong(f"no branch after stage {place} at scale {scale:g}: {cause}")
        return None


def _check_equal(case: Case, full: EarlyExitGenerator) -> None:
    want = case.render()
    for exit in full.exits:
        if not _same(_leave(case, full, exit.index), want):
            case.found.wrong(
                f"exit {exit.index} after {exit.attach_at} is not the generator at scale 1; attach "
                "elsewhere, or leave random draws out of the stages"
            )


def _check_thin(case: Case, thin: EarlyExitGenerator, full: EarlyExitGenerator | None) -> None:
    want = [tuple(tensor.shape) for tensor in tensors(case.render())]
    for exit in thin.exits:
        given = tensors(_leave(case, thin, exit.index))
        if [tuple(tensor.shape) for tensor in given] != want:
            case.found.wrong(
                f"exit {exit.index} gives {[tuple(t.shape) for t in given]}; the generator {want}"
            )
        elif not all(bool(torch.isfinite(t).all()) for t in given if t.is_floating_point()):
            case.found.wrong(f"exit {exit.index} gives NaN or infinity before any training")
    own = {exit.attach_at: exit.parameters for exit in full.exits} if full is not None else {}
    if not own or any(exit.parameters < own[exit.attach_at] for exit in thin.exits if exit.attach_at):
        return
    pinned = dict.fromkeys(cause for exit in thin.exits for cause in exit.pinned)
    case.found.wrong(
        f"no branch shrinks at scale {case.scale:g} with min_channels={case.min_channels}; "
        + ("; ".join(pinned) or "test a wider generator, or pass a smaller scale or min_channels")
    )


def _check_batch(case: Case, thin: EarlyExitGenerator) -> None:
    """Compare every exit for two samples with the same exit for each of them."""
    claim = "a batch of two equals two of one"
    if case.pair is None:
        return
    if not thin.split.any_batch:
        case.found.skip(claim, "the generator's own forward fixes the batch size")
        return
    compare = _divided if case.is_random() else _separate
    with case.found.part(claim):
        for index in range(1, len(thin.branches) + 1):
            both, alone = compare(case, thin, index, case.pair)
            if not nearly_equal(both, alone):
                gap = float((both - alone).abs().max())
                case.found.wrong(
                    f"exit {index} of two samples differs from each alone by up to {gap:.2g}; no sample may "
                    "depend on its batch"
                )


def _separate(case: Case, thin: EarlyExitGenerator, index: int, pair: Inputs) -> tuple[Tensor, Tensor]:
    rows = [case.image_in(_leave(case, thin, index, case.row(pair, i))) for i in (0, 1)]
    return case.image_in(_leave(case, thin, index, pair)), torch.cat(rows)


def _divided(case: Case, thin: EarlyExitGenerator, index: int, pair: Inputs) -> tuple[Tensor, Tensor]:
    """Divide the batch at the cut, so that both ways go on from the same random draws."""

    def run(args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        values = thin.split.start(args, kwargs)
        for cut in range(index):
            values = thin.split.advance(values, cut)
        images = []
        for rows in ([0, 1], [0], [1]):
            chosen = thin.split.select(values, torch.tensor(rows))
            crossing = [value.clone() for value in thin.split.crossing(chosen, index - 1)]
            torch.manual_seed(0)
            images.append(case.image_in(thin.branches[index - 1](*crossing)))
        return images[0], torch.cat(images[1:])

    found: tuple[Tensor, Tensor] = case.seeded(run, pair)
    return found


def _leave(case: Case, model: EarlyExitGenerator, index: int, inputs: Inputs | None = None) -> Any:
    return case.seeded(lambda args, kwargs: model.route(args, kwargs, exit=index), inputs)


def _same(a: Any, b: Any) -> bool:
    ours, theirs = tensors(a), tensors(b)
    return len(ours) == len(theirs) and all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
