"""Find the decoder's stages l_1..l_N in a recording (paper section 3.1)."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import fx, nn

from retroexit.errors import AttachPointError, GeneratorError, RecordingError, closest
from retroexit.stages.choose import choose_stages, closings, runs_often
from retroexit.stages.cuts import Cut, cut_at
from retroexit.stages.image import find_image, is_map
from retroexit.stages.stage import Stage, suggest_attach_points
from retroexit.stages.tokens import lay_out_tokens, mark_tokens
from retroexit.tracing.record import Recording, record, steering_line
from retroexit.tracing.recorder import Call

__all__ = ["Decoder", "describe_stage", "forward_signature", "input_names", "read_decoder", "value_names"]


@dataclass(frozen=True)
class Decoder:
    """A generator that has been read.

    Attributes:
        recording: One execution, with every stage as one node.
        stages: l_1..l_N.
        image: Node of the output image.
        image_path: Where the image is in the generator's output.
        replayed: Why the recording cannot be cut, so that the generator's own forward runs again behind a cut
            (see `retroexit.split.replay.split`); empty where it can.
    """

    recording: Recording
    stages: tuple[Stage, ...]
    image: fx.Node
    image_path: tuple[Any, ...]
    replayed: str = ""

    @cached_property
    def paths(self) -> list[str]:
        """Paths of the modules that a branch can be attached to."""
        return [call.path for call in self.recording.calls if call.path]

    def call(self, path: str) -> Call:
        """Find the one call of a module.

        Raises:
            RepeatedStageError: If it runs more than once.
        """
        calls = [call for call in self.recording.calls if call.path == path]
        if len(calls) > 1:
            raise runs_often(path, len(calls))
        return calls[0]

    def cut_after(self, stage: Stage) -> Cut:
        """Cut behind a stage's output."""
        call = self.call(stage.end or stage.path)
        candidates = self._maps(call.outputs)
        if not candidates:
            raise AttachPointError(
                f"no branch is possible after {stage.path!r}: it returns no feature map. "
                f"Attach at one of {closest(stage.path, [s.path for s in self.stages])}.",
                stage.path,
            )
        return cut_at(self.recording, call.end, candidates, f"after {stage.path!r}")

    def cut_before(self, stage: Stage) -> Cut:
        """Cut in front of a stage's input."""
        call = self.call(stage.path)
        candidates = self._maps(call.inputs)
        if not candidates:
            raise AttachPointError(
                f"no branch is possible before {stage.path!r}: it takes no feature map. Use tap='after'.",
                stage.path,
            )
        return cut_at(self.recording, call.begin, candidates, f"before {stage.path!r}")

    def _maps(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Maps among some nodes, the one with most channels first."""
        maps = [node for node in nodes if node.op != "get_attr" and is_map(node, self.image)]
        return sorted(maps, key=lambda node: -node.meta["shape"][1])


def read_decoder(
    generator: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    stages: Sequence[str] | Mapping[str, str] | None = None,
    also: Iterable[str] = (),
    image: Any = None,
) -> Decoder:
    """Record a generator with its stages as leaves.

    Args:
        generator: A trained generator in eval mode.
        args: Positional inputs that it accepts.
        kwargs: Keyword inputs.
        stages: Paths of l_1..l_N, where they are known, as a mapping with the path of the module that closes each;
            otherwise they are found.
        also: Paths of further modules that must stay visible as single nodes.
        image: Key, index or path of the image in the output.

    Returns:
        The decoder.

    Raises:
        AttachPointError: If a path in ``stages`` or ``also`` names no module that runs.
        GeneratorError: If the generator rejects the inputs, is in train mode, or returns no finite image.
        RecordingError: If its execution cannot be written down.
    """
    deep = _record_deeply(generator, args, kwargs)
    _, deep_image = find_image(deep, image)
    ran = Counter(call.path for call in deep.calls if call.path)
    if stages is None:
        chosen = choose_stages(deep, image)
    else:
        chosen = dict(stages) if isinstance(stages, Mapping) else dict.fromkeys(stages, "")
    for path in (*chosen, *filter(None, chosen.values()), *also):
        _check_path(generator, path, ran)
    if stages is not None and not isinstance(stages, Mapping):
        chosen = closings(deep, deep_image, stages)
    keep = {*chosen, *chosen.values(), *also}
    opened = _opened(deep, keep)

    def is_leaf(path: str, _module: nn.Module) -> bool:
        return path not in opened

    shallow, reason = _record_stages(generator, args, kwargs, is_leaf)
    image_path, image_node = find_image(shallow, image)
    image_node.meta["map_rank"] = deep_image.meta["map_rank"]  # layers inside stages are out of sight here
    tokens = _token_sizes(deep, deep_image, keep)
    if not reason:
        lay_out_tokens(shallow, tokens)
    elif stages is None:  # a forward that runs again hands on what the stage returns
        chosen = {path: end for path, end in chosen.items() if end not in tokens} or chosen
    draft = Decoder(shallow, (), image_node, image_path, reason)
    found = tuple(
        describe_stage(draft, path, index, end) for index, (path, end) in enumerate(chosen.items(), 1)
    )
    good = suggest_attach_points(found)
    found = tuple(replace(stage, is_suggested=stage.index in good) for stage in found)
    return replace(draft, stages=found)


def _token_sizes(deep: Recording, image: fx.Node, paths: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Spatial size of what modules return as tokens and not as a map, by path."""
    mark_tokens(deep, image)
    found = {}
    for call in deep.calls:
        if call.path in set(paths):
            tokens = [n.meta["tokens"] for n in call.outputs if "tokens" in n.meta]
            if tokens and len(tokens) == len(call.outputs):
                found[call.path] = tokens[0]
    return found


def _opened(deep: Recording, keep: Iterable[str]) -> set[str]:
    """Modules that must be looked into so that others are seen as single nodes.

    They lie on the way to them by name, or call them: a module may be registered in several places.
    """
    opened = {"", *(".".join(p.split(".")[:i]) for p in keep for i in range(1, p.count(".") + 1))}
    for call in deep.calls:
        while call.path in keep and call.parent is not None:
            call = deep.calls[call.parent]
            opened.add(call.path)
            keep = {*keep, call.path}
    return opened


def _record_deeply(generator: nn.Module, args: Any, kwargs: Any) -> Recording:
    """Record what stages are picked from: with values that leave PyTorch on their way, just observed."""
    try:
        deep = record(generator, args, kwargs)
    except (RecordingError, GeneratorError):
        return record(generator, args, kwargs, observing=True)
    return record(generator, args, kwargs, observing=True) if deep.reads else deep


def _record_stages(
    generator: nn.Module, args: Any, kwargs: Any, is_leaf: Callable[[str, nn.Module], bool]
) -> tuple[Recording, str]:
    """Record with stages as leaves; gives also why the recording cannot be cut, if that is so."""
    try:
        shallow = record(generator, args, kwargs, is_leaf)
    except (RecordingError, GeneratorError) as error:
        reason = " ".join(str(error).split())
    else:
        line = steering_line(shallow, lambda i: record(generator, args, kwargs, is_leaf, change=i))
        if not line:
            return shallow, ""
        reason = f"values read out of tensors steer Python at {line}"
    return record(generator, args, kwargs, is_leaf, observing=True), reason


def describe_stage(decoder: Decoder, path: str, index: int = 0, end: str = "") -> Stage:
    """Describe one module of a decoder as a stage."""
    recording = decoder.recording
    call = decoder.call(path)
    bare = Stage(index, path, "", (), 0, 0.0, 0.0, end=end or path)
    cut = decoder.cut_after(bare)
    spent = sum(n.meta.get("macs", 0) for n in recording.nodes[: cut.position])
    total = max(recording.macs, 1)
    names = value_names(recording)
    return Stage(
        index=index,
        path=path,
        kind=type(call.module).__name__,
        shape=decoder._maps(call.outputs)[0].meta["shape"],
        macs=call.macs,
        share=call.macs / total,
        cumulative=spent / total,
        live=tuple((names[n], n.meta.get("shape", ())) for n in cut.live),
        end=end or path,
        feature=names[cut.feature],
    )


def _check_path(generator: nn.Module, path: str, ran: Counter[str]) -> None:
    if ran[path] == 1:
        return
    if ran[path] > 1:
        raise runs_often(path, ran[path])
    exists = path in dict(generator.named_modules())
    name = type(generator).__name__
    problem = f"{path!r} is never called in {name}" if exists else f"no module {path!r} in {name}"
    raise AttachPointError(
        f"{problem}; closest: {closest(path, ran)}. List all with 'retroexit inspect'.",
        path,
    )


# Names that users recognise.


def forward_signature(generator: nn.Module) -> inspect.Signature:
    """What a module's forward takes; ``()`` where Python cannot tell."""
    try:
        return inspect.signature(generator.forward)
    except (TypeError, ValueError):
        return inspect.Signature()


def input_names(recording: Recording) -> dict[fx.Node, str]:
    """Name the tensors among the inputs as the generator's forward does: ``z``, ``maps[1]``."""
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
    """Name every value: by the input that it is, by the module that returned it, else by operation and line.

    No two values have one name: ``encoder.2``, ``encoder.2 #2`` for its second call, ``synthesis.b8[1]`` for
    the second thing that a module returned, ``cat (model.py:81)``.
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
    if node.op == "call_function" and node.target in (operator.getitem, getattr):
        owner, key = node.args
        if isinstance(owner, fx.Node) and isinstance(key, (str, int)):
            return names[owner] + (f".{key}" if node.target is getattr else f"[{key!r}]")
    operation = getattr(node.target, "__name__", str(node.target)).strip("_")
    line = node.meta.get("line")
    return f"{operation} ({Path(line[0]).name}:{line[1]})" if isinstance(line, tuple) else operation
