"""The state of one conformance test: generator, description, inputs, and results so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.core.identity import fingerprint
from retroexit.core.nested import cloned, rebuild, tensors
from retroexit.errors import AdapterError, cause_of
from retroexit.plugins.description import Description

__all__ = ["Case", "Inputs", "Results", "first_map", "nearly_equal", "snapshot"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of one forward pass."""


@dataclass
class Results:
    """Claims that hold, claims that were not checked with the reason, and problems with advice."""

    checked: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def claim(self, text: str) -> Iterator[None]:
        """Check one claim; it holds if no problem is noted and nothing is raised."""
        before = len(self.problems)
        try:
            yield
        except Exception as error:
            self.problems.append(f"{text}: {cause_of(error)}")
        if len(self.problems) == before:
            self.checked.append(text)

    def wrong(self, problem: str) -> None:
        """Note a problem."""
        self.problems.append(problem)

    def skip(self, claim: str, reason: str) -> None:
        """Note that a claim was not checked."""
        self.skipped.append(f"{claim}: {reason}")

    def raise_problems(self, name: str, generator: nn.Module) -> None:
        """Raise one error that lists all problems, if there are any."""
        problems = tuple(dict.fromkeys(self.problems))
        if problems:
            lines = "".join(f"\n  - {problem}" for problem in problems)
            raise AdapterError(
                f"{name} does not describe this {type(generator).__name__}:{lines}\n"
                "retroexit.plugins.Description and retroexit/plugins/hookspecs.py document every part.",
                generator,
                problems,
            )


@dataclass
class Case:
    """One adapter under test.

    Attributes:
        generator: The generator.
        description: Its description.
        inputs: Inputs of one forward pass.
        scale: Width factor of thin stages and branches.
        min_channels: Floor of their widths.
        results: Results so far.
        image: The generator's image for these inputs.
        image_path: Where the image is in the generator's output.
        pair: Two different samples, if the generator accepts a batch of two.
    """

    generator: nn.Module
    description: Description
    inputs: Inputs
    scale: float
    min_channels: int
    results: Results
    image: Tensor = field(default_factory=lambda: torch.empty(0))
    image_path: tuple[Any, ...] = ()
    pair: Inputs | None = None

    def render(self, inputs: Inputs | None = None, seed: int = 0) -> Any:
        """Run the generator with seeded random draws."""
        return self.seeded(self.generator, inputs, seed)

    def seeded(self, function: Callable[..., Any], inputs: Inputs | None = None, seed: int = 0) -> Any:
        """Call a function with copies of the inputs and seeded random draws; the global state is kept."""
        args, kwargs = cloned(inputs or self.inputs)
        device = self.image.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            return function(*args, **kwargs)

    def image_in(self, output: Any) -> Tensor:
        """Return the image in an output of the generator or of an exit."""
        for key in self.image_path:
            output = output[key] if isinstance(output, (tuple, list, dict)) else getattr(output, key)
        image: Tensor = output
        return image

    def make_pair(self) -> Inputs:
        """Make a batch of two: the first sample, and the same one shifted along its last axis."""
        batch = len(self.image)

        def grow(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != batch:
                return leaf
            return torch.cat([leaf[:1], leaf[:1].roll(1, -1) if leaf.dim() > 1 else leaf[:1]])

        pair: Inputs = rebuild(self.inputs, grow)
        return pair

    def repeat(self, pair: Inputs, index: int, count: int) -> Inputs:
        """Make a batch of ``count`` copies of one sample of a batch that `make_pair` made."""
        originals, batch = iter(tensors(self.inputs)), len(self.image)

        def take(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            original = next(originals)
            return leaf[[index] * count] if original.dim() > 0 and len(original) == batch else leaf

        repeated: Inputs = rebuild(pair, take)
        return repeated


def first_map(value: Any) -> Tensor | None:
    """Return the first tensor of at least three axes in a nested value."""
    return next((tensor for tensor in tensors(value) if tensor.dim() >= 3), None)


def nearly_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by at most a hundredth of their variation.

    Convolutions round differently for other batch sizes, and untrained weights may amplify that a
    thousandfold; samples that affect one another differ by as much as they vary.
    """
    a, b = a.double(), b.double()
    return float((a - b).square().mean().sqrt()) <= 0.01 * float(b.std(correction=0)) + 1e-5


def snapshot(generator: nn.Module) -> dict[str, Any]:
    """Record everything about a generator that an adapter must not change."""
    modules = list(generator.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "weights or buffers": fingerprint(generator),
        "requires_grad": {name: p.requires_grad for name, p in generator.named_parameters()},
        "gradients": {name for name, p in generator.named_parameters() if p.grad is not None},
        "train/eval flags": {name: module.training for name, module in modules},
        "hooks": {
            (name, kind): len(vars(module).get(kind, ())) for name, module in modules for kind in hooks
        },
    }
