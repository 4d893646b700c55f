"""What the README shows first: wrap a generator; fit, evaluate and load are imported from here too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack

from torch import nn

from retroexit.branch.widths.plan import WidthRule
from retroexit.core.nested import is_number
from retroexit.core.samples import example_call, plain_numbers
from retroexit.errors import OptionError, RecordingError
from retroexit.evaluate import evaluate
from retroexit.fit import fit
from retroexit.guidance.provider import Guidance
from retroexit.load import load
from retroexit.model import EarlyExitGenerator, check_generator
from retroexit.pipelines import disable, draft, enable, summary
from retroexit.plugins.description import Description
from retroexit.plugins.host import host
from retroexit.split.split import SplitGenerator, places
from retroexit.stages.decoder import Decoder, forward_signature, read_decoder
from retroexit.stages.stage import Stage
from retroexit.standin import part_to_wrap
from retroexit.wrapping.decomposition import AUTO
from retroexit.wrapping.options import WrapOptions, adapter_options

__all__ = [
    "disable",
    "draft",
    "enable",
    "evaluate",
    "find_stages",
    "fit",
    "load",
    "read_generator",
    "summary",
    "wrap",
    "wrap_options",
]


class WrapSettings(TypedDict, total=False):
    """Options of `wrap`.

    Attributes:
        branch: Kind of branch, one for all or one per attach point. ``"copy"``: the paper's thin copy of the remaining
            stages, the default where a scale is given. ``"subpixel"``: a network of its own that works on coarse grids
            and needs nothing of these stages, the default without a scale and, with a warning, where these stages do
            not run on other widths. ``"stitch"``: a solved convolution replaces stages in the middle, and copies of the
            last ones make the image, the default where ``attach_at`` is left out too and stages of one size hold half
            of the MACs. ``"auto"``: the copy where it can be built and saves enough, until `fit` compares all in a
            pilot. Or the name of a plug-in's.
        macs: Cost of the route of a branch that is no copy as a share of the backbone's, in (0, 1), one for all or one
            per attach point. Without attach points there is an exit for each cost, behind the last stage whose way
            there takes at most 75 % of it; with ``timed`` they are shares of the time. By default a sub-pixel branch
            costs what a thin copy at ``scale`` costs at most, or, without a scale, 6 % beside what lies in front of the
            exit; one that skips stages skips half.
        min_channels: No width is scaled below this, ``>= 1``; 64 by default.
        tap: ``"after"``: a branch takes the stage's output; ``"before"``: its input, so that the branch repeats the
            stage.
        stages: Paths of l_1..l_N, where the search should not decide.
        guidance: ``None``; ``True`` for a bank of frames if the adapter has a key function, else of patches;
            ``"patches"`` for a bank of patches in any case; or a `Guidance`.
        init: Starting weights of a branch: ``"inherit"``, the backbone's most important channels, which `fit` chooses
            anew from its samples and solves for (in a sub-pixel branch, all layers), or ``"scratch"``.
        width_rule: How widths follow from the scale: ``"floor"``, the paper's, ``"multiple-of-8"``, or the name of a
            plug-in's.
        image: Key, index or path of the image in the generator's output, if it returns several maps.
        image_only: Whether early exits give the image alone, with ``None`` for other tensors in the output, such as
            the cache of a video decoder, which otherwise keep their size and layers in every branch.
        image_range: Smallest and largest pixel value; measured by default.
        self_test: Whether to check that the generator cut at every attach point reproduces its output bit for bit.
        timed: Whether to time the stages on this machine and choose attach points by time instead of MACs.
        seed: Seed of fresh weights.
    """

    branch: str | Sequence[str]
    macs: float | Sequence[float | None] | None
    min_channels: int
    tap: Literal["after", "before"]
    stages: Sequence[str] | None
    guidance: Guidance | str | bool | None
    init: Literal["inherit", "scratch"]
    width_rule: str
    image: Any
    image_only: bool
    image_range: tuple[float, float] | None
    self_test: bool
    timed: bool
    seed: int


def wrap(
    generator: nn.Module,
    attach_at: Sequence[int | str] | None = None,
    scale: float | Sequence[float] | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    adapter: Description | str | bool | None = None,
    **settings: Unpack[WrapSettings],
) -> EarlyExitGenerator:
    """Add early exits to a trained generator, which itself is never changed.

    Args:
        generator: Any module with a multi-layer decoder, in eval mode. Of an autoencoder of diffusers the decoder gets
            exits, unless example inputs are images; ``pipe.vae = model`` then decodes with them.
        attach_at: Stages after which a branch sits, by number from 1 (see `find_stages`) or by module path; by default
            those that `find_stages` suggests, or those that fit the costs in ``macs``.
        scale: Width factor of the branches, in (0, 1]; one for all, or one per attach point. Without it, branches are
            sub-pixel branches, sized by ``macs``.
        example_inputs: Positional inputs that the generator accepts, any batch size. Without them, and
            without an adapter that makes some, the generator is recorded at its first call.
        example_kwargs: Its keyword inputs.
        adapter: A `Description` of the generator, the name of a plug-in to call, or ``False`` for no plug-in; by
            default all plug-ins are called. `fit` uses the same description.
        **settings: See `WrapSettings`.

    Returns:
        The wrapped generator.

    Raises:
        RetroExitError: If the generator cannot be run, recorded or cut, an attach point does not exist, a branch cannot
            be made thinner, or an argument is out of range.

    Example:
        >>> model = retroexit.wrap(generator)                                     # exits are chosen
        >>> model = retroexit.wrap(generator, attach_at=[2, 4, 6], scale=1 / 15)  # the paper's thin copies
        >>> image = model(z)                 # the generator itself
        >>> quick = model(z, exit=1)         # the first early exit

    Reference: paper sections 3.1 and 4.
    """
    generator = check_generator(generator)
    attach_at, scale, settings = plain_numbers((attach_at, scale, settings))
    if attach_at is not None:
        attach_at = (attach_at,) if isinstance(attach_at, (str, int)) else tuple(attach_at)
    part = part_to_wrap(generator, adapter, has_inputs=example_inputs is not None or bool(example_kwargs))
    generator, adapter, description = part.generator, part.adapter, part.description
    if example_inputs is None and description.example_inputs is not None:
        example_inputs, example_kwargs = description.example_inputs(generator)
    args, kwargs = example_call(example_inputs, example_kwargs)
    sizes = _sizes(attach_at, scale, settings.pop("branch", None), settings.pop("macs", None))
    options = wrap_options(description, sizes, attach_at, **settings)  # type: ignore[misc]
    options = replace(options, **adapter_options(generator, adapter, description))
    model = EarlyExitGenerator(generator, options)
    if example_inputs is not None or example_kwargs:
        model.record(*args, **kwargs)
    return part.complete(model)


def wrap_options(
    description: Description,
    sizes: tuple[list[Any], list[str], list[float | None]],
    attach_at: tuple[int | str, ...] | None = None,
    *,
    min_channels: int = 64,
    tap: Literal["after", "before"] = "after",
    stages: Sequence[str] | None = None,
    guidance: Guidance | str | bool | None = None,
    init: Literal["inherit", "scratch"] = "inherit",
    width_rule: str = "floor",
    image: Any = None,
    image_only: bool = False,
    image_range: tuple[float, float] | None = None,
    self_test: bool = True,
    timed: bool = False,
    seed: int = 0,
) -> WrapOptions:
    """Complete the settings of a wrap with the description of the generator; ``sizes`` come from `_sizes`."""
    scales, kinds, shares = sizes
    if guidance is True or guidance == "patches":
        guidance = Guidance(key=None if guidance is True else False)
    elif guidance is not None and guidance is not False and not isinstance(guidance, Guidance):
        raise OptionError(f"guidance must be None, True, 'patches' or a retroexit.Guidance, got {guidance!r}.")
    if isinstance(guidance, Guidance):
        guidance = guidance.completed(description.key, description.key_after, description.value_after)
    rule = host().width_rule(width_rule)
    stages = description.stages if stages is None else stages
    return WrapOptions(
        attach_at,
        tuple(WidthRule(item, min_channels, width_rule, rule) for item in scales),
        branches=tuple(kinds),
        macs=tuple(shares),
        stages=None if stages is None else tuple(stages),
        guidance=guidance or None,
        image=description.image if image is None else image,
        image_only=image_only,
        image_range=description.image_range if image_range is None else image_range,
        tap=tap,
        init=init,
        self_test=self_test,
        timed=timed,
        seed=seed,
    )


def _sizes(attach_at: Any, scale: Any, branch: Any, macs: Any) -> tuple[list[Any], list[str], list[float | None]]:
    """Give width factor, kind and cost of every exit; no kinds and no costs where nothing decides them."""
    is_open = branch is None and (scale is not None or (macs is None and attach_at is None))
    if branch is None:
        branch = "copy" if scale is not None else "subpixel"
    exits = attach_at
    if attach_at is None and isinstance(macs, (list, tuple)):
        if not macs or None in macs:
            raise OptionError(f"macs must be shares where attach_at is left out, got {macs}. Pass e.g. [0.05, 0.1].")
        exits = macs
    scales, kinds, shares = (_per_exit(*item, exits) for item in (("scale", scale), ("branch", branch), ("macs", macs)))
    for kind, share in zip(kinds, shares, strict=True):
        if kind != AUTO:
            host().branch_kind(kind)
        if share is not None and (not is_number(share) or not 0 < share < 1):
            raise OptionError(f"macs must be a share of the backbone in (0, 1), got {share!r}. Pass e.g. 0.1.")
        if share is not None and kind == "copy":
            raise OptionError(
                f"macs must be left out for branch='copy', got {share!r}: its cost follows from scale. Pass "
                "branch='subpixel', or a smaller scale."
            )
    scales = [
        1.0 if scale is None and kind not in ("copy", AUTO) else scale
        for scale, kind in zip(scales, kinds, strict=True)
    ]
    return scales, [] if is_open else kinds, [] if scale is None and macs is None else shares


def _per_exit(name: str, value: Any, exits: Sequence[Any] | None) -> list[Any]:
    """Return one value per exit, one for all if their number is open; a string is a sequence too, but one value."""
    if exits is None:
        if isinstance(value, (list, tuple)):
            raise OptionError(f"{name} must be one value where attach_at is left out, got {value}.")
        return [value]
    values = list(value) if isinstance(value, (list, tuple)) else [value] * len(exits)
    if len(values) != len(exits):
        raise OptionError(f"{name} must be one value or one per exit ({len(exits)}), got {len(values)}.")
    return values


def find_stages(
    generator: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    image: Any = None,
    stages: Sequence[str] | None = None,
    timed: bool = False,
) -> list[Stage]:
    """List the stages l_1..l_N of a generator, with cost, output shape and live values.

    ``retroexit inspect`` prints and draws them.

    Args:
        generator: A trained generator in eval mode.
        example_inputs: Positional inputs that it accepts; an adapter may make them.
        example_kwargs: Keyword inputs.
        image: Key of the image in its output, if it returns several maps.
        stages: Paths of l_1..l_N, where the search should not decide.
        timed: Whether to time the stages on this machine too; ``is_suggested`` then goes by time instead of MACs.

    Returns:
        The stages, in order; those marked ``is_suggested`` are good places for branches.

    Reference: paper section 3.1.
    """
    settings: Any = {"image": image, "stages": stages, "timed": timed}
    return list(read_generator(generator, example_inputs, example_kwargs, **settings).stages)


def read_generator(
    generator: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    image: Any = None,
    stages: Sequence[str] | None = None,
    timed: bool = False,
) -> Decoder:
    """Read a generator as `wrap` does: its stages, and the execution that they were found in."""
    generator = check_generator(generator)
    part = part_to_wrap(generator, has_inputs=example_inputs is not None or bool(example_kwargs))
    generator, description = part.generator, part.description
    if example_inputs is None and not example_kwargs:
        if description.example_inputs is None:
            raise OptionError(
                f"example_inputs are needed, because no adapter makes the inputs of {type(generator).__name__}, "
                f"{forward_signature(generator)}. Pass example_inputs=(...); on the command line, --shape 1,32,16,32 "
                "once per input, or a factory that returns (generator, inputs)."
            )
        example_inputs, example_kwargs = description.example_inputs(generator)
    args, kwargs = example_call(example_inputs, example_kwargs)
    decoder = read_decoder(
        generator,
        args,
        kwargs,
        stages=description.stages if stages is None else stages,
        image=description.image if image is None else image,
        timed=timed,
    )
    cuts = [cut for _, cut in places(decoder, [s for s in decoder.stages if s.is_suggested], "after")]
    if decoder.replayed or not cuts:
        return decoder
    try:  # the pieces have to reproduce the output
        SplitGenerator(generator, decoder, cuts, args, kwargs)
    except RecordingError as error:
        return replace(decoder, replayed=" ".join(str(error).split()))
    return decoder
