"""A wrapped generator as programs that can be exported one by one: stem, segments, branches, predictor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from retroexit.core.nested import flatten, rebuild
from retroexit.errors import OptionError
from retroexit.guidance.provider import Taps
from retroexit.model import EarlyExitGenerator
from retroexit.routing.router import Router, estimate, guide_distance, input_map
from retroexit.split.segments import Segment
from retroexit.split.split import SplitGenerator

Named = dict[str, Tensor]

_KINDS = {
    **dict.fromkeys(("randn", "randn_like", "normal_"), "normal"),
    **dict.fromkeys(("rand", "rand_like", "uniform_"), "uniform"),
}


class NoiseMode(TorchFunctionMode):
    """Notes the random numbers that are drawn inside, or replaces them by some that were drawn before."""

    def __init__(self, noise: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.replacement, self.drawn, self.kinds = noise, list[Tensor](), list[str]()

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _KINDS:
            return func(*args, **kwargs)
        if name.endswith("_"):  # drawn for the standard distribution, then moved to where it belongs
            low, high = (*args[1:], *kwargs.values(), 0.0, 1.0)[:2] if len(args) > 1 or kwargs else (0.0, 1.0)
            scale = high - low if name == "uniform_" else high
            return args[0].copy_(self._next(_KINDS[name], torch.empty_like(args[0])) * scale + low)
        like = torch.empty_like if name.endswith("_like") else torch.empty
        return self._next(_KINDS[name], like(*args, **{k: v for k, v in kwargs.items() if k != "generator"}))

    def _next(self, kind: str, room: Tensor) -> Tensor:
        number = len(self.kinds)
        self.kinds.append(kind)
        if self.replacement is not None:
            return self.replacement[number].to(room)
        self.drawn.append(room.normal_() if kind == "normal" else room.uniform_())
        return self.drawn[-1].clone()


class Program(nn.Module):
    """One piece, with tensors as inputs and outputs: ``program(*inputs, *noise)``.

    Args:
        name: Its name.
        module: What it runs; returns a tuple.
        inputs: Names of its inputs.
        outputs: Names of what ``module`` returns.
    """

    def __init__(self, name: str, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.name, self.module = name, module
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.kinds: list[str] = []
        self._returned = list(range(len(outputs)))

    @property
    def noise(self) -> list[str]:
        """Names of the random numbers that it draws."""
        return [f"noise_{self.name}_{number}" for number in range(len(self.kinds))]

    def forward(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        """Run the piece; it gets copies, since it may write into its inputs."""
        count = len(self.inputs)
        with NoiseMode(arrays[count:]) if self.kinds else nullcontext():
            outputs = self.module(*(array.clone() for array in arrays[:count]))
        return tuple(outputs[number] for number in self._returned)

    def observe(self, values: Named) -> None:
        """Run it on named values and add its outputs and noise; notes what it draws and which outputs are new."""
        inputs = [values[name].clone() for name in self.inputs]
        versions = {name: value._version for name, value in zip(self.inputs, inputs, strict=True)}
        with NoiseMode() as mode:
            outputs = self.module(*inputs)
        same = {n for n, value in zip(self.inputs, inputs, strict=True) if value._version == versions[n]}
        self._returned = [i for i in self._returned if self.outputs[i] not in same]
        self.kinds = mode.kinds
        values.update({self.outputs[i]: outputs[i] for i in self._returned})
        values.update(zip(self.noise, mode.drawn, strict=True))

    @property
    def returned(self) -> list[str]:
        """Names of its outputs; what passes through unchanged is left out."""
        return [self.outputs[number] for number in self._returned]


class _Image(nn.Module):
    """Take the image out of what a branch returns."""

    def __init__(self, branch: nn.Module, split: SplitGenerator, is_guided: bool) -> None:
        super().__init__()
        self.branch, self.place_of, self.is_guided = branch, split.place_of, is_guided

    def forward(self, *values: Tensor) -> tuple[Tensor]:
        """Run the branch on what crosses its cut, and its guide last."""
        guide = values[-1] if self.is_guided else None
        return (self.place_of(self.branch(*(values[:-1] if self.is_guided else values), guide=guide)),)


class _Rest(nn.Module):
    """Take the image out of what the last segment returns."""

    def __init__(self, split: SplitGenerator) -> None:
        super().__init__()
        self.segment, self.output, self.place_of = _graph_module(split.rest), split.output, split.place_of

    def forward(self, *values: Tensor) -> tuple[Tensor]:
        """Run the segment."""
        return (self.place_of(self.output(self.segment(*values))),)


class _Estimate(nn.Module):
    """Predict losses from a feature or from the generator's inputs, and the distance from the fitting set."""

    def __init__(self, router: Router, prepare: Callable[..., list[Tensor]], rows: int) -> None:
        super().__init__()
        assert router.predictor is not None
        self.predictor, self.prepare, self.rows = router.predictor, prepare, rows

    def forward(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses ``(N, K)`` and distances ``(N,)``, above 1 out of distribution."""
        return estimate(self.predictor, self.prepare(*values), self.rows)


class _Key(nn.Module):
    """Make the map that keys are cut from of the generator's inputs."""

    def __init__(self, taps: Taps, arguments: Callable[..., Any]) -> None:
        super().__init__()
        assert taps.key is not None
        self.key, self.arguments, self.axes = taps.key, arguments, len(taps.key_shape) - 1

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        """Return keys ``(N, D, 1, ...)``."""
        args, kwargs = self.arguments(*inputs)
        keys = self.key(*args, **kwargs)
        return (keys[(...,) + (None,) * self.axes],)


class Programs:
    """All programs of a model, and the order in which they run.

    Attributes:
        all: The programs by name.
        route: Names of those that run up to each cut, then to the end.
        feature: Name of the feature at the first cut.
        query: Name of the map that keys are cut from, or ``None`` without guidance.
    """

    def __init__(self, model: EarlyExitGenerator) -> None:
        self.model, self.split = model, model.split
        self.all: dict[str, Program] = {}
        self.inputs = [node.name for node in self.split.decoder.recording.nodes if node.op == "placeholder"]
        self.feature = self.split.cuts[0].feature.name
        taps = model.guide.taps
        self.query = None if taps is None else "key_map" if taps.key is not None else taps.key_node.name
        stems = self.split.stems
        names = ["stem"] if len(stems) == 1 else ["keys", "stem"]
        pieces = [list(zip(names, stems, strict=True))]
        pieces += [[(f"segment_{i}", s)] for i, s in enumerate(self.split.segments[1:], 2)]
        self.route = [[name for name, _ in part] for part in pieces] + [["rest"]]
        for name, segment in (pair for part in pieces for pair in part):
            self._add(name, _graph_module(segment), _names(segment.enter), _names(segment.keep))
        self._add("rest", _Rest(self.split), _names(self.split.rest.enter), ["image"])
        for number, (branch, cut) in enumerate(zip(model.branches, self.split.cuts, strict=True), 1):
            names = [*_names(cut.crossing), *["guide"] * (taps is not None)]
            self._add(f"branch_{number}", _Image(branch, self.split, taps is not None), names, ["image"])
        if model.predictor is not None:
            self._add_predictor(model.router)
        if taps is not None and taps.key is not None:
            self._add("key", _Key(taps, self.arguments), self.inputs, ["key_map"])

    def _add(self, name: str, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.all[name] = Program(name, module, inputs, outputs)

    def _add_predictor(self, router: Router) -> None:
        rows, names, dims = self.split.rows_per_sample, [self.feature], len(self.model.decomposition.feature_shape) - 1
        prepare: Callable[..., list[Tensor]] = lambda *values: list(values)  # noqa: E731
        if router.needs_adapter or router.reads == "inputs":
            rows, names = 1, self.inputs

            def prepare(*values: Tensor) -> list[Tensor]:
                args, kwargs = self.arguments(*values)
                adapter = router.predictor_inputs if router.needs_adapter else None
                return [input_map(args, kwargs, dims) if adapter is None else adapter(*args, **kwargs)]

        elif router.reads == "features+distance":
            names = [*names, "distance"]
        self._add("predictor", _Estimate(router, prepare, rows), names, ["losses", "ood"])

    def arguments(self, *inputs: Tensor) -> Any:
        """Put input tensors in the structure of the generator's arguments."""
        places = dict(zip(self.split.decoder.recording.inputs, inputs, strict=True))
        paths = iter([path for path, _ in flatten(self.split.example)])
        return rebuild(self.split.example, lambda leaf: places.get(next(paths), leaf))

    @torch.no_grad()
    def observe(self, args: Any, kwargs: Any) -> Named:
        """Run everything eagerly; returns all values by name: inputs, features, images, noise, guides.

        Raises:
            InputMismatchError: If the generator does not take such inputs.
        """
        begun = self.split.begin(args, kwargs)
        values = {node.name: value for node, value in self.split.start(args, kwargs).items()}
        guide = self.model.guide
        if guide.taps is not None:
            values["guide"] = guide.guide(begun)
            values["distance"] = guide_distance(guide.retrieve(begun).distances).to(begun.feature.device)
        for number, part in enumerate(self.route, 1):
            for name in part:
                self.all[name].observe(values)
            if number == 1:
                for name in ("predictor", "key"):
                    if name in self.all:
                        self.all[name].observe(values)
            if f"branch_{number}" in self.all:
                self.all[f"branch_{number}"].observe(values)
        wrong = [name for name, value in values.items() if not isinstance(value, Tensor)]
        if wrong:
            raise OptionError(f"only tensors may cross a cut in an export, got {wrong[0]!r}. Attach elsewhere.")
        return values

    def noise_of_route(self, values: Named, exit: int) -> list[Tensor]:
        """The random numbers of a call that leaves at an exit, in the order in which they are drawn."""
        names = [name for part in self.route[:exit] for name in part]
        names += [f"branch_{exit}"] * (exit < len(self.route))
        return [values[noise] for name in names for noise in self.all[name].noise]


def _graph_module(segment: Segment) -> fx.GraphModule:
    """Take the modules and weights of a segment, and no others."""
    return fx.GraphModule(segment, copy.deepcopy(segment.graph))


def _names(nodes: Sequence[fx.Node]) -> list[str]:
    return [node.name for node in nodes]
