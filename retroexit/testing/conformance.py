"""`check_adapter`, which an adapter's author calls in a test, with or without pytest."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from retroexit.core.identity import fingerprint
from retroexit.errors import PluginError, silence
from retroexit.plugins.description import Description
from retroexit.plugins.host import Host, brief, host
from retroexit.testing.claims import Case, Stranger, check_all

_RECOGNISED = "the generator is recognised, others are not"


@dataclass(frozen=True)
class AdapterReport:
    """The result of a conformance test."""

    name: str  # the generator's name in the description
    stages: tuple[str, ...]  # paths of l_1..l_N
    checked: tuple[str, ...]  # claims that hold
    skipped: tuple[str, ...]  # claims that were not checked, with the reason

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
    """Test an adapter on one generator: everything that it states, and wrapping, saving and loading with it.

    Args:
        generator: A small instance with random or trained weights, in eval mode, on the CPU.
        plugin: The module or object whose functions are marked with `hookimpl`; by default the installed plug-ins are
            called.
        description: A description to test instead of a plug-in.
        example_inputs: Positional inputs, if the description makes none.
        example_kwargs: Keyword inputs, if the description makes none.
        scale: Width factor of thin stages and branches, in (0, 1).
        min_channels: Smallest width; small, so that a small instance shrinks.
        thin_at: Numbers of the stages to build thin branches at; all but the last by default.
        strangers: Further modules that must not be recognised, such as a relative of the generator.

    Returns:
        What was checked, and what was not.

    Raises:
        AdapterError: If anything is wrong; lists all of it with advice. It is an ``AssertionError`` too.

    Example:
        >>> def test_adapter():
        ...     check_adapter(MyDecoder(channels=16).eval())
    """
    name = "an adapter" if plugin is None else getattr(plugin, "__name__", None) or type(plugin).__name__
    case = Case(generator, description or Description(name=name), scale, min_channels)
    with silence(), torch.random.fork_rng(devices=[]):  # problems of a plug-in are listed in the error
        plugins = host() if plugin is None else Host(discover=False)
        author = None
        if description is not None:
            case.skip(_RECOGNISED, "a description was passed")
        else:
            author = _recognise(case, plugin, plugins, (Stranger().eval(), *strangers))
        before = _snapshot(generator)
        _make_inputs(case, example_inputs, example_kwargs)
        check_all(case, thin_at)
        with case.claim("the generator is left as it was"):
            changed = [part for part, state in _snapshot(generator).items() if state != before[part]]
            if changed:
                case.wrong(f"the adapter changed {', '.join(changed)} of the generator; work on a copy")
        for info in plugins.installed():
            if info.name == author and info.error is not None:
                case.wrong(f"{info}: {info.error}")
    case.raise_problems()
    paths = tuple(stage.path for stage in case.stages)
    return AdapterReport(case.description.name, paths, tuple(case.checked), tuple(case.skipped))


def _recognise(case: Case, plugin: object | None, plugins: Host, strangers: Sequence[nn.Module]) -> str:
    """Have the generator described, and no stranger; returns the name of the plug-in that does."""
    kind, name, recognised = type(case.generator).__name__, case.description.name, None
    try:
        if plugin is not None:
            plugins.register(plugin, name)
        recognised = plugins.recognise(case.generator)
    except PluginError as error:
        case.wrong(f"the plug-in does not fit: {error}")
    if recognised is None:
        case.problems += [f"{info}: {info.error}" for info in plugins.installed() if info.error is not None]
        if plugin is None:
            case.wrong(
                f"no installed plug-in recognises a {kind}; install the adapter's distribution ('retroexit "
                "plugins' lists them), or pass plugin=... or description=..."
            )
        elif not case.problems:
            case.wrong(f"{name} does not recognise a {kind}; return a Description")
        case.raise_problems()
    assert recognised is not None
    info, case.description = recognised
    if case.description.build_stage is None and "retroexit_build_stage" in info.hooks:
        case.description = dataclasses.replace(case.description, build_stage=plugins.build_stage)
    with case.claim(_RECOGNISED):
        for stranger in strangers:
            if plugins.recognise(stranger, info.name) is not None:
                case.wrong(f"the adapter recognises a {type(stranger).__name__} too; return None")
    return info.name


def _make_inputs(case: Case, args: Sequence[Any] | None, kwargs: dict[str, Any] | None) -> None:
    """Use the description's example inputs, else those that were passed."""
    made: Any = (tuple(args or ()), dict(kwargs or {}))
    if case.description.example_inputs is not None:
        with case.claim("example inputs are made"):
            made = case.description.example_inputs(case.generator)
            is_pair = isinstance(made, tuple) and len(made) == 2
            if not is_pair or not isinstance(made[0], tuple) or not isinstance(made[1], dict):
                case.wrong(f"example_inputs must return (args, kwargs), tuple and dict, got {brief(made)}")
    elif args is None and kwargs is None:
        case.wrong("the description has no example_inputs; write them, or pass example_inputs=(...)")
    case.raise_problems()
    case.inputs = made


def _snapshot(generator: nn.Module) -> dict[str, Any]:
    """Record everything about a generator that an adapter must not change."""
    modules, parameters = dict(generator.named_modules()), dict(generator.named_parameters())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "weights or buffers": fingerprint(generator),
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": {name for name, p in parameters.items() if p.grad is not None},
        "train/eval flags": {name: module.training for name, module in modules.items()},
        "hooks": {name: [len(vars(m).get(kind, ())) for kind in hooks] for name, m in modules.items()},
    }
