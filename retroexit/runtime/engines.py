"""Run samples to the first cut, and some of them on to an exit: a model, and a bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from retroexit.core.nested import flatten, rebuild
from retroexit.errors import OptionError
from retroexit.model import EarlyExitGenerator, check_wrapped
from retroexit.routing.policy import RoutingRequest
from retroexit.routing.render import render_from
from retroexit.runtime.bundle import Bundle

__all__ = ["BundleEngine", "Engine", "ModelEngine", "Started"]


ExitChoice = tuple[float | None, int | None]
"""The threshold of a sample, or its exit."""


class Started(NamedTuple):
    """A sample at the first cut."""

    exit: int  # from 1
    state: Any
    losses: tuple[float, ...] | None = None  # predicted at the branch exits; None for an exit of the caller's


class Engine(Protocol):
    """What a scheduler runs."""

    exits: int

    def begin(self, samples: Sequence[Any], choices: Sequence[ExitChoice]) -> list[Started]:
        """Run samples to the first cut."""

    def finish(self, states: Sequence[Any], exit: int) -> list[Any]:
        """Render samples by their states at one exit; returns their images ``(C, ...)``."""


def gather(samples: Sequence[Any], stack: Callable[[list[Any]], Any], kind: Any) -> tuple[tuple[Any, ...], Any]:
    """Stack samples to positional and keyword inputs: tensors or arrays of one ``kind``, tuples or dicts of them."""
    calls = [
        ((), s) if isinstance(s, dict) else (tuple(s), {}) if isinstance(s, (tuple, list)) else ((s,), {})
        for s in samples
    ]
    leaves = [list(flatten(call)) for call in calls]
    columns = iter([[leaf for _, leaf in column] for column in zip(*leaves, strict=True)])

    def stacked(leaf: Any) -> Any:
        column = next(columns)
        return stack(column) if isinstance(leaf, kind) else leaf

    args, kwargs = rebuild(calls[0], stacked)
    return args, kwargs


def _refuse(mixes: bool) -> None:
    if not mixes:
        raise OptionError(
            "a scheduler needs a model that tells the samples of a batch apart, got one whose samples leave together. "
            "Call it with whole batches."
        )


class ModelEngine:
    """Runs what `retroexit.wrap` returns."""

    def __init__(self, model: EarlyExitGenerator, strict: bool = False) -> None:
        check_wrapped(model)
        _refuse(model.split.mixes and model.split.rows_per_sample == 1)
        self.model, self.exits, self.strict = model, len(model.branches) + 1, strict

    @torch.no_grad()
    def begin(self, samples: Sequence[Any], choices: Sequence[ExitChoice]) -> list[Started]:
        """Run samples to the first cut; see `Engine`."""
        model, split = self.model, self.model.split
        begun = split.begin(*gather(samples, torch.stack, torch.Tensor))
        exits, retrieved = [exit or self.exits for _, exit in choices], None
        losses: list[Any] = [None] * len(samples)
        is_void = self.strict and model.router.calibration is not None and model.router.differences(begun.feature)
        if not is_void and any(exit is None for _, exit in choices):
            limits = torch.tensor([threshold or 0.0 for threshold, _ in choices])
            choice = model.router.choose(begun, RoutingRequest(threshold=limits))
            retrieved = choice.retrieved
            exits = [exit or chosen for (_, exit), chosen in zip(choices, choice.exits.tolist(), strict=True)]
            assert choice.losses is not None
            losses = choice.losses.tolist()
        early = [row for row, exit in enumerate(exits) if exit < self.exits]
        guides = model.guide.guide(begun, torch.tensor(early, dtype=torch.int64), retrieved) if early else None
        guide_of = {row: guides[i : i + 1] for i, row in enumerate(early)} if guides is not None else {}
        states = [
            ({n: v[row : row + 1] if n in split.batched else v for n, v in begun.values.items()}, guide_of.get(row))
            for row in range(len(samples))
        ]
        predicted = [None if exit else row and tuple(row) for (_, exit), row in zip(choices, losses, strict=True)]
        return list(map(Started, exits, states, predicted))

    @torch.no_grad()
    def finish(self, states: Sequence[Any], exit: int) -> list[Any]:
        """Render samples; see `Engine`."""
        split = self.model.split
        values = {
            n: torch.cat([state[0][n] for state in states]) if n in split.batched else v
            for n, v in states[0][0].items()
        }
        guide = None if states[0][1] is None else torch.cat([state[1] for state in states])
        image = self.model.image(render_from(split, self.model.branches, exit, 0, values, guide))
        if image.is_cuda:  # once per batch: a result is there, and its time is the batch's
            torch.cuda.current_stream(image.device).synchronize()
        return list(image.unflatten(0, (len(states), -1)).squeeze(1))


class BundleEngine:
    """Runs what `load_bundle` returns."""

    def __init__(self, bundle: Bundle, strict: bool = False) -> None:
        _refuse(bundle.manifest["mixes"])
        self.bundle, self.exits, self.strict = bundle, bundle.exits, strict
        self._rows: dict[str, int] = bundle.manifest["rows"]

    def begin(self, samples: Sequence[Any], choices: Sequence[ExitChoice]) -> list[Started]:
        """Run samples to the first cut; see `Engine`."""
        exits = np.array([exit or 0 for _, exit in choices])
        limits = None if exits.all() else [threshold or 0.0 for threshold, _ in choices]
        begun = self.bundle.begin(
            *gather(samples, np.stack, (np.ndarray, np.generic)), exits, limits, strict=self.strict
        )
        states = [
            {
                n: v[row * self._rows[n] : (row + 1) * self._rows[n]] if n in self._rows else v
                for n, v in begun.values.items()
            }
            for row in range(len(samples))
        ]
        rows: list[Any] = [None] * len(samples) if begun.losses is None else begun.losses.tolist()
        predicted = [None if exit else row and tuple(row) for (_, exit), row in zip(choices, rows, strict=True)]
        return list(map(Started, begun.exits.tolist(), states, predicted))

    def finish(self, states: Sequence[Any], exit: int) -> list[Any]:
        """Render samples; see `Engine`."""
        values = {
            n: np.concatenate([state[n] for state in states]) if n in self._rows else v for n, v in states[0].items()
        }
        images = self.bundle.finish(values, exit)
        return list(images.reshape(len(states), self._rows["image"], *images.shape[1:]).squeeze(1))
