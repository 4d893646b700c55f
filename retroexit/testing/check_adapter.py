"""What an adapter's author calls in a test; works under pytest and without it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.errors import AdapterError, PluginError, RetroExitWarning
from retroexit.plugins.description import Description
from retroexit.plugins.host import Host, brief, host
from retroexit.testing import claims
from retroexit.testing.adversarial import check_contest
from retroexit.testing.case import Case, Findings, Inputs, snapshot
from retroexit.testing.routes import check_routes

__all__ = ["AdapterReport", "check_adapter"]


@dataclass(frozen=True)
class AdapterReport:
    """What a conformance test looked at.

    Attributes:
        name: What the description calls the generator.
        stages: Paths of l_1..l_N.
        checked: Claims that hold.
        skipped: Claims that were not looked at, and why; mostly what the description leaves to retroexit.
    """

    name: str
    stages: tuple[str, ...]
    checked: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"adapter for {self.name}: {len(self.stages)} stages"]
        lines += [f"  ok       {claim}" for claim in self.checked]
        return "\n".join(lines + [f"  skipped  {claim}" for claim in self.skipped])


def check_adapter(
    generator: nn.Module,
    *,
    plugin: object | None = None,
    description: Description | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    scale: float = 1 / 4,
    min_channels: int = 4,
    thin_at: Sequence[int] | None = None,
    strangers: Sequence[nn.Module] = (),
) -> AdapterReport:
    """Test an adapter on one generator: all that it claims, and all that retroexit does with it.

    The generator is recognised and another one is not; its stages run once and in order; example inputs run;
    the image keeps its range; predictor inputs, keys and taps have their shapes; thin stages run and keep the
    shapes; the discriminator gives gradients and learns by the objective; wrapped at every stage, exits at
    scale 1 are the generator bit for bit and thin ones keep its shapes; a batch of two equals two of one;
    what is saved is loaded again; and nothing of it changes the generator.

    Args:
        generator: A small instance with random or trained weights, in eval mode, on the CPU: at full width
            the generator is copied once for every stage.
        plugin: The module or object whose functions carry `hookimpl`, if it is not to be looked up among the
            installed plug-ins.
        description: A description to test, where there is no plug-in to recognise the generator.
        example_inputs: Positional inputs to run it with, where the description makes none.
        example_kwargs: Keyword inputs.
        scale: Width factor to test thin stages and branches with, in (0, 1).
        min_channels: Their floor; small, so that a small instance shrinks.
        thin_at: Stages to build thin branches at, by number, where all but the last would take too long.
        strangers: Further modules that must not be recognised, such as a relative of the generator.

    Returns:
        What was checked, and what was not.

    Raises:
        AdapterError: If anything is wrong; the text lists all of it, with what to do. It is an
            ``AssertionError`` too.

    Example:
        >>> def test_the_adapter_keeps_its_promises():
        ...     check_adapter(MyDecoder(channels=16).eval())
    """
    found = Findings()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", RetroExitWarning)  # what a plug-in does wrong is listed below
        asked = _Asked.about(generator, plugin, description, found)
        asked.check_strangers([_Stranger().eval(), *strangers])
        before = snapshot(generator)
        known = asked.description
        inputs = _inputs(generator, known, example_inputs, example_kwargs, found)
        case = Case(generator, known, inputs, scale, min_channels, found)
        stages = _check(case, thin_at)
        with found.part("the generator is left as it was"):
            changed = [what for what, was in snapshot(generator).items() if was != before[what]]
            if changed:
                found.wrong(f"the adapter changed {', '.join(changed)} of the generator; work on a copy")
        asked.note_errors()
    _stop_at(found, generator, known.name)
    return AdapterReport(known.name, stages, tuple(found.checked), tuple(found.skipped))


def _check(case: Case, thin_at: Sequence[int] | None) -> tuple[str, ...]:
    """Go through all claims, those that others need first; gives the stages."""
    with case.found.part("example inputs run"):
        output = case.render()
    if case.found.problems:
        return ()
    decoder = claims.check_stages(case)
    if decoder is None:
        return ()
    case.image_path = decoder.image_path
    case.image = case.image_in(output)
    claims.check_image(case)
    claims.check_batches(case)
    claims.check_taps(case, decoder)
    claims.check_made_from_inputs(case)
    claims.check_discriminator(case)
    check_contest(case)
    if case.known.build_stage is not None:
        claims.check_built_stages(case, decoder, case.known.build_stage)
    else:
        case.found.skip("build_stage makes stages that run", "the adapter builds none")
    check_routes(case, decoder, thin_at)
    return tuple(stage.path for stage in decoder.stages)


@dataclass
class _Asked:
    """A generator's description, and the host whose plug-in gave it, if one did.

    Attributes:
        description: The description, with the plug-in's own way to build stages.
        author: Name of the plug-in; ``None`` where the description was given.
        host: Where it is registered.
        found: Where problems are noted.
    """

    description: Description
    author: str | None
    host: Host
    found: Findings

    @classmethod
    def about(
        cls, generator: nn.Module, plugin: object | None, description: Description | None, found: Findings
    ) -> _Asked:
        """Recognise a generator."""
        if description is not None:
            found.skip("the generator is recognised, others are not", "a description was given")
            return cls(description, None, host(), found)
        asked = host() if plugin is None else Host(discover=False)
        name = getattr(plugin, "__name__", None) or type(plugin).__name__
        try:
            if plugin is not None:
                asked.register(plugin, name)
            recognised = asked.recognise(generator)
        except PluginError as error:
            found.wrong(f"the plug-in does not fit: {error}")
            recognised = None
        if recognised is None:
            found.problems += [f"{p}: {p.error}" for p in asked.installed() if p.error is not None]
            if plugin is None:
                found.wrong(
                    f"no installed plug-in recognises a {type(generator).__name__}; install the adapter's "
                    "distribution ('retroexit plugins' lists them), or pass plugin=... or description=..."
                )
            elif not found.problems:
                found.wrong(f"{name} does not recognise a {type(generator).__name__}; return a Description")
            _stop_at(found, generator, name if plugin is not None else "an adapter")
        assert recognised is not None
        info, known = recognised
        if known.build_stage is None and "retroexit_build_stage" in info.hooks:
            known = dataclasses.replace(known, build_stage=asked.build_stage)
        return cls(known, info.name, asked, found)

    def check_strangers(self, strangers: Sequence[nn.Module]) -> None:
        """Check that the plug-in recognises nothing else."""
        if self.author is None:
            return
        with self.found.part("the generator is recognised, others are not"):
            for stranger in strangers:
                if self.host.recognise(stranger, self.author) is not None:
                    self.found.wrong(
                        f"the adapter recognises a {type(stranger).__name__} too; return None for what it "
                        "does not know"
                    )

    def note_errors(self) -> None:
        """Note what the host found wrong with the plug-in meanwhile."""
        for info in self.host.installed():
            if info.name == self.author and info.error is not None:
                self.found.wrong(f"{info}: {info.error}")


class _Stranger(nn.Module):
    """A decoder of a class that no adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Upsample(scale_factor=2))
        self.to_rgb = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.to_rgb(self.layers(x)))


def _inputs(
    generator: nn.Module,
    known: Description,
    args: Sequence[Any] | None,
    kwargs: dict[str, Any] | None,
    found: Findings,
) -> Inputs:
    """Take the description's example inputs, else those that were given; without any, give up."""
    if known.example_inputs is None:
        if args is None and kwargs is None:
            found.wrong("the description has no example_inputs; write them, or pass example_inputs=(...)")
            _stop_at(found, generator, known.name)
        return tuple(args or ()), dict(kwargs or {})
    made: Any = None
    with found.part("example inputs are made"):
        made = known.example_inputs(generator)
        if not (
            isinstance(made, tuple)
            and len(made) == 2
            and isinstance(made[0], tuple)
            and isinstance(made[1], dict)
        ):
            found.wrong(f"example_inputs gave {brief(made)}; return (args, kwargs), a tuple and a dict")
    _stop_at(found, generator, known.name)
    inputs: Inputs = made
    return inputs


def _stop_at(found: Findings, generator: nn.Module, name: str) -> None:
    """Raise one error that lists all problems, if there are any."""
    problems = tuple(dict.fromkeys(found.problems))
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise AdapterError(
            f"asked whether {name} describes this {type(generator).__name__}; found {len(problems)} "
            f"problem{'s' * (len(problems) > 1)}:{listed}\nWhat every part has to be is written at "
            "retroexit.plugins.Description and in retroexit/plugins/hookspecs.py.",
            generator,
            problems,
        )
