"""What the README shows first: wrap a generator; fit, evaluate and load are imported from here too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from retroexit.branch.widths.plan import WidthRule
from retroexit.core.identity import unwrapped
from retroexit.errors import GeneratorError, OptionError, RecordingError
from retroexit.evaluate import evaluate
from retroexit.fit import fit
from retroexit.guidance.provider import Guidance
from retroexit.load import load
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.description import Description
from retroexit.plugins.host import host
from retroexit.split.split import SplitGenerator, places
from retroexit.stages.decoder import Decoder, forward_signature, read_decoder
from retroexit.stages.stage import Stage
from retroexit.wrapping.options import WrapOptions, shadowed_keywords

__all__ = ["evaluate", "find_stages", "fit", "load", "read_generator", "wrap"]


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
            ``False`` to ask none. By default all are asked. `fit` uses the same description.
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
            f"generator must be a torch.nn.Module, got a {type(generator).__name__}. Pass the trained generator.",
            generator,
        )
    generator = unwrapped(generator)
    if isinstance(attach_at, (str, int)):
        attach_at = [attach_at]
    description = host().describe(generator, adapter)
    if example_inputs is None and description.example_inputs is not None:
        example_inputs, example_kwargs = description.example_inputs(generator)
    stages = description.stages if stages is None else stages
    attach_at = tuple(attach_at)
    options = WrapOptions(
        attach_at=attach_at,
        rules=_rules(scale, min_channels, len(attach_at), width_rule),
        tap=tap,
        stages=None if stages is None else tuple(stages),
        guidance=_guidance(guidance, description),
        init=init,
        image=description.image if image is None else image,
        image_range=description.image_range if image_range is None else image_range,
        self_test=self_test,
        seed=seed,
        shadowed=shadowed_keywords(generator),
        predictor_inputs=description.predictor_inputs,
        build_stage=description.build_stage,
        description=None if adapter is None else description,
    )
    model = EarlyExitGenerator(generator, options)
    if example_inputs is not None:
        model.record(*example_inputs, **(example_kwargs or {}))
    return model


def find_stages(
    generator: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    image: Any = None,
    stages: Sequence[str] | None = None,
) -> list[Stage]:
    """List the stages l_1..l_N of a generator, with cost, output shape and live values.

    `retroexit.report.stage_table` prints them, `retroexit.report.decoder_picture` draws them.

    Args:
        generator: A trained generator in eval mode.
        example_inputs: Positional inputs that it accepts; an adapter may make them.
        example_kwargs: Keyword inputs.
        image: Key of the image in its output, where it returns several maps.
        stages: Paths of l_1..l_N, where the search should not decide.

    Returns:
        The stages, in order; those marked ``is_suggested`` are good places for branches.

    Raises:
        GeneratorError, RecordingError: As `wrap`.

    Reference: paper section 3.1.
    """
    return list(read_generator(generator, example_inputs, example_kwargs, image=image, stages=stages).stages)


def read_generator(
    generator: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    image: Any = None,
    stages: Sequence[str] | None = None,
) -> Decoder:
    """Read a generator as `wrap` does: its stages, and the execution that they were found in."""
    generator = unwrapped(generator)
    description = host().describe(generator)
    if example_inputs is None and not example_kwargs:
        if description.example_inputs is None:
            raise OptionError(
                f"example_inputs are needed, because no adapter makes the inputs of {type(generator).__name__}, "
                f"{forward_signature(generator)}. Pass example_inputs=(...); on the command line, --shape 1,32,16,32 "
                "once per input, or a factory that returns (generator, inputs).",
                generator,
            )
        example_inputs, example_kwargs = description.example_inputs(generator)
    args, kwargs = tuple(example_inputs or ()), dict(example_kwargs or {})
    decoder = read_decoder(
        generator,
        args,
        kwargs,
        stages=description.stages if stages is None else stages,
        image=description.image if image is None else image,
    )
    return decoder if decoder.replayed else _check_pieces(generator, decoder, args, kwargs)


def _check_pieces(
    generator: nn.Module, decoder: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Decoder:
    """Cut at the suggested stages and run the pieces; note the reason where they do not reproduce the output."""
    pairs = places(decoder, [stage for stage in decoder.stages if stage.is_suggested], "after")
    if not pairs:
        return decoder
    try:
        SplitGenerator(generator, decoder, [cut for _, cut in pairs], args, kwargs)
    except RecordingError as error:
        return replace(decoder, replayed=" ".join(str(error).split()))
    return decoder


def _rules(scale: float | Sequence[float], min_channels: int, count: int, name: str) -> tuple[WidthRule, ...]:
    # A string is a sequence too, but of no scales.
    scales: list[Any] = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
    if len(scales) != count:
        raise OptionError(
            f"scale must be one number or one per attach point ({count}), got {len(scales)}.",
            scale,
        )
    function = host().width_rule(name)
    return tuple(WidthRule(item, min_channels, name, function) for item in scales)


def _guidance(guidance: Guidance | str | bool | None, description: Description) -> Guidance | None:
    if guidance is None or guidance is False:
        return None
    if guidance is True or guidance == "patches":
        guidance = Guidance(key=None if guidance is True else False)
    if not isinstance(guidance, Guidance):
        raise OptionError(
            f"guidance must be None, True, 'patches' or a retroexit.Guidance, got {guidance!r}.", guidance
        )
    return guidance.completed(description.key, description.key_after, description.value_after)
