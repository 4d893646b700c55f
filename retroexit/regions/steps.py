"""What runs between a cut and an exit's image as a straight list of small steps.

A recording knows the backbone's nodes and a branch those of its own tail. Regions need both in one list, each
step alone: what a step reads of a map is then found out by trying it, and cut to what a window needs.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from retroexit.branch.factory import Branch
from retroexit.decoder.lines import is_user_code, show
from retroexit.decoder.split import SplitGenerator
from retroexit.decoder.structure import flatten, rebuild
from retroexit.errors import RegionError

__all__ = ["Key", "Ref", "Step", "copied", "piece", "refuse_unreadable", "steps_of_nodes"]

Key = Hashable


class Ref:
    """Stands for the value of a step, or for one that crosses the cut, among arguments."""

    __slots__ = ("key",)

    def __init__(self, key: Key) -> None:
        self.key = key


@dataclass(frozen=True, eq=False)
class Step:
    """One operation.

    Attributes:
        key: Name of its value.
        call: The operation.
        args: Its positional arguments; values of other steps as `Ref`.
        kwargs: Its keyword arguments.
        is_size: Whether it reads sizes rather than numbers.
        mutates: Whether it writes into one of its arguments.
        where: Module or operation and line, for messages.
    """

    key: Key
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_size: bool
    mutates: bool
    where: str

    @property
    def reads(self) -> list[Key]:
        """Keys of the values that it takes, each once."""
        leaves = flatten((self.args, self.kwargs))
        return list(dict.fromkeys(leaf.key for _, leaf in leaves if isinstance(leaf, Ref)))

    def run(self, look_up: Callable[[Key], Any]) -> Any:
        """Run it on the values that ``look_up`` gives."""

        def leaf(item: Any) -> Any:
            return look_up(item.key) if isinstance(item, Ref) else item

        kwargs = {name: rebuild(item, leaf) for name, item in self.kwargs.items()}
        return self.call(*rebuild(self.args, leaf), **kwargs)


def piece(
    split: SplitGenerator, branches: Sequence[nn.Module], source: int, target: int
) -> tuple[list[Step], Key]:
    """List the steps from the values at a cut to the image of an exit.

    Args:
        split: The generator in pieces.
        branches: Its branches.
        source: The cut, from 0; its crossing values are keys of the list.
        target: The exit, from 0, not in front of the cut; the number of branches for the backbone.

    Returns:
        The steps in order, and the key of the image.
    """
    recording = split.decoder.recording
    known = recording.constants
    begin = split.cuts[source]
    image = split.decoder.image
    if target == len(branches):
        return _needed(steps_of_nodes(begin.rest, split.generator, known, lambda node: node), [image]), image
    end, branch = split.cuts[target], branches[target]
    assert isinstance(branch, Branch)
    order = {node: i for i, node in enumerate(recording.nodes)}
    between = [node for node in begin.rest if order[node] < end.position]
    steps = steps_of_nodes(between, split.generator, known, lambda node: node) if target > source else []
    inside = {*end.crossing}

    def key(node: fx.Node) -> Key:
        return node if node in inside else (target, node)

    own = steps_of_nodes(branch.tail.steps, branch.tail, {}, key)
    if branch.entry is not None:
        entry, feature = branch.entry, end.feature
        name: Key = (target, "entry")
        steps.append(
            Step(name, entry, (Ref(feature), None), {}, False, False, f"entry of branch {target + 1}")
        )
        own = [_redirected(step, feature, name) for step in own]
    goal: Key = key(image)  # type: ignore[arg-type]
    return _needed([*steps, *own], [goal]), goal


def refuse_unreadable(split: SplitGenerator, branches: Sequence[nn.Module]) -> None:
    """Refuse generators whose steps cannot be listed or whose samples cannot be told apart.

    Raises:
        RegionError: If the forward runs again behind the cut, or values hold several rows per sample.
    """
    what = f"asked for regions in {type(split.generator).__name__}"
    if split.decoder.replayed:
        raise RegionError(
            f"{what}; found that its own forward has to run again behind a cut ({split.decoder.replayed}), "
            "and a forward cannot be run on a part of an image. Use threshold=... without regions.",
            split.generator,
        )
    if not split.divides or {*split.batched.values()} - {1}:
        raise RegionError(
            f"{what}; found that samples of a batch cannot be told apart by rows. Use threshold=... without "
            "regions.",
            split.generator,
        )


def steps_of_nodes(
    nodes: Sequence[fx.Node],
    root: nn.Module,
    constants: Mapping[str, Tensor],
    key: Callable[[fx.Node], Key],
    prefix: str = "",
    lines: Mapping[str, str] | None = None,
) -> list[Step]:
    """Turn the nodes of a recording into steps.

    Args:
        nodes: The nodes.
        root: The module that their targets are in.
        constants: Tensors of the recording that are in no module.
        key: Names values.
        prefix: Path of the module, for messages.
        lines: Where the modules among the nodes are called, by path.
    """
    steps = []
    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        args, kwargs = rebuild((node.args, dict(node.kwargs)), _Referring(key))
        call: Callable[..., Any]
        if node.op == "get_attr":
            target = str(node.target)
            call = _Reading(root, target) if target not in constants else _Constant(constants[target])
            args, kwargs = (), {}
        elif node.op == "call_module":
            call = root.get_submodule(str(node.target))
        elif node.op == "call_method":
            call = _Method(str(node.target))
        else:
            call = node.target  # type: ignore[assignment]
        mutates, is_size = bool(node.meta.get("mutates")), bool(node.meta.get("size"))
        steps.append(Step(key(node), call, args, kwargs, is_size, mutates, _where(node, call, prefix, lines)))
    return steps


def copied(value: Any) -> Any:
    """Clone all tensors."""
    return rebuild(value, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


class _Referring:
    def __init__(self, key: Callable[[fx.Node], Key]) -> None:
        self.key = key

    def __call__(self, leaf: Any) -> Any:
        return Ref(self.key(leaf)) if isinstance(leaf, fx.Node) else leaf


class _Method:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, self.name)(*args, **kwargs)


class _Reading:
    """Reads a parameter or buffer when it runs, so that a trained or loaded one is seen."""

    def __init__(self, root: Any, target: str) -> None:
        self.root, self.target = root, target

    def __call__(self) -> Any:
        value = self.root
        for name in self.target.split("."):
            value = getattr(value, name)
        return value


class _Constant:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self) -> Tensor:
        return self.value


def _redirected(step: Step, old: Key, new: Key) -> Step:
    def leaf(item: Any) -> Any:
        return Ref(new) if isinstance(item, Ref) and item.key is old else item

    args, kwargs = rebuild((step.args, step.kwargs), leaf)
    return Step(step.key, step.call, args, kwargs, step.is_size, step.mutates, step.where)


def _needed(steps: Sequence[Step], wanted: Sequence[Key]) -> list[Step]:
    """Leave out what the wanted values do not depend on."""
    needed, kept = set(wanted), []
    for step in reversed(steps):
        if step.key in needed or (step.mutates and needed.intersection(step.reads)):
            needed.update(step.reads)
            kept.append(step)
    return kept[::-1]


def _where(node: fx.Node, call: Any, prefix: str, lines: Mapping[str, str] | None) -> str:
    """Name a step as a person would look for it: module with its class, or operation; then the line."""
    line = node.meta.get("line")
    place = f" at {show(line)}" if isinstance(line, tuple) else ""
    if node.op == "call_module":
        path = f"{prefix}.{node.target}" if prefix else node.target
        place = (lines or {}).get(str(node.target)) or place or _defined(call)
        return f"{path} ({type(call).__name__}){place}"
    name = getattr(node.target, "__name__", str(node.target)).strip("_")
    return f"{name} in {prefix}{place}" if prefix else f"{name}{place}"


def _defined(module: nn.Module) -> str:
    try:
        file, number = inspect.getsourcefile(type(module)), inspect.getsourcelines(type(module))[1]
    except (OSError, TypeError):
        return ""
    if not is_user_code(str(file)):
        return ""
    return f" ({file}:{number}: {linecache.getline(str(file), number).strip()})"
