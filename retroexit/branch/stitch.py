"""A branch that skips stages: a solved convolution makes what the last stages read, and copies of these make the image.

Stages whose maps have one size, such as the residual blocks of an upscaler, change the maps little by little: one
convolution does most of what many of them do, while the last ones make the details of the image. Joining parts of
trained networks by a solved layer is called model stitching (Lenc and Vedaldi, CVPR 2015). Not in the paper.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from retroexit.branch.branch import Branch, GuideEntry, Reconstruction, distinct_widths
from retroexit.branch.builder import BranchSpec
from retroexit.branch.output import Output, causal_frames
from retroexit.branch.pixels import pixel_shuffle, pixel_unshuffle
from retroexit.branch.subpixel import Convolution
from retroexit.branch.subpixel_start import PLACES, LayerSolver
from retroexit.core.modules import MacCounter
from retroexit.core.writes import differentiable_writes
from retroexit.errors import BranchError
from retroexit.split.segments import Tail, needed_for
from retroexit.stages.decoder import Cut, is_read_again
from retroexit.stages.maps import shape_of

__all__ = ["StitchBranch", "StitchPlan", "build_stitch"]

logger = logging.getLogger(__name__)

_WIDTHS = (64, 32, 16, 8)  # of the correction of a solved convolution
_CORRECTION = 0.04  # of the MACs behind the attach point: most that corrections may cost
_TRAINED_RATE = 0.1  # learning rate of the copies of trained stages, relative to that of new layers


@dataclass(frozen=True)
class StitchPlan:
    """Sizes of a branch.

    Attributes:
        skips_to: Path of the last stage that it skips.
        width: Width of its corrections, 0 for none.
        causal: Whether no frame may depend on later ones.
    """

    skips_to: str
    width: int
    causal: bool = False


class _Stitch(nn.Module):
    """Makes a value behind the skipped stages: a convolution, plus a correction by three more that starts at zero.

    Args:
        channels: Channels of the feature and the guide, which it reads.
        feature: The feature, ``(N, C, ...)``.
        value: The value that it makes, ``(N, D, ...)`` on the same or a finer grid, or tokens ``(N, L, D)``.
        plan: Width of the correction, and whether time is looked at backwards only.

    Raises:
        BranchError: If the value has another form.
    """

    scale: Tensor

    def __init__(self, channels: int, feature: Tensor, value: Tensor, plan: StitchPlan) -> None:
        super().__init__()
        grid, width = tuple(feature.shape[2:]), plan.width
        self.are_tokens = value.dim() == 3 and len(grid) > 1 and value.shape[1] == math.prod(grid)
        self.factors = (1,) * len(grid)
        if not self.are_tokens:
            fits = value.dim() == feature.dim() and not any(v % f for v, f in zip(value.shape[2:], grid, strict=True))
            if not fits or value.shape[0] != feature.shape[0] or not value.is_floating_point():
                raise BranchError(f"no convolution makes {tuple(value.shape)} from {tuple(feature.shape)}")
            self.factors = tuple(v // f for v, f in zip(value.shape[2:], grid, strict=True))
        out = int(value.shape[2 if self.are_tokens else 1]) * math.prod(self.factors)
        self.solved = Convolution(channels, out, len(grid), plan.causal)
        sizes = [channels, width, width, out] if width else []
        self.correction = nn.ModuleList(Convolution(a, b, len(grid), plan.causal) for a, b in pairwise(sizes))
        if width:
            nn.init.zeros_(self.correction[-1].get_submodule("conv").get_parameter("weight"))
        self.register_buffer("scale", torch.ones(2))  # standard deviations of what is read and made

    def forward(self, x: Tensor) -> Tensor:
        """Map the feature ``(N, C, ...)`` to the value."""
        y = self.solved(x)
        if len(self.correction):
            read, made = self.scale.unbind()
            y = y + made * self._correct(x / read)
        y = pixel_shuffle(y, self.factors)
        return y.flatten(2).transpose(1, 2) if self.are_tokens else y

    def _correct(self, x: Tensor) -> Tensor:
        *layers, last = self.correction
        for layer in layers:
            x = functional.relu(layer(x))
        out: Tensor = last(x)
        return out

    @torch.no_grad()
    def solve(self, x: Tensor, value: Tensor, solver: LayerSolver) -> None:
        """Solve the convolution by least squares for samples of the feature and of the value."""
        if self.are_tokens:
            value = value.transpose(1, 2).unflatten(2, x.shape[2:])
        solver.solve(self.solved, x, pixel_unshuffle(value, self.factors))
        self.scale.copy_(torch.stack([x.float().std(), value.float().std()]).clamp_min(1e-6))


class StitchBranch(Branch):
    """A branch that skips stages and runs copies of the stages behind them.

    Attributes:
        entry: Resizes the guide and concatenates it to the feature, where the branch takes one.
        stitches: Layers that make the values behind the skipped stages.
        tail: Copies of the stages behind them.
        plan: Its sizes, as JSON types.
    """

    kind = "stitch"

    def __init__(
        self,
        plan: StitchPlan,
        tail: Tail,
        cut: Cut,
        made: Sequence[Tensor],
        values: Sequence[Tensor],
        spec: BranchSpec,
        output: Output,
    ) -> None:
        super().__init__(asdict(plan))
        feature, guide, self.output = values[0], spec.guide, output
        channels = int(feature.shape[1])
        self.entry: GuideEntry | None = None
        if guide is not None:
            self.entry = GuideEntry(channels, None, tuple(feature.shape[2:]), guide, min(guide.channels, channels))
            channels += self.entry.guide_channels
        self.stitches = nn.ModuleList(_Stitch(channels, feature, value, plan) for value in made)
        self.makes = tuple(node.name for node in cut.crossing[: len(made)])
        inputs = [node.name for node in tail.graph.nodes if node.op == "placeholder"]
        self.reads = tuple(inputs.index(node.name) for node in cut.crossing[len(made) :])
        self.tail = Tail(tail.constants, tail, cut, _result(tail))

    @property
    def widths(self) -> list[int]:
        """Distinct output widths of the copied stages, in the order of the layers."""
        return distinct_widths(self.tail)

    def learning_rates(self) -> dict[str, float]:
        """Let the copies of trained stages learn more slowly than the new layers; see `Branch.learning_rates`."""
        return {"tail.": _TRAINED_RATE}

    def forward(self, feature: Tensor, *live: Tensor, guide: Tensor | None = None) -> Any:
        """Render a value with the structure of the generator's output; see `Branch.forward`."""
        values = (feature, *live)
        x = feature if self.entry is None else self.entry(feature, guide)
        learns = self.writes and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with differentiable_writes() if learns else nullcontext():
            return self.tail(*(stitch(x) for stitch in self.stitches), *(values[i] for i in self.reads))

    @torch.no_grad()
    def start(
        self, full: Tail, stages: Sequence[str], values: Sequence[Tensor], guide: Tensor | None, seed: int
    ) -> Reconstruction | None:
        """Solve each stitch for the values of the backbone.

        The last quarter of the samples tests the result; where it got worse, the previous weights come back.
        """
        devices = [v.device for v in values[:1] if v.device.type == "cuda"]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            output, made = _run(full, values, self.makes)
        expected = self.output.image_of(output)
        count = int(values[0].shape[0])
        most = max(1, count - count // 4)
        test = slice(most if most < count else 0, count)

        def error() -> float:
            chosen = [v[test] if v.dim() and v.shape[0] == count else v for v in values]
            image = self.output.image_of(self(*chosen, guide=None if guide is None else guide[test]))
            missing = (image - expected[test]).float().square().mean()
            return float(missing / (expected[test].float().var() + 1e-12))

        before, previous = error(), {name: value.clone() for name, value in self.stitches.state_dict().items()}
        solver = LayerSolver(PLACES, torch.Generator().manual_seed(seed))
        x = values[0] if self.entry is None else self.entry(values[0], guide)
        for stitch, value in zip(self.stitches, made, strict=True):
            assert isinstance(stitch, _Stitch)
            stitch.solve(x[:most], value[:most], solver)
        result = Reconstruction(tuple(f"stitches.{i}" for i in range(len(made))), before, error())
        if not result.is_better:
            self.stitches.load_state_dict(previous)
        logger.info("error of a branch, random %.4f, solved %.4f", before, result.after)
        return result


def build_stitch(
    tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec, plan: Mapping[str, Any] | None = None
) -> StitchBranch:
    """Make a branch that skips stages; arguments as for `retroexit.branch.builder.build_branch`.

    It skips as few stages as a cost of ``spec.macs`` allows, without that, half of the MACs behind the attach point.

    Raises:
        BranchError: If no stage can be skipped, or too few at that cost.
    """
    if not hasattr(tail, "graph"):
        raise BranchError(
            "stages can only be skipped where the recording can be cut, and this generator's forward runs again. "
            "Pass branch='subpixel'."
        )
    if spec.init == "scratch":
        raise BranchError(
            "stages can only be skipped with init='inherit', got 'scratch': the last ones are copies. Leave init out, "
            "or pass branch='subpixel'."
        )
    with torch.no_grad(), torch.random.fork_rng(devices=[]), MacCounter() as counter:
        torch.manual_seed(spec.seed)
        returned, _ = _run(tail, values, ())
    output = Output.of(returned, values[0], spec)
    limit = counter.macs / 2 if spec.macs is None else spec.macs
    if plan is not None:
        chosen = StitchPlan(**plan)
        return _build(chosen, tail, _cut_behind(tail, chosen.skips_to), values, spec, output)
    is_causal = causal_frames(tail, values, spec, output.image_of(returned), output) is not None
    unit = counter.macs / max(1, _macs(tail.rest))
    dearest = None
    for path, behind in _cuts(tail, spec.stages):
        if _macs(behind.rest) * unit > limit:
            continue
        try:
            sizes = StitchPlan(path, _width(behind, values[0], counter.macs), is_causal)
            branch = _build(sizes, tail, behind, values, spec, output)
        except BranchError as error:
            logger.debug("stages up to %s are not skipped: %s", path, error)
            continue
        dearest = branch.macs
        if branch.macs <= limit:
            branch.is_fresh = True
            return branch
    least = "" if dearest is None else f", at least {dearest:,} MACs"
    raise BranchError(
        f"no stages can be skipped behind the attach point for a limit of {max(0, round(limit)):,} MACs{least}. Pass a "
        "larger macs, attach earlier, or pass branch='subpixel'."
    )


def _build(
    plan: StitchPlan, tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec, output: Output
) -> StitchBranch:
    names = [node.name for node in cut.crossing if node.op != "placeholder"]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        made = _run(tail, values, names)[1]
        branch = StitchBranch(plan, tail, cut, made, values, spec, output)
    branch.to(device=values[0].device, dtype=values[0].dtype).eval()
    with torch.random.fork_rng(devices=[]):
        branch.measure(values, spec.guide)
    return branch


def _width(cut: Cut, feature: Tensor, macs: int) -> int:
    """Largest width of corrections that cost little, counted on the feature's grid."""
    channels, places = int(feature.shape[1]), feature[:, 0].numel() * 3 ** (feature.dim() - 2)
    outs = [
        math.prod(shape_of(node)[1:]) / math.prod(feature.shape[2:])
        for node in cut.crossing
        if node.op != "placeholder"
    ]
    cost = lambda w: sum(places * w * (channels + w + out) for out in outs)  # noqa: E731
    return next((w for w in _WIDTHS if w <= max(channels, 8) and cost(w) <= _CORRECTION * macs), 0)


def _cuts(tail: Tail, stages: Sequence[str]) -> Iterator[tuple[str, Cut]]:
    """List the stages of a tail in order, each with the cut behind it if stages in front of it can be skipped."""
    for node in tail.graph.nodes:
        if node.op == "call_module" and node.target in stages:
            try:
                yield str(node.target), _cut_behind(tail, str(node.target))
            except BranchError as error:
                logger.debug("stages up to %s are not skipped: %s", node.target, error)


def _cut_behind(tail: Tail, path: str) -> Cut:
    """Cut a tail behind a stage: first what has to be made from the feature, then inputs of the tail.

    What depends on other inputs alone is computed again behind the cut.
    """
    nodes = list(tail.graph.nodes)
    feature = nodes[0]
    end = max(i for i, node in enumerate(nodes) if node.op == "call_module" and node.target == path) + 1
    changed = {feature}
    for node in nodes[:end]:
        if not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
    rest = needed_for(_result(tail), nodes[end:-1])
    read = {used for node in rest for used in node.all_input_nodes} | _leaves(tail)
    made, inputs, again = list[fx.Node](), list[fx.Node](), list[fx.Node]()
    for node in reversed(nodes[:end]):
        if node not in read:
            continue
        if node.op == "placeholder":
            inputs.insert(0, node)
        elif node in changed and not is_read_again(node):
            made.insert(0, node)
        else:
            again.insert(0, node)
            read.update(node.all_input_nodes)
    if not made or not any(n.op == "call_module" for n in rest):
        raise BranchError(f"nothing behind {path} depends on the feature")
    if any(n.meta.get("mutates") and not set(inputs).isdisjoint(n.all_input_nodes) for n in nodes[:end]):
        raise BranchError(f"a stage up to {path} writes into a value that is read behind it")
    return Cut(end, made[0], (*made[1:], *inputs), (*again, *rest))


def _result(tail: Tail) -> Any:
    return list(tail.graph.nodes)[-1].args[0]


def _leaves(tail: Tail) -> set[fx.Node]:
    return set(list(tail.graph.nodes)[-1].all_input_nodes)


def _macs(nodes: Sequence[fx.Node]) -> int:
    return sum(int(node.meta.get("macs", 0)) for node in nodes)


def _run(tail: Tail, values: Sequence[Tensor], names: Sequence[str]) -> tuple[Any, list[Tensor]]:
    """Run a tail; returns its output, and copies of the values of some nodes."""
    runner = _Runner(tail, names)
    output = runner.run(*(value.clone() for value in values))
    return output, [runner.seen[name] for name in names]


class _Runner(fx.Interpreter):
    def __init__(self, tail: Tail, names: Sequence[str]) -> None:
        super().__init__(tail, graph=tail.graph)
        self.names, self.seen = frozenset(names), dict[str, Tensor]()

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node.name in self.names:
            if not isinstance(value, Tensor):
                raise BranchError(f"{node.name} is no tensor")
            self.seen[node.name] = value.clone()  # later layers may write into it
        return value
