"""Read a generator: its stages l_1..l_N (paper section 3.1), its image, and the cuts between the stages."""

import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import fx, nn

from retroexit.core.nested import rebuild
from retroexit.errors import AttachPointError, GeneratorError, RecordingError, closest
from retroexit.stages.choose import choose_stages, closing_modules
from retroexit.stages.maps import find_image, is_map, lay_out_tokens, mark_tokens, shape_of
from retroexit.stages.stage import Stage, suggest_attach_points
from retroexit.stages.timing import time_stages
from retroexit.stages.turns import gather_turns, repeated, repeated_stage
from retroexit.tracing.caches import without_caches
from retroexit.tracing.record import Recording, record, steering_line
from retroexit.tracing.recorder import Call, nth_value


@dataclass(frozen=True)
class Cut:
    """A place between two nodes of a recording."""

    position: int  # number of nodes before the cut
    feature: fx.Node  # node of the stage's feature map, the branch's main input
    live: tuple[fx.Node, ...]  # nodes of the other tensors that the rest needs
    rest: tuple[fx.Node, ...]  # needed nodes after the cut; sizes from before it are repeated here

    @property
    def crossing(self) -> tuple[fx.Node, ...]:
        """All nodes whose values cross the cut, the feature first."""
        return (self.feature, *self.live)


@dataclass(frozen=True)
class Decoder:
    """A generator that has been read."""

    recording: Recording  # one execution, with every stage as one node
    stages: tuple[Stage, ...]  # l_1..l_N
    image: fx.Node  # node of the output image
    image_path: tuple[Any, ...]  # where the image is in the generator's output
    replayed: str = ""  # why the recording cannot be cut (see `retroexit.split.replay`); empty where it can
    image_only: bool = False  # whether exits give the image alone, and ``None`` for other tensors of the output

    @property
    def result(self) -> Any:
        """Nodes of what an exit gives, in the structure of the generator's output."""
        result = self.recording.nodes[-1].args[0]
        return rebuild(result, lambda leaf: leaf if self._is_given(leaf) else None)

    def _is_given(self, leaf: Any) -> bool:
        return not self.image_only or not isinstance(leaf, fx.Node) or leaf is self.image

    def call(self, path: str) -> Call:
        """Return the call of a module; where it runs more than once, its calls must be gathered turns."""
        calls = [call for call in self.recording.calls if call.path == path]
        if len(calls) > 1:
            raise repeated_stage(path, len(calls))
        return calls[0]

    def cut(self, stage: Stage, tap: Literal["after", "before"] = "after") -> Cut:
        """Cut behind a stage's output, or in front of its input; `AttachPointError` if there is no feature map."""
        call = self.call(stage.end or stage.path if tap == "after" else stage.path)
        position, tensors = (call.end, call.outputs) if tap == "after" else (call.begin, call.inputs)
        features = self._maps(tensors)
        if not features:
            raise AttachPointError(
                f"no branch is possible {tap} {stage.path!r}: there is no feature map. "
                f"Attach at one of {closest(stage.path, [s.path for s in self.stages])}."
            )
        nodes = self.recording.nodes
        needed: set[fx.Node] = set(nodes[-1].all_input_nodes)
        rest: list[fx.Node] = [nodes[-1]]
        for i in range(len(nodes) - 2, -1, -1):
            node = nodes[i]
            # Sizes and attributes are read again, so that a part of a batch sees its own sizes.
            repeats = i >= position or is_read_again(node)
            if repeats and (node in needed or (i >= position and node.meta.get("mutates"))):
                needed.update(node.all_input_nodes)
                rest.append(node)
        live = [node for node in nodes[:position] if node in needed and not is_read_again(node)]
        feature = next((node for node in features if node in live), None)
        if feature is None:
            raise AttachPointError(
                f"no branch is possible {tap} {stage.path!r}: the image does not depend on that feature map "
                "afterwards. Attach at one of the stages that 'retroexit inspect' lists."
            )
        live.remove(feature)
        return Cut(position, feature, tuple(live), tuple(reversed(rest)))

    def describe(self, path: str, index: int = 0, end: str = "") -> Stage:
        """Describe a module as a stage, closed by the module ``end``; its index is 0 if it is not among l_1..l_N."""
        call, recording, names = self.call(path), self.recording, value_names(self.recording)
        stage = Stage(index, path, type(call.module).__name__, (), call.macs, 0.0, 0.0, end=end or path)
        cut = self.cut(stage)
        spent = sum(n.meta.get("macs", 0) for n in recording.nodes[: cut.position])
        total = max(recording.macs, 1)
        return replace(
            stage,
            shape=shape_of(self._maps(call.outputs)[0]),
            share=call.macs / total,
            cumulative=spent / total,
            live=tuple((names[n], shape_of(n)) for n in cut.live),
            feature=names[cut.feature],
        )

    def _maps(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Maps among some nodes, the one with most channels first."""
        maps = [node for node in nodes if node.op != "get_attr" and is_map(node, self.image)]
        return sorted(maps, key=lambda node: -shape_of(node)[1])


def is_read_again(node: fx.Node) -> bool:
    """Return whether a node behind a cut is repeated there instead of crossing it: a size or an attribute."""
    return bool(node.meta.get("size")) or node.op == "get_attr"


def read_decoder(
    generator: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    stages: Sequence[str] | Mapping[str, str] | None = None,
    also: Iterable[str] = (),
    image: Any = None,
    timed: bool = False,
) -> Decoder:
    """Record a generator in eval mode with its stages as leaves.

    ``stages`` are paths of l_1..l_N, or a mapping from these to the paths of the modules that close them;
    chosen if ``None``. The modules of ``also`` stay visible as single nodes. ``image`` is the key, index or
    path of the image in the output. With ``timed``, stages are timed.
    """
    deep = _record_deeply(generator, args, kwargs)
    image_path, deep_image = find_image(deep, image)
    mark_tokens(deep, deep_image)
    if stages is None:
        ends = choose_stages(deep, deep_image)
    else:
        ends = dict(stages) if isinstance(stages, Mapping) else dict.fromkeys(stages, "")
    ran = Counter(call.path for call in deep.calls if call.path)
    for path in (*ends, *filter(None, ends.values()), *also):
        _check_path(generator, path, ran)
    if stages is not None and not isinstance(stages, Mapping):
        ends = closing_modules(deep, deep_image, stages)
    leaves = {*ends, *ends.values(), *also}
    opened, turning = _opened(deep, leaves), repeated(deep, leaves)
    # Stages that run once per chunk hand on what they keep by writing into lists, which a node cannot.
    is_leaf = None if turning else lambda path, _module: path not in opened
    shallow, reason = _record_stages(generator, args, kwargs, is_leaf)
    if turning and reason:
        raise repeated_stage(turning[0], ran[turning[0]])
    if turning:
        gather_turns(shallow, dict.fromkeys((*leaves,), "") | ends)
    _, image_node = find_image(shallow, image_path)
    image_node.meta["map_rank"] = deep_image.meta["map_rank"]  # layers inside stages are not seen here
    token_sizes = {
        call.path: call.outputs[0].meta["tokens"]
        for call in deep.calls
        if call.path in leaves and call.outputs and all("tokens" in node.meta for node in call.outputs)
    }
    if not reason:
        lay_out_tokens(shallow, token_sizes)
    elif stages is None:  # a forward that runs again hands on what the stage returns
        ends = {path: end for path, end in ends.items() if end not in token_sizes} or ends
    decoder = Decoder(shallow, (), image_node, image_path, reason)
    described = [decoder.describe(path, index, end) for index, (path, end) in enumerate(ends.items(), 1)]
    if timed:
        described = time_stages(generator, described, args, kwargs or {})
    suggested = suggest_attach_points(described)
    marked = tuple(replace(stage, is_suggested=stage.index in suggested) for stage in described)
    return replace(decoder, stages=marked)


def _opened(deep: Recording, leaves: set[str]) -> set[str]:
    """Paths of the modules that contain or call a leaf; a module may be registered in several places."""
    opened = {"", *(".".join(p.split(".")[:i]) for p in leaves for i in range(1, p.count(".") + 1))}
    for call in deep.calls:
        while call.path in leaves and call.parent is not None:
            call = call.parent
            opened.add(call.path)
            leaves = {*leaves, call.path}
    return opened


def _record_deeply(generator: nn.Module, args: Any, kwargs: Any) -> Recording:
    """Record with every layer as a node, to choose stages; only observe if values leave PyTorch on the way."""
    try:
        deep = record(generator, args, kwargs)
    except (RecordingError, GeneratorError):
        return record(generator, args, kwargs, observing=True)
    return record(generator, args, kwargs, observing=True) if deep.reads else deep


def _record_stages(
    generator: nn.Module, args: Any, kwargs: Any, is_leaf: Callable[[str, nn.Module], bool] | None
) -> tuple[Recording, str]:
    """Record with stages as leaves; also returns why the recording cannot be cut, or an empty string."""
    try:
        shallow = record(generator, args, kwargs, is_leaf)
        shallow = without_caches(generator, shallow, lambda: record(generator, args, kwargs, is_leaf))
    except (RecordingError, GeneratorError) as error:
        reason = " ".join(str(error).split())
    else:
        line = steering_line(shallow, lambda i: record(generator, args, kwargs, is_leaf, change=i))
        if not line:
            return shallow, ""
        reason = f"values read out of tensors steer Python at {line}"
    return record(generator, args, kwargs, is_leaf, observing=True), reason


def _check_path(generator: nn.Module, path: str, ran: Counter[str]) -> None:
    if ran[path]:
        return
    exists = path in dict(generator.named_modules())
    name = type(generator).__name__
    numbers = re.findall(r"\d+", path)
    if not exists and re.fullmatch(r"[\d,;\s]+", path):
        raise AttachPointError(
            f"stages must be numbers, or paths of modules as text, got the text {path!r}. Pass "
            f"attach_at=[{', '.join(numbers)}]."
        )
    problem = f"{path!r} is never called in {name}" if exists else f"no module {path!r} in {name}"
    raise AttachPointError(f"{problem}; closest: {closest(path, ran)}. List all with 'retroexit inspect'.")


# Names of values, for messages and tables.


def forward_signature(generator: nn.Module) -> inspect.Signature:
    """Signature of a module's forward; empty if Python cannot tell it."""
    try:
        return inspect.signature(generator.forward)
    except (TypeError, ValueError):
        return inspect.Signature()


def input_names(recording: Recording) -> dict[fx.Node, str]:
    """Name the input tensors as the generator's forward does: ``z``, ``maps[1]``."""
    placeholders = [node for node in recording.graph.nodes if node.op == "placeholder"]
    signature = forward_signature(recording.calls[0].module)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p.name for p in signature.parameters.values() if p.kind in kinds]
    names = {}
    for node, (kind, key, *inner) in zip(placeholders, recording.inputs, strict=True):
        name = str(key)
        if kind == 0:  # what lies behind the last named parameter went into ``*args``
            name = positional[key] if key < len(positional) else node.name
        names[node] = name + "".join(f"[{step!r}]" for step in inner)
    return names


def value_names(recording: Recording) -> dict[fx.Node, str]:
    """Name every value uniquely: by input, by the module that returned it, else by operation and line.

    Examples: ``encoder.2``, ``encoder.2 #2`` (second call), ``block[1]`` (second tensor), ``cat
    (model.py:81)``.
    """
    names: dict[fx.Node, str] = {}
    taken: Counter[str] = Counter()
    inputs = input_names(recording)
    for node in recording.graph.nodes:
        name = inputs.get(node) or _name(node, names)
        taken[name] += 1
        names[node] = name if taken[name] == 1 else f"{name} #{taken[name]}"
    return names


def _name(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "call_module":
        return str(node.target)
    if node.op == "call_function" and node.target in (operator.getitem, getattr, nth_value):
        owner, key = node.args[0], node.meta.get("key", node.args[1])
        if isinstance(owner, fx.Node) and isinstance(key, (str, int)):
            return names[owner] + (f".{key}" if node.target is getattr else f"[{key!r}]")
    operation = getattr(node.target, "__name__", str(node.target)).strip("_")
    line = node.meta.get("line")
    return f"{operation} ({Path(line[0]).name}:{line[1]})" if isinstance(line, tuple) else operation
