"""One adapter under test: the generator, what is known about it, its inputs, and what was found so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.core.modules import fingerprint
from retroexit.core.nested import cloned, rebuild, tensors
from retroexit.plugins.description import Description
from retroexit.plugins.info import cause_of

__all__ = ["Case", "Findings", "Inputs", "first_map", "nearly_equal", "snapshot"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of one forward pass."""


@dataclass
class Findings:
    """What holds, what does not, and what could not be looked at.

    Attributes:
        checked: Claims that hold.
        skipped: Claims that were not looked at, and why.
        problems: What is wrong, and what to do.
    """

    checked: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def part(self, claim: str) -> Iterator[None]:
        """Look at one claim; it holds if no problem is noted and nothing is raised."""
        before = len(self.problems)
        try:
            yield
        except Exception as error:
            self.problems.append(f"{claim}: {cause_of(error)}")
        if len(self.problems) == before:
            self.checked.append(claim)

    def wrong(self, text: str) -> None:
        """Note a problem."""
        self.problems.append(text)

    def skip(self, claim: str, reason: str) -> None:
        """Note that a claim was not looked at."""
        self.skipped.append(f"{claim}: {reason}")


@dataclass
class Case:
    """One adapter under test.

    Attributes:
        generator: The generator.
        known: What is known about it.
        inputs: Inputs of one forward pass.
        scale: Width factor of thin stages and branches.
        min_channels: Floor of their widths.
        found: What was found so far.
        image: The generator's image for these inputs.
        image_path: Where it is in the generator's output.
        pair: Two different samples, where the generator takes a batch of two.
    """

    generator: nn.Module
    known: Description
    inputs: Inputs
    scale: float
    min_channels: int
    found: Findings
    image: Tensor = field(default_factory=lambda: torch.empty(0))
    image_path: tuple[Any, ...] = ()
    pair: Inputs | None = None

    def render(self, inputs: Inputs | None = None, seed: int = 0) -> Any:
        """Run the generator, its random draws seeded and nobody else's disturbed."""
        return self.seeded(lambda args, kwargs: self.generator(*args, **kwargs), inputs, seed)

    def seeded(self, function: Callable[[Any, Any], Any], inputs: Inputs | None = None, seed: int = 0) -> Any:
        """Call a function with copies of the inputs, random draws seeded and nobody else's disturbed."""
        args, kwargs = cloned(inputs or self.inputs)
        device = self.image.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            return function(args, kwargs)

    def image_in(self, output: Any) -> Tensor:
        """Find the image in an output of the generator or of an exit."""
        for key in self.image_path:
            output = output[key] if isinstance(output, (tuple, list, dict)) else getattr(output, key)
        found: Tensor = output
        return found

    def is_random(self) -> bool:
        """Tell whether the generator draws random numbers that its output depends on."""
        pairs = zip(tensors(self.render(seed=0)), tensors(self.render(seed=1)), strict=True)
        return not all(torch.equal(a, b) for a, b in pairs)

    def grown(self) -> Inputs:
        """Make a batch of two: the first sample, and the same one moved along its last axis."""
        batch = len(self.image)

        def grow(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != batch:
                return leaf
            one = leaf[:1]
            return torch.cat([one, one.roll(1, -1) if one.dim() > 1 else one])

        grown: Inputs = rebuild(self.inputs, grow)
        return grown

    def row(self, pair: Inputs, index: int) -> Inputs:
        """Take one sample out of a batch of two that `grown` made."""
        given = iter(tensors(self.inputs))
        batch = len(self.image)

        def take(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            before = next(given)
            per_sample = before.dim() > 0 and len(before) == batch
            return leaf[index : index + 1] if per_sample else leaf

        taken: Inputs = rebuild(pair, take)
        return taken


def first_map(value: Any) -> Tensor | None:
    """Give the first tensor of at least three axes in a nested value."""
    return next((tensor for tensor in tensors(value) if tensor.dim() >= 3), None)


def nearly_equal(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors differ by rounding alone: by at most a hundredth of their variation.

    Convolutions round differently for other batch sizes, and weights that were not trained may enlarge that
    a thousandfold; samples that see one another differ by as much as they vary.
    """
    a, b = a.double(), b.double()
    return float((a - b).square().mean().sqrt()) <= 0.01 * float(b.std(correction=0)) + 1e-5


def snapshot(generator: nn.Module) -> dict[str, Any]:
    """Note everything about a generator that an adapter must leave alone."""
    parts = list(generator.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "weights or buffers": fingerprint(generator),
        "requires_grad": {name: p.requires_grad for name, p in generator.named_parameters()},
        "gradients": {name for name, p in generator.named_parameters() if p.grad is not None},
        "train/eval flags": {name: part.training for name, part in parts},
        "hooks": {(name, kind): len(vars(part).get(kind, ())) for name, part in parts for kind in hooks},
    }
