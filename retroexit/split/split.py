"""A generator split at its attach points: run it piece by piece, hand over the values at each cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from retroexit.core.modules import device_of
from retroexit.core.nested import cloned, flatten, rebuild, tensors
from retroexit.errors import DeviceError, InputMismatchError, ModeError, RecordingError
from retroexit.split.batch_rows import are_grouped, group, recorded_shapes, rows_per_sample
from retroexit.split.call_signature import CallForm
from retroexit.split.segments import Cut, Segment, Tail
from retroexit.stages.decoder import Decoder, Stage
from retroexit.tracing.record import unobserved

__all__ = ["Begun", "SplitGenerator", "Values"]

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Begun:
    """A call of the generator that has run to the first cut.

    Attributes:
        values: Values that cross the first cut, by node.
        key_feature: Feature that the keys are cut from, shape ``(N, C, ...)``.
        args: Positional inputs of the call.
        kwargs: Keyword inputs of the call.
    """

    values: Values
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
        self._call = CallForm.of(args, kwargs)
        self.example = (cloned(tuple(args)), cloned(dict(kwargs)))
        self._inputs = [node for node in recording.nodes if node.op == "placeholder"]
        self._modes = [(m, recording.modes[name]) for name, m in generator.named_modules()]
        self._device = device_of(generator)
        self._precision = _precision(generator)
        self._shapes = {self._shape_key(args, kwargs)}
        self.batch = self._batch_size(args, kwargs)
        self.batched: dict[fx.Node, int] = {}
        self.output_rows, self.divides = list[int | None](), True
        self._around_key: tuple[Segment, Segment] | None = None
        self._prepare()
        self.any_batch = self._probe_batch(args, kwargs)
        self.divides = self.any_batch and self.divides

    def _prepare(self) -> None:
        """Cut the recording into segments."""
        recording, generator = self.decoder.recording, self.generator
        ends = [0, *(cut.position for cut in self.cuts)]
        entering = [(), *(cut.crossing for cut in self.cuts)]
        self._segments = [
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
        self._check_call(args, kwargs)
        return self._bind(args, kwargs)

    def begin(self, args: Any, kwargs: Any) -> Begun:
        """Run the generator to the first cut.

        Raises:
            InputMismatchError, ModeError, DeviceError: See `start`.
        """
        values, key_feature = self._to_first_cut(self.start(args, kwargs))
        return Begun(values, key_feature, tuple(args), dict(kwargs))

    def _to_first_cut(self, values: Values) -> tuple[Values, Tensor]:
        if self.key_cut is None or self._around_key is None:
            values = self.advance(values, 0)
            return values, self.crossing(values, 0)[0]
        before, behind = self._around_key
        values = before(values)
        # What comes next may write into the feature; on every route keys are what the stage returned.
        key_feature: Tensor = values[self.key_cut.feature].clone()
        return behind(values), key_feature

    def key_feature(self, args: Any, kwargs: Any) -> Tensor:
        """Run no farther than to the feature that keys are cut from, and give it.

        Raises:
            InputMismatchError, ModeError, DeviceError: See `start`.
        """
        values = self.start(args, kwargs)
        if self.key_cut is None or self._around_key is None:
            return self.crossing(self.advance(values, 0), 0)[0]
        found: Tensor = self._around_key[0](values)[self.key_cut.feature]
        return found

    def advance(self, values: Values, index: int) -> Values:
        """Run the generator from the cut before to cut ``index`` (from 0); gives the values that cross it."""
        return self._segments[index](values)

    def finish(self, values: Values) -> Any:
        """Run the rest of the generator from the last cut; gives its output."""
        done = self._rest(values)
        return rebuild(self._result, lambda leaf: done[leaf] if isinstance(leaf, fx.Node) else leaf)

    def crossing(self, values: Values, index: int) -> list[Tensor]:
        """List the values that cross a cut, the feature first."""
        return [values[node] for node in self.cuts[index].crossing]

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
        found: Tensor = segment(self.start(args, kwargs))[cut.feature]
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

    def _bind(self, args: Any, kwargs: Any) -> Values:
        by_path = dict(flatten((tuple(args), dict(kwargs))))
        paths = self.decoder.recording.inputs
        return {node: by_path[path] for node, path in zip(self._inputs, paths, strict=True)}

    def _check_generator(self) -> None:
        for module, mode in self._modes:
            if module.training != mode:
                state = "train" if module.training else "eval"
                raise ModeError(
                    f"asked for an early exit; found {type(module).__name__} in {state} mode, recorded in "
                    f"{'train' if mode else 'eval'} mode. Set the generator's mode back, or wrap it again.",
                    module,
                )
        device = device_of(self.generator, self._device)
        if device != self._device:
            raise DeviceError(
                f"asked for an early exit; found the generator on {device}, recorded on {self._device}. Move "
                "it first, then wrap it again (retroexit.load keeps the trained branches).",
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
                f"asked for an early exit; found the generator in {own} and the branch in {left}. Convert "
                f"both: model.to({own}).",
                branch,
            )

    def _check_call(self, args: Any, kwargs: Any) -> None:
        call = CallForm.of(args, kwargs)
        # A generator that was converted runs in its new precision: that is checked as a new shape is.
        if call != self._call and not (
            _precision(self.generator) != self._precision and call.as_if(self._call) == self._call
        ):
            raise InputMismatchError(call.difference(self._call), (args, kwargs))
        self._check_shape(args, kwargs)

    def _check_shape(self, args: Any, kwargs: Any) -> None:
        key = self._shape_key(args, kwargs)
        if key in self._shapes:
            batch = self._batch_size(args, kwargs)
            if batch != self.batch and not self.any_batch:
                raise InputMismatchError(
                    f"asked for a batch of {batch}; found that the recording holds for a batch of "
                    f"{self.batch} only, since the generator's own forward fixes it. Use that batch size, "
                    "or wrap with example inputs of this one.",
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
                f"asked for an early exit on inputs of {what}; found that the recorded forward raises "
                f"{type(error).__name__}: {error}, since it fixes sizes or types. Wrap again with such "
                "example inputs.",
                shapes,
            ) from error
        if not agrees:
            raise InputMismatchError(
                f"asked for an early exit on inputs of {what}; found that the recorded forward gives another "
                "output than the generator for them. Wrap again with such example inputs.",
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
            crossing = [node for cut in cuts for node in cut.crossing]
            self._find_rows(few, many, recorded_shapes(crossing, self.decoder.recording.output), shapes)
            return True
        trouble = self._trouble(*few)
        if trouble:
            reads = [read.line for read in self.decoder.recording.reads]
            frozen = f" Values read out of tensors are frozen: {'; '.join(reads[:3])}." if reads else ""
            raise RecordingError(
                f"asked to split {type(self.generator).__name__}; found that its recorded execution "
                f"{trouble} on other inputs.{frozen} Attach branches to a submodule whose forward does not "
                "depend on the data's values.",
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
        rows = rows_per_sample(shapes, grown, self._batch_size(*small))
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

    def _shape_key(self, args: Any, kwargs: Any) -> tuple[Any, ...]:
        return tuple((t.dtype, *t.shape[1:]) for t in tensors((args, kwargs)))

    def _batch_size(self, args: Any, kwargs: Any) -> int:
        return next((t.shape[0] for t in tensors((args, kwargs)) if t.dim() > 0), 1)


def places(decoder: Decoder, stages: Iterable[Stage], tap: str) -> list[tuple[Stage, Cut]]:
    """Cut a decoder at several stages, in order of execution."""
    cut = decoder.cut_after if tap == "after" else decoder.cut_before
    return sorted(((stage, cut(stage)) for stage in stages), key=lambda pair: pair[1].position)


def _precision(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
