"""What the README shows first: wrap a generator, find its stages, load it again.

To fit is `retroexit.fit`, to evaluate and to calibrate `retroexit.assessing`; all can be had from here.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from retroexit.assessing import calibrate, evaluate, find_metric
from retroexit.branch.widths.plan import WidthRule
from retroexit.errors import GeneratorError, OptionError, RetroExitWarning
from retroexit.fit import fit
from retroexit.guidance.options import Guidance
from retroexit.inspection import find_stages
from retroexit.load import load_model
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.adapters import build_stage_of, describe
from retroexit.plugins.hookspecs import Description
from retroexit.plugins.host import host
from retroexit.wrapping.options import WrapOptions

__all__ = ["calibrate", "evaluate", "find_metric", "find_stages", "fit", "load", "wrap"]

_OWN_KEYWORDS = ("exit", "threshold", "budget", "deadline_ms")


def wrap(
    generator: nn.Module,
    attach_at: Sequence[int | str],
    scale: float | Sequence[float],
    *,
    min_channels: int = 64,
    tap: Literal["after", "before"] = "after",
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    stages: Sequence[str] | None = None,
    guidance: Guidance | str | bool | None = None,
    adapter: Description | str | bool | None = None,
    init: Literal["inherit", "scratch"] = "inherit",
    width_rule: str = "floor",
    image: Any = None,
    image_range: tuple[float, float] | None = None,
    self_test: bool = True,
    seed: int = 0,
) -> EarlyExitGenerator:
    """Add early exits to a trained generator.

    The generator itself is never changed: not its weights, buffers, hooks, ``requires_grad`` or train/eval
    flags.

    Args:
        generator: Any module with a multi-layer decoder, in eval mode.
        attach_at: Stages after which a branch sits, by number from 1 (see `find_stages`) or by dotted module
            path.
        scale: Width factor of the branches, in (0, 1]; one for all, or one per attach point.
        min_channels: No width is scaled below this, ``>= 1``.
        tap: ``"after"``: a branch takes the stage's output; ``"before"``: its input, so that the branch
            repeats the stage.
        example_inputs: Positional inputs that the generator accepts, any batch size. Without them, and
            without an adapter that makes some, the generator is recorded at its first call.
        example_kwargs: Its keyword inputs.
        stages: Paths of l_1..l_N, where the search should not decide.
        guidance: ``None``; ``True`` for a bank of frames where the adapter knows keys of whole inputs, else
            of patches; ``"patches"`` for these in any case; or a `Guidance`.
        adapter: What a plug-in knows about the generator: a `Description`, the name of the plug-in to ask,
            ``False`` to ask none. By default all are asked. A fit goes by it too.
        init: Starting weights of a branch: ``"inherit"``, the backbone's most important channels, which `fit`
            chooses anew from its samples and solves for, or ``"scratch"``.
        width_rule: How widths follow from the scale: ``"floor"``, the paper's, ``"multiple-of-8"``, or a
            plug-in's.
        image: Key, index or path of the image in the generator's output, where it returns several maps.
        image_range: Smallest and largest pixel value; measured where it is not given.
        self_test: Whether to check that the generator cut at every attach point reproduces its output bit for
            bit.
        seed: Seed of fresh weights.

    Returns:
        The wrapped generator.

    Raises:
        GeneratorError: If it is no module, is in train mode, rejects the inputs, returns NaN, no image, or
            several.
        AttachPointError: If a stage is unknown, named twice, the last one, or runs more than once.
        OptionError: If another argument is out of range.
        BankError: If keys and values of the guidance do not fit together.
        RecordingError: If its execution cannot be written down and cut.
        BranchError: If the rest of it cannot be made thinner.
        PluginError: If no plug-in, or more than one, offers the width rule, or there is none of the adapter's
            name.

    Example:
        >>> model = retroexit.wrap(generator, attach_at=[2, 4, 6], scale=1 / 15)
        >>> image = model(z)                 # the generator itself
        >>> quick = model(z, exit=1)         # the first early exit

    Reference: paper sections 3.1 and 4.
    """
    if not isinstance(generator, nn.Module):
        raise GeneratorError(
            f"asked to wrap a {type(generator).__name__}; found no torch.nn.Module. Pass the trained "
            "generator itself.",
            generator,
        )
    if isinstance(attach_at, (str, int)):
        attach_at = [attach_at]
    known = describe(generator, adapter)
    if example_inputs is None and known is not None and known.example_inputs is not None:
        example_inputs, example_kwargs = known.example_inputs(generator)
    if stages is None and known is not None:
        stages = known.stages
    attach_at = tuple(attach_at)
    options = WrapOptions(
        attach_at=attach_at,
        rules=_rules(scale, min_channels, len(attach_at), width_rule),
        tap=tap,
        stages=None if stages is None else tuple(stages),
        guidance=_guidance(guidance, known),
        init=init,
        image=image if image is not None or known is None else known.image,
        image_range=image_range if image_range is not None or known is None else known.image_range,
        self_test=self_test,
        seed=seed,
        shadowed=_shadowed(generator),
        predictor_inputs=None if known is None else known.predictor_inputs,
        build_stage=build_stage_of(known, adapter),
        told=None if adapter is None else known,
    )
    model = EarlyExitGenerator(generator, options)
    if example_inputs is not None:
        model.record(*example_inputs, **(example_kwargs or {}))
    return model


def load(
    folder: str | Path,
    generator: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    adapter: Description | str | bool | None = None,
    key: Callable[..., Tensor] | None = None,
) -> EarlyExitGenerator:
    """Read a wrapped generator that ``model.save`` or `fit` wrote.

    Args:
        folder: The folder.
        generator: The same trained generator, weights included; it is not part of what was saved.
        example_inputs: Positional inputs to record it with; without them its first call records.
        example_kwargs: Keyword inputs.
        adapter: What a plug-in knows about the generator, as for `wrap`.
        key: The key function of its `Guidance`, which is not saved; not needed where the adapter brings it.

    Returns:
        The wrapped generator, with its branches, predictor and bank.

    Raises:
        CheckpointError: If files are missing, damaged, or belong to another generator, or a key function is.
        PluginError: If the bank's search back-end is not installed.
    """
    known = describe(generator, adapter)
    if example_inputs is None and known is not None and known.example_inputs is not None:
        example_inputs, example_kwargs = known.example_inputs(generator)
    return load_model(
        folder,
        generator,
        example_inputs,
        example_kwargs,
        host().retriever,
        key=key,
        known_key=None if known is None else known.key,
        shadowed=_shadowed(generator),
        predictor_inputs=None if known is None else known.predictor_inputs,
        build_stage=build_stage_of(known, adapter),
        told=None if adapter is None else known,
    )


def _rules(scale: float | Sequence[float], min_channels: int, count: int, name: str) -> tuple[WidthRule, ...]:
    # A string is a sequence too, but of no scales.
    scales: list[Any] = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
    if len(scales) != count:
        raise OptionError(
            f"asked for {len(scales)} scales; found {count} attach points. Pass one scale, or one per attach "
            "point.",
            scale,
        )
    function = host().width_rule(name)
    return tuple(WidthRule(item, min_channels, name, function) for item in scales)


def _guidance(wanted: Guidance | str | bool | None, known: Description | None) -> Guidance | None:
    if wanted is None or wanted is False:
        return None
    if wanted is True or wanted == "patches":
        wanted = Guidance(key=None if wanted is True else False)
    if isinstance(wanted, Guidance):
        hints = (None, None, None) if known is None else (known.key, known.key_after, known.value_after)
        return wanted.completed(*hints)
    raise OptionError(
        f"asked for guidance={wanted!r}; found None, True, 'patches' or a retroexit.Guidance only.", wanted
    )


def _shadowed(generator: nn.Module) -> tuple[str, ...]:
    try:
        taken = set(inspect.signature(generator.forward).parameters)
    except (TypeError, ValueError):
        return ()
    clash = tuple(name for name in _OWN_KEYWORDS if name in taken)
    if clash:
        warnings.warn(
            f"{type(generator).__name__}.forward has its own keyword {' and '.join(map(repr, clash))}; "
            "model(...) hands it to the generator. Choose exits with model.route(inputs, kwargs, exit=..., "
            "threshold=...).",
            RetroExitWarning,
            stacklevel=3,
        )
    return clash
