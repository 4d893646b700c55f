"""A generator cut at its attach points: run it piece by piece, with the values that cross each cut."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from retroexit.core.modules import device_of, precision_of
from retroexit.core.nested import clone_strided, cloned, flatten, rebuild, tensors
from retroexit.core.samples import conversion_advice, smaller_maps
from retroexit.core.writes import WriteWatch, differentiable_writes, overwrites_saved
from retroexit.errors import InputMismatchError, RecordingError
from retroexit.split.rows import are_grouped, group, rows_per_sample
from retroexit.split.segments import Segment, Tail, needed_for
from retroexit.stages.decoder import Cut, Decoder
from retroexit.stages.stage import Stage
from retroexit.tracing.record import unobserved

__all__ = ["Begun", "SplitGenerator", "Values", "lacks_batch_axis", "places"]

logger = logging.getLogger(__name__)

Values = dict[fx.Node, Any]
Leaves = list[tuple[tuple[Any, ...], Any]]
CallForm = dict[tuple[Any, ...], torch.dtype | str]
"""What a recording depends on in a call besides shapes, by path: types of tensors, and frozen values."""


@dataclass(frozen=True)
class Begun:
    """A call of the generator that has run to the first cut.

    Attributes:
        values: Values that cross the first cut, by node.
        feature: Feature at the first cut, shape ``(N, C, ...)``.
        samples: Number of samples; fewer than N if frames are folded into the batch.
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

    The pieces do what the generator does in the same order, random draws included.

    Args:
        generator: The trained generator, in eval mode.
        decoder: Its recording.
        cuts: Where it is cut, in order of execution.
        args: The inputs of the recording.
        kwargs: Its keyword inputs.
        key_cut: Cut in front of the first one whose feature guidance keys are made from; the first one's
            feature if ``None``.

    Attributes:
        example: The inputs of the recording.
        stems: The segments up to the first cut: one, or one up to the keys' feature and one behind it.
        segments: The segments up to each cut.
        rest: The segment behind the last cut.
        batched: For the crossing values that depend on the batch, rows of one sample: 1, more if frames are
            folded in, 0 if samples cannot be told apart by rows.
        output_rows: The same for the tensors of the output, by path; ``None`` for one that belongs to no sample.
        written: For every cut, positions of the crossing values that its tail writes into.
        writes: Whether the stages up to the last cut write into tensors that their backward needs.
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
        self._crossing = [cut.crossing for cut in self.cuts]
        leaves = list(flatten((tuple(args), dict(kwargs))))
        self.example = (cloned(tuple(args)), cloned(dict(kwargs)))
        self._form = _call_form(leaves)
        self._shapes = {_shape_key(leaves)}
        self._axes = {path: x.dim() for path, x in leaves if isinstance(x, Tensor)}
        self.batch = _batch_size(leaves)
        self._device = device_of(generator)
        self._precision = precision_of(generator)
        self.batched: dict[fx.Node, int] = {}
        self.output_rows, self.divides = dict[tuple[Any, ...], int | None](), True
        self.written: list[set[int]] = []
        self.writes, self._is_exact = False, False
        self._prepare()
        self.any_batch = self._probe_batch()
        if not self.any_batch:
            leaves = [(path, x) for path, x in flatten(decoder.recording.output) if isinstance(x, Tensor) and x.dim()]
            self.output_rows = {path: 1 if len(x) == self.batch else None for path, x in leaves}
        self.divides = self.any_batch and self.divides
        decoder.recording.snapshot.drop_changed()

    def _prepare(self) -> None:
        """Cut the recording into segments."""
        recording, generator = self.decoder.recording, self.generator
        self._inputs = [node for node in recording.nodes if node.op == "placeholder"]
        self._result = recording.nodes[-1].args[0]
        *self.segments, self.rest = self.pieces(generator)
        self.stems: tuple[Segment, ...] = (self.segments[0],)
        if self.key_cut is not None:
            (key, middle), end = (self.key_cut.position, self.key_cut.crossing), self.cuts[0]
            before = Segment(recording, generator, 0, key, middle, self._inputs)
            behind = Segment(recording, generator, key, end.position, end.crossing, middle)
            self.stems = (before, behind)

    def pieces(self, modules: nn.Module, tail: Cut | None = None) -> list[Segment]:
        """Cut the recording, or a tail of it, into segments that run the modules of the generator or of that tail."""
        recording = self.decoder.recording
        result = self._result if tail is None else self.decoder.result
        leaves = [leaf for _, leaf in flatten(result) if isinstance(leaf, fx.Node)]
        ends = [(cut.position, cut.crossing) for cut in self.cuts] + [(len(recording.nodes), tuple(leaves))]
        begins = [(0, tuple(self._inputs)), *ends[:-1]]
        pairs = list(zip(begins, ends, strict=True))[0 if tail is None else self.cuts.index(tail) + 1 :]
        among = None if tail is None else set(needed_for(result, tail.rest))
        return [Segment(recording, modules, begin, end, keep, enter, among) for (begin, enter), (end, keep) in pairs]

    def is_current(self, branches: nn.Module) -> bool:
        """Return whether generator and branches have the device and precision of the recording."""
        recorded = (self._device, self._precision)
        return all((device_of(module), precision_of(module)) == recorded for module in (self.generator, branches))

    def example_now(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of the recording, in the device and precision that the generator has now."""
        precision, device = precision_of(self.generator), device_of(self.generator)
        is_converted = precision != self._precision

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            dtype = precision if is_converted and leaf.is_floating_point() else leaf.dtype
            return leaf.to(device, dtype)

        example: tuple[tuple[Any, ...], dict[str, Any]] = rebuild(self.example, move)
        return example

    # Running pieces.

    def _pass(self, segment: Segment, values: Values) -> Values:
        inputs = [values[node] for node in segment.enter]
        with self._gradient_of(inputs):
            if self.writes and torch.is_grad_enabled():  # autograd refuses to write into a leaf
                inputs = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
            return dict(zip(segment.keep, segment(*inputs), strict=True))

    def _gradient_of(self, inputs: Iterable[Any]) -> AbstractContextManager[Any]:
        """Switch gradients off, unless one of the inputs requires one; then they are right in spite of writes."""
        requires_grad = any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        if not (torch.is_grad_enabled() and requires_grad):
            return torch.no_grad()
        return differentiable_writes() if self.writes and not torch.compiler.is_compiling() else nullcontext()

    @property
    def mixes(self) -> bool:
        """Whether samples of one batch may leave at different exits."""
        return self.divides

    @property
    def rows_per_sample(self) -> int:
        """Rows of one sample in the first cut's feature, into which frames may be folded."""
        return self.batched.get(self.cuts[0].feature) or 1

    def start(self, args: Any, kwargs: Any) -> Values:
        """Bind inputs to the recording's placeholders.

        Raises:
            InputMismatchError: If they differ from the recording in structure, types or frozen values.
            ModeError: If train/eval flags have changed.
            GeneratorError: If modules, hooks or settings have changed.
            DeviceError: If the generator was moved.
        """
        leaves = list(flatten((tuple(args), dict(kwargs))))
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            torch.compiler.disable(self._check)(args, kwargs, leaves)  # guards of a graph would skip hooks
        else:
            self._check(args, kwargs, leaves)
        return self._bind(args, kwargs, leaves)

    def begin(self, args: Any, kwargs: Any) -> Begun:
        """Run the generator to the first cut.

        Raises:
            InputMismatchError, ModeError, DeviceError: See `start`.
        """
        values, key_feature = self._to_first_cut(self.start(args, kwargs))
        feature = self.crossing(values, 0)[0]
        samples = feature.shape[0] // self.rows_per_sample  # len() would fix the size in an export
        return Begun(values, feature, samples, key_feature, tuple(args), dict(kwargs))

    def _to_first_cut(self, values: Values) -> tuple[Values, Tensor]:
        """Run from the inputs to the first cut; returns also the keys' feature."""
        if self.key_cut is None:
            values = self.advance(values, 0)
            return values, self.crossing(values, 0)[0]
        values = self._pass(self.stems[0], values)
        # The next segment may write into the feature.
        key_feature: Tensor = values[self.key_cut.feature].clone()
        return self._pass(self.stems[1], values), key_feature

    def key_feature(self, args: Any, kwargs: Any) -> Tensor:
        """Run only to the feature that keys are cut from, and return it.

        Raises:
            InputMismatchError, ModeError, DeviceError: See `start`.
        """
        values = self.start(args, kwargs)
        if self.key_cut is None:
            return self.crossing(self.advance(values, 0), 0)[0]
        key_feature: Tensor = self._pass(self.stems[0], values)[self.key_cut.feature]
        return key_feature

    def advance(self, values: Values, index: int) -> Values:
        """Run from the cut before to cut ``index`` (from 0); returns the values that cross it."""
        return self._pass(self.segments[index], values)

    def finish(self, values: Values) -> Any:
        """Run from the last cut to the end; returns the generator's output."""
        done = self._pass(self.rest, values)
        return self.output([done[node] for node in self.rest.keep])

    def output(self, leaves: Sequence[Any]) -> Any:
        """Arrange what the last piece, the generator's or a tail's, returns in the structure of the output."""
        keep = self.rest.keep if len(leaves) == len(self.rest.keep) else (self.decoder.image,)
        by_node = dict(zip(keep, leaves, strict=True))
        return rebuild(self._result, lambda leaf: by_node.get(leaf) if isinstance(leaf, fx.Node) else leaf)

    def crossing(self, values: Values, index: int) -> list[Tensor]:
        """List the values that cross a cut, the feature first."""
        return [values[node] for node in self._crossing[index]]

    def select(self, values: Values, rows: Tensor) -> Values:
        """Keep some samples of a batch."""
        return {
            n: v.index_select(0, group(rows, self.batched[n]).to(v.device, non_blocking=True))
            if n in self.batched
            else v
            for n, v in values.items()
        }

    def tail(self, index: int, *, share: bool = False) -> Tail:
        """Copy everything after a cut as a module; with ``share`` it holds the generator's own weights."""
        decoder = self.decoder
        constants = decoder.recording.constants
        return Tail(constants, self.generator, self.cuts[index], decoder.result, share=share)

    def value_at(self, cut: Cut, args: Any, kwargs: Any) -> Tensor:
        """Run the generator up to another cut; returns its feature ``(N, C, ...)``."""
        segment = Segment(self.decoder.recording, self.generator, 0, cut.position, [cut.feature])
        feature: Tensor = self._pass(segment, self.start(args, kwargs))[cut.feature]
        return feature

    def place_of(self, output: Any) -> Tensor:
        """Return the image in an output of the generator or of a branch."""
        for key in self.decoder.image_path:
            output = output[key] if isinstance(output, (tuple, list, dict)) else getattr(output, key)
        image: Tensor = output
        return image

    @property
    def cuda_devices(self) -> list[torch.device]:
        """Devices besides the CPU that the generator draws random numbers on."""
        return [self._device] if self._device.type == "cuda" else []

    def states(self, *, self_test: bool = False, count: int | None = None) -> list[list[Tensor]]:
        """Run the example inputs up to each cut; sets ``written`` and ``writes``.

        Args:
            self_test: Whether to check that the tail behind each cut reproduces the generator's output.
            count: Number of cuts; all if ``None``.

        Returns:
            For each cut the values that cross it.

        Raises:
            RecordingError: If the self-test fails.
        """
        states, watch = list[list[Tensor]](), WriteWatch()
        with torch.no_grad(), self._unobserved():
            if not self_test or self.decoder.replayed or not self._run_through(states, watch):
                expected = self._given(self._generator_output(*self.example)) if self_test else None
                self._run_each(states, watch, expected, len(self.cuts) if count is None else count)
        if watch.seen:
            with self._unobserved():
                self.writes = overwrites_saved(lambda: self._differentiate(len(states)))
        return states

    def _run_through(self, states: list[list[Tensor]], watch: WriteWatch) -> bool:
        """Run the example once, behind the first cut in its tail's copies of the modules; compare the output.

        The recording's output need not be the generator's: recorded attention does not use its fused kernel.
        """
        values = self.start(*cloned(self.example))
        with watch:
            values = self.advance(values, 0)
        crossed: list[list[tuple[Tensor, int]]] = []
        for piece in self.pieces(self.tail(0, share=True), self.cuts[0]):
            crossing = self.crossing(values, len(states))
            states.append([clone_strided(value) for value in crossing])
            crossed.append([(value, value._version) for value in crossing])
            with watch if len(states) < len(self.cuts) else nullcontext():
                values = self._pass(piece, values)
        output = self._given(self.output(list(values.values())))
        self.written = [{i for i, (value, version) in enumerate(c) if value._version != version} for c in crossed]
        recorded = self._given(self.decoder.recording.output)
        return (self._is_exact and _are_equal(output, recorded)) or _are_equal(
            output, self._given(self._generator_output(*self.example))
        )

    def _run_each(
        self, states: list[list[Tensor]], watch: WriteWatch, expected: list[Tensor] | None, count: int
    ) -> None:
        """Run the example to each cut, and test each tail by itself."""
        states.clear()
        values = self.start(*cloned(self.example))
        for index in range(count):
            with watch:
                values = self.advance(values, index)
            states.append([clone_strided(value) for value in self.crossing(values, index)])
            if expected is not None:
                self._self_test(index, list(map(clone_strided, states[-1])), expected)
        self.written = [set(range(len(state))) for state in states] if count == len(self.cuts) else self.written

    def _differentiate(self, count: int) -> None:
        example = cloned(self.example)
        for value in tensors(example):
            value.requires_grad_(value.is_floating_point())
        values = self.start(*example)
        for index in range(count):
            values = self.advance(values, index)

    # Checks.

    def check_generator(self) -> None:
        """Refuse a generator whose modes, modules, hooks or settings have changed since it was recorded.

        Raises:
            GeneratorError: With the module and what changed.
        """
        self.decoder.recording.snapshot.check()

    def _bind(self, args: Any, kwargs: Any, leaves: Leaves | None = None) -> Values:
        by_path = dict(flatten((tuple(args), dict(kwargs))) if leaves is None else leaves)
        paths = self.decoder.recording.inputs
        return {node: by_path[path] for node, path in zip(self._inputs, paths, strict=True)}

    def _check(self, args: Any, kwargs: Any, leaves: Leaves) -> None:
        self.check_generator()
        form = _call_form(leaves)
        if form != self._form:
            advice = conversion_advice((args, kwargs))
            raise InputMismatchError(_difference(form, self._form) + advice)
        for path, x in leaves:
            axes = self._axes.get(path)
            if isinstance(x, Tensor) and x.dim() != axes:
                lacks_axis = x.dim() + 1 == axes
                advice = "Add the batch axis: x[None]." if lacks_axis else "Wrap again with such inputs."
                raise InputMismatchError(
                    f"the input at {path} must have {axes} axes as in the recording, got shape {tuple(x.shape)}. "
                    f"{advice}"
                )
        if not (torch.compiler.is_exporting() and self.any_batch):  # sizes are symbols then
            self._check_shape(args, kwargs, leaves)

    def _check_shape(self, args: Any, kwargs: Any, leaves: Leaves) -> None:
        """Compare pieces and generator once on inputs of a new shape."""
        key = _shape_key(leaves)
        batch = _batch_size(leaves)
        if key not in self._shapes:
            shapes = [tuple(t.shape) for t in tensors((args, kwargs))]
            problem = self._mismatch(args, kwargs)[0]
            if problem:
                raise InputMismatchError(
                    f"the recorded forward fixes sizes or types: it {problem} for inputs of shapes "
                    f"{shapes}. Wrap again with such example inputs."
                )
            self._shapes.add(key)
        elif batch != self.batch and not self.any_batch:
            raise InputMismatchError(
                f"the batch size must be {self.batch}, which the generator's forward fixes, got {batch}. "
                "Wrap again with example inputs of this batch size."
            )

    def _unobserved(self) -> AbstractContextManager[None]:
        return unobserved(self.generator, self.decoder.recording.draws)

    def _given(self, output: Any) -> list[Tensor]:
        """List the tensors of an output that an exit gives."""
        return [self.place_of(output)] if self.decoder.image_only else tensors(output)

    def _generator_output(self, args: Any, kwargs: Any) -> Any:
        with torch.no_grad(), self._unobserved():
            return self.generator(*cloned(args), **cloned(kwargs))

    def _self_test(self, index: int, crossing: list[Tensor], expected: list[Tensor]) -> None:
        """Check that the unchanged tail behind a cut gives the generator's output bit for bit.

        The segments before it have just run, so that random draws are equal.
        """
        with self._unobserved():
            outputs = self._given(self.tail(index, share=True)(*crossing))
        if not _are_equal(outputs, expected):
            pairs = [(a, b) for a, b in zip(outputs, expected, strict=False) if a.shape == b.shape]
            differences = (float((a.float() - b.float()).abs().max()) for a, b in pairs)
            raise RecordingError(
                f"the recorded rest of the generator behind cut {index + 1} does not reproduce its output "
                f"(largest difference {max(differences, default=float('nan')):.3g}). Attach elsewhere, or pass "
                "self_test=False if the generator draws random numbers behind this place in an order of its own."
            )

    def _mismatch(self, args: Any, kwargs: Any) -> tuple[str, dict[Any, Tensor]]:
        """Compare pieces and generator; returns how they differ (empty if not), and what `_look` saw."""
        try:
            expected = tensors(self._generator_output(args, kwargs))
            seen, outputs = self._look(args, kwargs)
        except Exception as error:
            return f"raises {type(error).__name__}: {error}", {}
        self._is_exact = _are_equal(outputs, expected)
        agrees = len(expected) == len(outputs) and all(
            a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)
            for a, b in zip(expected, outputs, strict=True)
        )
        return "" if agrees else "gives another output than the generator", seen

    def _look(self, args: Any, kwargs: Any) -> tuple[dict[Any, Tensor], list[Tensor]]:
        """Run the pieces; returns copies of what crosses each cut, by node, and of the output, by number."""
        seen: dict[Any, Tensor] = {}
        with torch.no_grad(), self._unobserved():
            values, key_feature = self._to_first_cut(self._bind(cloned(args), cloned(kwargs)))
            if self.key_cut is not None:
                seen[self.key_cut.feature] = key_feature
            for index in range(len(self.cuts)):
                values = self.advance(values, index) if index > 0 else values
                seen.update((n, v.clone()) for n, v in values.items() if isinstance(v, Tensor))
            outputs = tensors(self.finish(values))
        return seen | dict(enumerate(outputs)), outputs

    def _probe_batch(self) -> bool:
        """Run other numbers, and one more sample: see what is batched and whether anything is frozen.

        Smaller maps show it as well, where the generator takes them.
        """
        other, larger = self._other_inputs()
        for shrink in (smaller_maps, lambda inputs: inputs):
            problem, large = self._mismatch(*shrink(larger)) if shrink(larger) is not None else ("", {})
            if large and not problem:
                self._find_rows(self._look(*shrink(other))[0], large)
                return True
        problem = self._mismatch(*other)[0]
        if problem:
            reads = [read.line for read in self.decoder.recording.reads]
            frozen = f" Values read out of tensors are frozen: {'; '.join(reads[:3])}." if reads else ""
            raise RecordingError(
                f"the recorded execution of {type(self.generator).__name__} {problem} on other inputs.{frozen} "
                "Attach branches to a submodule whose forward does not depend on the data's values."
            )
        return False

    def _other_inputs(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Example inputs with other numbers; and the same with one more sample."""

        def other(leaf: Any) -> Any:
            return leaf * 0.9 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        def larger(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != self.batch:
                return leaf
            return torch.cat([other(leaf), other(other(leaf[:1]))])

        return rebuild(self.example, other), rebuild(self.example, larger)

    def _find_rows(self, small: dict[Any, Tensor], large: dict[Any, Tensor]) -> None:
        """Find the rows that belong to one sample, from a batch and the same with one more sample."""
        shapes, grown = ({name: tuple(v.shape) for name, v in seen.items()} for seen in (small, large))
        rows = rows_per_sample(shapes, grown, self.batch)
        self.batched = {node: size for node, size in rows.items() if isinstance(node, fx.Node)}
        paths = [path for path, leaf in flatten(self.decoder.recording.output) if isinstance(leaf, Tensor)]
        numbers = [name for name in small if isinstance(name, int)]
        self.output_rows = {path: rows.get(number) for path, number in zip(paths, numbers, strict=True)}
        self.divides = all(rows.values()) and all(
            are_grouped(small[name], large[name]) for name, size in rows.items() if size > 1
        )


def lacks_batch_axis(generator: nn.Module, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether inputs are one sample, of which the generator takes a batch of one and of two, but no further rows."""

    def render(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        changed = rebuild((tuple(args), dict(kwargs)), lambda x: change(x) if torch.is_tensor(x) else x)
        with torch.no_grad(), unobserved(generator):
            return [x for x in tensors(generator(*changed[0], **changed[1])) if x.dim()]

    def grows(small: list[Tensor], large: list[Tensor]) -> bool:
        return all((len(a) + 1, *a.shape[1:]) == b.shape for a, b in zip(small, large, strict=True))

    try:
        if grows([x for x in tensors(output) if x.dim()], render(lambda x: torch.cat([x, x[:1]]) if x.dim() else x)):
            return False
    except Exception:
        logger.debug("the generator does not take one more row", exc_info=True)
    try:
        return grows(render(lambda x: x[None]), render(lambda x: torch.stack([x, x])))
    except Exception:
        return False


def places(decoder: Decoder, stages: Iterable[Stage], tap: Literal["after", "before"]) -> list[tuple[Stage, Cut]]:
    """Cut a decoder at several stages, in order of execution."""
    return sorted(((stage, decoder.cut(stage, tap)) for stage in stages), key=lambda pair: pair[1].position)


def _are_equal(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    return len(outputs) == len(expected) and all(map(torch.equal, outputs, expected))


# The form of a call.


def _shape_key(leaves: Leaves) -> tuple[Any, ...]:
    return tuple((x.dtype, *x.shape[1:]) for _, x in leaves if isinstance(x, Tensor))


def _batch_size(leaves: Leaves) -> int:
    return next((x.shape[0] for _, x in leaves if isinstance(x, Tensor) and x.dim() > 0), 1)


def _call_form(leaves: Leaves) -> CallForm:
    return {path: leaf.dtype if isinstance(leaf, Tensor) else repr(leaf) for path, leaf in leaves}


def _difference(form: CallForm, recorded: CallForm) -> str:
    """Describe the first difference between a call and the recorded one; empty if there is none."""
    paths, expected_paths = ([path for path, x in f.items() if isinstance(x, torch.dtype)] for f in (form, recorded))
    if set(paths) != set(expected_paths):
        return f"tensors must be at {expected_paths} as in the recording, got {paths}. Wrap again with such inputs."
    for path in {**recorded, **form}:
        value, expected = form.get(path, "nothing"), recorded.get(path, "nothing")
        if isinstance(value, torch.dtype) and isinstance(expected, torch.dtype):
            problem = f"the input at {path}"
            advice = "Convert it, or wrap again with this type."
        else:
            problem = str(path[-1])
            advice = "Values that are not tensors are frozen; wrap again with this value."
        if value != expected:
            return f"{problem} must be {expected} as in the recording, got {value}. {advice}"
    return ""
