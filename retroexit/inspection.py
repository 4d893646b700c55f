"""Read a generator with what plug-ins know about it, without wrapping it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from retroexit.errors import OptionError, RecordingError
from retroexit.plugins.host import host
from retroexit.split.split import SplitGenerator, places
from retroexit.stages.decoder import Decoder, forward_signature, read_decoder
from retroexit.stages.stage import Stage

__all__ = ["find_stages", "read_generator"]


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
        GeneratorError, RecordingError: See `wrap`.

    Reference: paper section 3.1.
    """
    found = read_generator(generator, example_inputs, example_kwargs, image=image, stages=stages)
    return list(found.stages)


def read_generator(
    generator: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    image: Any = None,
    stages: Sequence[str] | None = None,
) -> Decoder:
    """Read a generator as `wrap` does: its stages and the execution behind them. See `find_stages`."""
    known = host().describe(generator)
    if example_inputs is None and not example_kwargs:
        if known is None or known.example_inputs is None:
            raise OptionError(
                f"asked for the stages of {type(generator).__name__}; found no adapter that can make its "
                f"inputs, {forward_signature(generator)}. Pass example_inputs=(...); on the command line, "
                "--shape 1,32,16,32 once per input, or a factory that returns (generator, inputs).",
                generator,
            )
        example_inputs, example_kwargs = known.example_inputs(generator)
    args, kwargs = tuple(example_inputs or ()), dict(example_kwargs or {})
    decoder = read_decoder(
        generator,
        args,
        kwargs,
        stages=stages if stages is not None or known is None else known.stages,
        image=image if image is not None or known is None else known.image,
    )
    return decoder if decoder.replayed else _tried(generator, decoder, args, kwargs)


def _tried(generator: nn.Module, decoder: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Decoder:
    """Cut at the suggested stages and run the pieces; say why where they do not give what the whole gives."""
    pairs = places(decoder, [stage for stage in decoder.stages if stage.is_suggested], "after")
    if not pairs:
        return decoder
    try:
        SplitGenerator(generator, decoder, [cut for _, cut in pairs], args, kwargs)
    except RecordingError as error:
        return replace(decoder, replayed=" ".join(str(error).split()))
    return decoder
