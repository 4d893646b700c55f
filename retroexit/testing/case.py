"""The state of one conformance test: what is tested, the results so far, and ways to run the generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retroexit.api import wrap
from retroexit.core.nested import cloned, rebuild
from retroexit.errors import AdapterError, cause_of
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.description import Description
from retroexit.stages.stage import Stage

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of one forward pass."""


class Run(NamedTuple):
    """One call of a module of the generator."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Case:
    """One adapter under test."""

    generator: nn.Module  # the generator
    description: Description  # its description
    scale: float  # width factor of thin stages and branches
    min_channels: int  # floor of their widths
    inputs: Inputs = ((), {})  # inputs of one forward pass
    stages: Sequence[Stage] = ()  # l_1..l_N, once the generator was read
    image: Tensor = field(default_factory=lambda: torch.empty(0))  # the generator's image for these inputs
    image_path: tuple[Any, ...] = ()  # where the image is in the generator's output
    takes_pairs: bool = False  # whether the generator accepts a batch of two
    checked: list[str] = field(default_factory=list)  # claims that hold
    skipped: list[str] = field(default_factory=list)  # claims that were not checked, with the reason
    problems: list[str] = field(default_factory=list)  # what is wrong, with advice

    @contextmanager
    def claim(self, text: str) -> Iterator[None]:
        """Check one claim; it holds if nothing is raised, noted as a problem, or skipped."""
        before = len(self.problems), len(self.skipped)
        try:
            yield
        except Exception as error:
            self.wrong(f"{text}: {cause_of(error)}")
        if (len(self.problems), len(self.skipped)) == before:
            self.checked.append(text)

    def wrong(self, problem: str) -> None:
        """Note a problem."""
        self.problems.append(problem)

    def skip(self, claim: str, reason: str) -> None:
        """Note that a claim was not checked."""
        self.skipped.append(f"{claim}: {reason}")

    def raise_problems(self) -> None:
        """Raise one error that lists all problems, if there are any."""
        problems = tuple(dict.fromkeys(self.problems))
        if problems:
            lines = "".join(f"\n  - {problem}" for problem in problems)
            raise AdapterError(
                f"{self.description.name} does not describe this {type(self.generator).__name__}:{lines}\n"
                "retroexit.plugins.Description and retroexit/plugins/hookspecs.py document every part.",
                self.generator,
                problems,
            )

    def render(self, inputs: Inputs | None = None, seed: int = 0) -> Any:
        """Run the generator with seeded random draws."""
        return self.seeded(self.generator, inputs, seed)

    def seeded(self, function: Callable[..., Any], inputs: Inputs | None = None, seed: int = 0) -> Any:
        """Call a function with copies of the inputs and seeded random draws; the global state is restored."""
        args, kwargs = cloned(inputs or self.inputs)
        device = self.image.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            return function(*args, **kwargs)

    def render_exit(self, model: EarlyExitGenerator, index: int, inputs: Inputs | None = None) -> Any:
        """Run one exit with seeded random draws."""
        return self.seeded(lambda *args, **kwargs: model.route(args, kwargs, exit=index), inputs)

    def wrap(self, attach_at: Sequence[int], scale: float, min_channels: int) -> EarlyExitGenerator:
        """Wrap the generator with its description."""
        args, kwargs = self.inputs
        options: dict[str, Any] = {"example_inputs": args, "example_kwargs": kwargs}
        options |= {"adapter": self.description, "min_channels": min_channels}
        return wrap(self.generator, attach_at, scale, **options)

    def watch(self, paths: Iterable[str]) -> list[Run]:
        """Run the generator and record the calls of some of its modules, in the order in which they return."""
        runs: list[Run] = []

        def record(path: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            runs.append(Run(path, cloned(args), cloned(kwargs), output))

        modules = dict(self.generator.named_modules())
        hooks = [
            modules[path].register_forward_hook(partial(record, path), with_kwargs=True)
            for path in paths
            if path in modules
        ]
        try:
            self.render()
        finally:
            for hook in hooks:
                hook.remove()
        return runs

    def image_in(self, output: Any) -> Tensor:
        """Return the image in an output of the generator or of an exit."""
        for key in self.image_path:
            output = output[key] if isinstance(output, (tuple, list, dict)) else getattr(output, key)
        image: Tensor = output
        return image

    def pairs(self) -> tuple[Inputs, Inputs, Inputs]:
        """Make batches of two, of one size: the first sample and the same one shifted, each of them twice."""

        def batch(picks: tuple[int, int], leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != len(self.image):
                return leaf
            samples = leaf[:1], leaf[:1].roll(1, -1) if leaf.dim() > 1 else leaf[:1]
            return torch.cat([samples[pick] for pick in picks])

        both, first, second = (
            rebuild(self.inputs, partial(batch, picks)) for picks in ((0, 1), (0, 0), (1, 1))
        )
        return both, first, second

    def depends_on_batch(self, run: Callable[[Inputs], Tensor]) -> str:
        """Compare a batch of two with each sample twice; returns by how much they differ, ``""`` if hardly.

        Rounding differs a little for other batches; samples that affect one another differ as much as they
        vary.
        """
        both, *same = (run(pair).double() for pair in self.pairs())
        gap = both - torch.stack([output[i] for i, output in enumerate(same)])
        tolerance = 0.01 * float(both.std(correction=0)) + 1e-5
        return f"{float(gap.abs().max()):.2g}" if float(gap.square().mean().sqrt()) > tolerance else ""
