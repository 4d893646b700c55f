"""A generator split at its attach points: run it piece by piece, hand over the values at each cut."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from retroexit.core.modules import device_of
from retroexit.core.nested import cloned, flatten, rebuild, tensors
from retroexit.errors import DeviceError, InputMismatchError, ModeError, RecordingError
from retroexit.split.segments import Segment, Tail
from retroexit.stages.decoder import Cut, Decoder
from retroexit.stages.stage import Stage
from retroexit.tracing.record import unobserved

__all__ = ["Begun", "SplitGenerator", "Values", "are_grouped", "group", "merge", "places", "rows_per_sample"]

Values = dict[fx.Node, Any]
Leaves = list[tuple[tuple[Any, ...], Any]]


@dataclass(frozen=True)
class CallForm:
    """What a recording depends on in a call besides shapes: structure, types, and values frozen in the graph.

    Attributes:
        paths: Where tensors are among the arguments.
        dtypes: Their types.
        constants: Path and value of everything that is not a tensor.
    """

    paths: tuple[tuple[Any, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    constants: tuple[tuple[tuple[Any, ...], str], ...]

    @classmethod
    def of(cls, leaves: Leaves) -> CallForm:
        """Describe a call by the leaves of its arguments."""
        inputs = [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
        others = [(path, repr(leaf)) for path, leaf in leaves if not isinstance(leaf, Tensor)]
        return cls(tuple(path for path, _ in inputs), tuple(x.dtype for _, x in inputs), tuple(others))

    def in_precision_of(self, other: CallForm) -> CallForm:
        """Take over the precision of another call's floating-point tensors."""
        pairs = zip(self.dtypes, other.dtypes, strict=False)  # of unequal length only where paths differ too
        both = (b if a.is_floating_point and b.is_floating_point else a for a, b in pairs)
        return replace(self, dtypes=tuple(both))

    def difference(self, recorded: CallForm) -> str:
        """Say how this call differs from the recorded one, and what to do."""
        if self.paths != recorded.paths:
            return (
                f"tensors must be at {list(recorded.paths)} as in the recording, got {list(self.paths)}. "
                "Wrap again with such inputs."
            )
        for path, new, old in zip(self.paths, self.dtypes, recorded.dtypes, strict=True):
            if new != old:
                return (
                    f"the input at {path} must be {old} as in the recording, got {new}. Convert it, or "
                    "wrap again with this type."
                )
        for (path, new_value), (_, old_value) in zip(self.constants, recorded.constants, strict=False):
            if new_value != old_value:
                return (
                    f"{path[-1]} must be {old_value} as in the recording, got {new_value}. Values that are "
                    "not tensors are frozen; wrap again with this value."
                )
        return (
            f"inputs must be {recorded.constants} as recorded, got {self.constants}. Wrap again with these."
        )


@dataclass(frozen=True)
class Begun:
    """A call of the generator that has run to the first cut.

    Attributes:
        values: Values that cross the first cut, by node.
        feature: Feature at the first cut, shape ``(N, C, ...)``.
        samples: Number of samples; fewer than N where frames are folded into the batch.
        key_feature: Feature that the keys are cut from, shape ``(N, C, ...)``.
        args: Positional inputs of the call.
        kwargs: Keyword inputs of the call.
    """

    values: Values
    feature: Tensor
    samples: int
    key_feature: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class SplitGenerator:
    """A recorded generator, cut at its attach points.

    Runs of it do what the generator does, in the same order, so that random draws fall alike.

    Args:
        generator: The trained generator, in eval mode.
        decoder: Its recording.
        cuts: Where it is cut, in order of execution.
        args: The inputs of the recording.
        kwargs: Its keyword inputs.
        key_cut: Where guidance keys are cut from, if that is not the first cut's feature; in front of it.

    Attributes:
        example: The inputs of the recording.
        batched: Rows of one sample in the crossing values and the keys' feature that depend on the batch:
            1 mostly, more where frames are folded in, 0 where samples are not told apart by rows.
        output_rows: Likewise for tensors of the output; ``None`` where one belongs to no sample.
        written: For every cut, positions of the crossing values that its tail writes into.
        divides: Whether samples of one batch can be told apart in all of these.
        any_batch: Whether a batch of another size gives the generator's own output.

    Raises:
        RecordingError: If the pieces do not reproduce the generator.
    """

    def __init__(
        self,
        generator: nn.Module,
        decoder: Decoder,
        cuts: Sequence[Cut],
        args: Any,
        kwargs: Any,
        key_cut: Cut | None = None,
    ) -> None:
        self.generator, self.decoder, self.cuts, self.key_cut = generator, decoder, tuple(cuts), key_cut
        recording = decoder.recording
        leaves = list(flatten((tuple(args), dict(kwargs))))
        self._call = CallForm.of(leaves)
        self.example = (cloned(tuple(args)), cloned(dict(kwargs)))
        self._inputs = [node for node in recording.nodes if node.op == "placeholder"]
        self._modes = [(m, recording.modes[name]) for name, m in generator.named_modules()]
        self._device = device_of(generator)
        self._precision = _precision(generator)
        self._shapes = {_shape_key(leaves)}
        self.batch = _batch_size(leaves)
        self.batched: dict[fx.Node, int] = {}
        self.output_rows, self.divides = list[int | None](), True
        self.written: list[set[int]] = []
        self._around_key: tuple[Segment, Segment] | None = None
        self._crossing = [cut.crossing for cut in self.cuts]
        self._prepare()
        self.any_batch = self._probe_batch(args, kwargs)
        self.divides = self.any_batch and self.divides

    def _prepare(self) -> None:
        """Cut the recording into segments."""
        recording, generator = self.decoder.recording, self.generator
        ends = [0, *(cut.position for cut in self.cuts)]
        entering = [None, *(cut.crossing for cut in self.cuts)]
        self.segments = [
            Segment(recording, generator, begin, cut.position, cut.crossing, enter)
            for begin, cut, enter in zip(ends, self.cuts, entering, strict=False)
        ]
        if self.key_cut is not None:
            key_cut = self.key_cut
            middle, end = key_cut.crossing, self.cuts[0]
            self._around_key = (
                Segment(recording, generator, 0, key_cut.position, middle),
                Segment(recording, generator, key_cut.position, end.position, end.crossing, middle),
            )
        self._result = recording.nodes[-1].args[0]
        leaves = [leaf for _, leaf in flatten(self._result) if isinstance(leaf, fx.Node)]
        self._rest = Segment(recording, generator, ends[-1], len(recording.nodes), leaves, entering[-1])

    def example_now(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of the recording, in the device and precision that the generator has now."""
        precision, device = _precision(self.generator), device_of(self.generator)
        is_converted = precision != self._precision

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            dtype = precision if is_converted and leaf.is_floating_point() else leaf.dtype
            return leaf.to(device, dtype)

        example: tuple[tuple[Any, ...], dict[str, Any]] = rebuild(self.example, move)
        return example

    # Running pieces.

    @property
    def mixes(self) -> bool:
        """Tell whether samples of one batch may leave at different exits."""
        return self.divides

    def start(self, args: Any, kwargs: Any) -> Values:
        """Bind inputs to the recording's placeholders.

        Raises:
            InputMismatchError: If they differ from the recording where that matters.
            ModeError: If train/eval flags changed since.
            DeviceError: If the generator moved since.
        """
        self._check_generator()
        leaves = list(flatten((tuple(args), dict(kwargs))))
        self._check_call(args, kwargs, leaves)
        return self._bind(args, kwargs, leaves)

    def begin(self, args: Any, kwargs: Any) -> Begun:
        """Run the generator to the first cut.

        Raises:
            InputMismatchError, ModeError, DeviceError: See `start`.
        """
        values, key_feature = self._to_first_cut(self.start(args, kwargs))
        feature = self.crossing(values, 0)[0]
        return Begun(
            values, feature, len(feature) // self.rows_per_sample, key_feature, tuple(args), dict(kwargs)
        )

    @property
    def rows_per_sample(self) -> int:
        """Rows of one sample in the first cut's feature, into which frames may be folded."""
        return self.batched.get(self.cuts[0].feature) or 1

    def _to_first_cut(self, values: Values) -> tuple[Values, Tensor]:
        if self.key_cut is None or self._around_key is None:
            values = self.advance(values, 0)
            return values, self.crossing(values, 0)[0]
        before, behind = self._around_key
        values = _run(before, values)
        # What comes next may write into the feature; on every route keys are what the stage returned.
        key_feature: Tensor = values[self.key_cut.feature].clone()
        return _run(behind, values), key_feature

    def key_feature(self, args: Any, kwargs: Any) -> Tensor:
        """Run no farther than to the feature that keys are cut from, and give it.

        Raises:
            InputMismatchError, ModeError, DeviceError: See `start`.
        """
        values = self.start(args, kwargs)
        if self.key_cut is None or self._around_key is None:
            return self.crossing(self.advance(values, 0), 0)[0]
        found: Tensor = _run(self._around_key[0], values)[self.key_cut.feature]
        return found

    def advance(self, values: Values, index: int) -> Values:
        """Run the generator from the cut before to cut ``index`` (from 0); gives the values that cross it."""
        return _run(self.segments[index], values)

    def finish(self, values: Values) -> Any:
        """Run the rest of the generator from the last cut; gives its output."""
        done = _run(self._rest, values)
        return rebuild(self._result, lambda leaf: done[leaf] if isinstance(leaf, fx.Node) else leaf)

    def crossing(self, values: Values, index: int) -> list[Tensor]:
        """List the values that cross a cut, the feature first."""
        return [values[node] for node in self._crossing[index]]

    def select(self, values: Values, rows: Tensor) -> Values:
        """Keep some samples of a batch."""
        return {
            n: v.index_select(0, group(rows, self.batched[n]).to(v.device)) if n in self.batched else v
            for n, v in values.items()
        }

    def tail(self, index: int, *, share: bool = False) -> Tail:
        """Copy everything after a cut as a module; on request with the generator's own weights, to read."""
        return Tail(self.decoder.recording, self.generator, self.cuts[index], share=share)

    def value_at(self, cut: Cut, args: Any, kwargs: Any) -> Tensor:
        """Run the generator up to another cut; gives its feature ``(N, C, ...)``."""
        segment = Segment(self.decoder.recording, self.generator, 0, cut.position, [cut.feature])
        found: Tensor = _run(segment, self.start(args, kwargs))[cut.feature]
        return found

    def place_of(self, image: Any) -> Tensor:
        """Find the image in an output of the generator or of a branch."""
        for key in self.decoder.image_path:
            image = image[key] if isinstance(image, (tuple, list, dict)) else getattr(image, key)
        found: Tensor = image
        return found

    @property
    def cuda_devices(self) -> list[torch.device]:
        """Devices besides the CPU that the generator draws random numbers on."""
        return [self._device] if self._device.type == "cuda" else []

    # Checks.

    def _bind(self, args: Any, kwargs: Any, leaves: Leaves | None = None) -> Values:
        by_path = dict(flatten((tuple(args), dict(kwargs))) if leaves is None else leaves)
        paths = self.decoder.recording.inputs
        return {node: by_path[path] for node, path in zip(self._inputs, paths, strict=True)}

    def _check_generator(self) -> None:
        for module, mode in self._modes:
            if module.training != mode:
                state = "train" if module.training else "eval"
                raise ModeError(
                    f"{type(module).__name__} must be in {'train' if mode else 'eval'} mode as in the "
                    "recording, "
                    f"got {state} mode. Set the generator's mode back, or wrap it again.",
                    module,
                )
        first = next(chain(self.generator.parameters(), self.generator.buffers()), None)
        device = self._device if first is None else first.device
        if device != self._device:
            raise DeviceError(
                f"the generator must be on {self._device} as in the recording, got {device}. Move it "
                "first, then "
                "wrap it again (retroexit.load keeps the trained branches).",
                device,
            )

    def check_precision(self, branch: nn.Module) -> None:
        """Refuse a branch that was left behind when the generator was converted.

        Raises:
            DeviceError: If it was.
        """
        own, left = _precision(self.generator), _precision(branch)
        if own != self._precision and left == self._precision:
            raise DeviceError(
                f"generator and branch must have one precision, got {own} and {left}. Convert both: "
                f"model.to({own}).",
                branch,
            )

    def _check_call(self, args: Any, kwargs: Any, leaves: Leaves) -> None:
        call = CallForm.of(leaves)
        # A generator that was converted runs in its new precision: that is checked as a new shape is.
        if call != self._call and not (
            _precision(self.generator) != self._precision and call.in_precision_of(self._call) == self._call
        ):
            raise InputMismatchError(call.difference(self._call), (args, kwargs))
        self._check_shape(args, kwargs, leaves)

    def _check_shape(self, args: Any, kwargs: Any, leaves: Leaves) -> None:
        key = _shape_key(leaves)
        if key in self._shapes:
            batch = _batch_size(leaves)
            if batch != self.batch and not self.any_batch:
                raise InputMismatchError(
                    f"the batch size must be {self.batch}, which the generator's forward fixes, got {batch}. "
                    "Wrap again with example inputs of this batch size.",
                    batch,
                )
            return
        self._verify_shape(args, kwargs)
        self._shapes.add(key)

    def _verify_shape(self, args: Any, kwargs: Any) -> None:
        """Compare pieces and generator once on inputs of a new shape or precision."""
        shapes = [tuple(t.shape) for t in tensors((args, kwargs))]
        precision = _precision(self.generator)
        what = f"shapes {shapes}" if precision == self._precision else f"shapes {shapes} in {precision}"
        try:
            agrees = self._agrees(args, kwargs)
        except Exception as error:
            raise InputMismatchError(
                f"the recorded forward fixes sizes or types and raises {type(error).__name__}: "
                f"{error} for inputs "
                f"of {what}. Wrap again with such example inputs.",
                shapes,
            ) from error
        if not agrees:
            raise InputMismatchError(
                f"the recorded forward gives another output than the generator for inputs of {what}. "
                "Wrap again "
                "with such example inputs.",
                shapes,
            )

    def _agrees(self, args: Any, kwargs: Any, shapes: dict[Any, Any] | None = None) -> bool:
        """Compare pieces and generator; notes the shapes of what `_look` sees, where a place is given."""
        with torch.no_grad(), unobserved(self.generator):
            want = tensors(self.generator(*cloned(args), **cloned(kwargs)))
        seen, got = self._look((args, kwargs), lambda value: tuple(value.shape))
        if shapes is not None:
            shapes.update(seen)
        return len(want) == len(got) and all(
            w.shape == g.shape
            and w.dtype == g.dtype
            and torch.allclose(w.float(), g.float(), rtol=1e-4, atol=1e-5)
            for w, g in zip(want, got, strict=True)
        )

    def _probe_batch(self, args: Any, kwargs: Any) -> bool:
        """Run with one more sample and other numbers; see what is batched and whether anything was frozen."""
        batch = self.batch

        def other(leaf: Any) -> Any:
            return leaf * 0.9 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        def grow(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != batch:
                return leaf
            return torch.cat([other(leaf), other(other(leaf[:1]))])

        few = rebuild((tuple(args), dict(kwargs)), other)
        many, shapes = rebuild((tuple(args), dict(kwargs)), grow), dict[Any, Any]()
        if not self._trouble(many[0], many[1], shapes):
            cuts = self.cuts if self.key_cut is None else (self.key_cut, *self.cuts)
            recorded: dict[Any, Any] = {
                n: n.meta["shape"] for cut in cuts for n in cut.crossing if n.meta["shape"]
            }
            outputs = enumerate(tensors(self.decoder.recording.output))
            recorded |= {i: tuple(x.shape) or None for i, x in outputs}
            self._find_rows(few, many, recorded, shapes)
            return True
        trouble = self._trouble(*few)
        if trouble:
            reads = [read.line for read in self.decoder.recording.reads]
            frozen = f" Values read out of tensors are frozen: {'; '.join(reads[:3])}." if reads else ""
            raise RecordingError(
                f"the recorded execution of {type(self.generator).__name__} {trouble} on other "
                f"inputs.{frozen} "
                "Attach branches to a submodule whose forward does not depend on the data's values.",
                self.generator,
            )
        return False

    def _trouble(self, args: Any, kwargs: Any, shapes: dict[Any, Any] | None = None) -> str:
        """Say how the pieces differ from the generator on these inputs; empty when they do not."""
        try:
            return "" if self._agrees(args, kwargs, shapes) else "gives another output than the generator"
        except Exception as error:
            return f"raises {type(error).__name__}: {error}"

    def _find_rows(
        self, small: tuple[Any, Any], large: tuple[Any, Any], shapes: dict[Any, Any], grown: dict[Any, Any]
    ) -> None:
        """See which rows belong to which sample, from a batch and the same with one more sample."""
        rows = rows_per_sample(shapes, grown, _batch_size(list(flatten(small))))
        self.batched = {node: size for node, size in rows.items() if isinstance(node, fx.Node)}
        self.output_rows = [rows.get(name) for name in shapes if isinstance(name, int)]
        self.divides = all(rows.values())
        folded = [name for name, size in rows.items() if size > 1]
        if folded and self.divides:
            few, many = self._look(small, Tensor.clone)[0], self._look(large, Tensor.clone)[0]
            self.divides = all(name in many and are_grouped(few[name], many[name]) for name in folded)

    def _look(
        self, given: tuple[Any, Any], look: Callable[[Tensor], Any]
    ) -> tuple[dict[Any, Any], list[Tensor]]:
        """Run the pieces and look at what crosses each cut, by node, and at the output, by number."""
        found: dict[Any, Any] = {}

        def note(values: Iterable[tuple[Any, Any]]) -> None:
            found.update((n, look(v)) for n, v in values if isinstance(v, Tensor) and v.dim() > 0)

        with torch.no_grad(), unobserved(self.generator):
            values = self._bind(*cloned(given))
            if self.key_cut is not None:
                values, key_feature = self._to_first_cut(values)
                note([(self.key_cut.feature, key_feature)])
            for index in range(len(self.cuts)):
                values = values if index == 0 and self.key_cut is not None else self.advance(values, index)
                note(values.items())
            outputs = tensors(self.finish(values))
            found.update((i, look(v) if v.dim() > 0 else None) for i, v in enumerate(outputs))
        return found, outputs


def _shape_key(leaves: Leaves) -> tuple[Any, ...]:
    return tuple((x.dtype, *x.shape[1:]) for _, x in leaves if isinstance(x, Tensor))


def _batch_size(leaves: Leaves) -> int:
    return next((x.shape[0] for _, x in leaves if isinstance(x, Tensor) and x.dim() > 0), 1)


def places(
    decoder: Decoder, stages: Iterable[Stage], tap: Literal["after", "before"]
) -> list[tuple[Stage, Cut]]:
    """Cut a decoder at several stages, in order of execution."""
    return sorted(((stage, decoder.cut(stage, tap)) for stage in stages), key=lambda pair: pair[1].position)


def _run(segment: Segment, values: Values) -> Values:
    return dict(zip(segment.keep, segment(*(values[node] for node in segment.enter)), strict=True))


def _precision(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


# Rows of a value that belong to one sample: mostly one; more where frames are folded into the batch.


def rows_per_sample(
    small: Mapping[Hashable, tuple[int, ...]], large: Mapping[Hashable, tuple[int, ...]], batch: int
) -> dict[Hashable, int]:
    """Compare shapes at two batch sizes; gives the rows of one sample, for values that depend on the batch.

    Args:
        small: Shapes by name, at a batch of ``batch``.
        large: The same at ``batch + 1``.
        batch: The smaller batch size.

    Returns:
        Rows of one sample, 0 where the first axis is no multiple of the batch or another axis grows too.
        Values of the same shape at both sizes belong to no sample and are left out.
    """
    found: dict[Hashable, int] = {}
    for name, shape in small.items():
        other = large.get(name, shape)
        if shape == other:
            continue
        rows = other[0] - shape[0] if shape[1:] == other[1:] else 0
        found[name] = rows if rows > 0 and shape[0] == rows * batch else 0
    return found


def are_grouped(small: Tensor, large: Tensor) -> bool:
    """Tell whether rows of one sample lie side by side: one more sample then leaves the first rows alone.

    Args:
        small: A value with several rows per sample.
        large: The same for a batch that begins with the same samples.
    """
    first = small[:1].expand_as(small)
    if torch.allclose(small.float(), first.float(), rtol=1e-3, atol=1e-5):
        return False  # all rows alike say nothing about their order
    return torch.allclose(small.float(), large[: len(small)].float(), rtol=1e-3, atol=1e-5)


def group(rows: Tensor, size: int) -> Tensor:
    """Write out the rows of some samples, each with a group of ``size`` rows.

    >>> group(torch.tensor([0, 2]), 3).tolist()
    [0, 1, 2, 6, 7, 8]
    """
    return (rows[:, None] * size + torch.arange(size, device=rows.device)).flatten()


def merge(parts: list[tuple[Tensor, Any]], count: int, sizes: Sequence[int | None]) -> Any:
    """Put the outputs of parts of a batch back into the batch's order."""
    if len(parts) == 1:
        return parts[0][1]
    outputs = [tensors(output) for _, output in parts]
    merged: list[Tensor] = []
    for size, *leaves in zip(sizes, *outputs, strict=True):
        if size is None:
            merged.append(leaves[0])
            continue
        whole = leaves[0].new_empty(count * size, *leaves[0].shape[1:])
        for leaf, (rows, _) in zip(leaves, parts, strict=True):
            whole[group(rows, size).to(whole.device)] = leaf.detach()
        merged.append(whole)
    rest = iter(merged)
    return rebuild(parts[0][1], lambda leaf: next(rest) if isinstance(leaf, Tensor) else leaf)
