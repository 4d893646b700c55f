"""See a deep recording as a person does who reads the source: modules that hand feature maps on, in a tree.

`retroexit.stages.choose` chooses l_1..l_N among these parts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx, nn

from retroexit.stages.image import is_map
from retroexit.stages.tokens import sizes_of, width_of
from retroexit.tracing.record import Recording
from retroexit.tracing.recorder import Call

__all__ = ["FEW_CHANNELS", "Part", "ancestors_of", "length_of", "read_parts", "rises", "shrinks"]

FEW_CHANNELS = 4  # a map with so few channels is an image, a mask or a latent, not a feature


@dataclass(eq=False)
class Part:
    """One call of a module that hands on a feature map which the image depends on.

    Attributes:
        call: The call.
        output: The map that it hands on, the widest one if there are several.
        is_pyramid: Whether it hands on maps of several resolutions, so that none of them is the feature map.
        entering: Feature maps that go in; conditioning made from the inputs alone does not count.
        given: Maps of any kind that go in.
        children: Parts inside, in order of execution.
        depth: Number of layers inside that do work.
        closing: Path of the module that ends it; its own, or that of a norm or an activation behind it.
        is_encoder: Whether it belongs to something that makes maps smaller.
    """

    call: Call
    output: fx.Node
    entering: list[fx.Node]
    given: list[fx.Node]
    children: list[Part]
    depth: int
    closing: str
    is_encoder: bool = False
    is_pyramid: bool = False
    has_parts: bool = True

    @property
    def path(self) -> str:
        """Dotted path of the module."""
        return self.call.path

    @property
    def channels(self) -> int:
        """Channels of the map that it hands on."""
        return width_of(self.output)

    @property
    def length(self) -> float:
        """Side of the map that it hands on."""
        return length_of(self.output)

    @property
    def input_length(self) -> float:
        """Side of the coarsest feature map that goes in: skips and conditioning are finer."""
        sources = self.entering or self.given
        return min(map(length_of, sources), default=self.length)

    @property
    def is_atom(self) -> bool:
        """Tell whether it is a single layer, with or without a norm and an activation around it."""
        return self.depth <= 1

    @property
    def is_sequence(self) -> bool:
        """Tell whether its forward is that of a plain sequence."""
        return isinstance(self.call.module, nn.Sequential)

    def inside(self) -> Iterator[Part]:
        """Yield everything inside."""
        for child in self.children:
            yield child
            yield from child.inside()


def shrinks(length: float, source: float) -> bool:
    """Tell whether a map is a level coarser than another; a border cut off is no level."""
    return length < 0.6 * source


def rises(length: float, source: float) -> bool:
    """Tell whether a map is a level finer than another."""
    return shrinks(source, length)


def read_parts(recording: Recording, image: fx.Node) -> Part | None:
    """Read a deep recording as a tree of parts; gives the generator as one, if it makes the image."""
    reader = _Reader(recording, image)
    found = reader.parts(0) if recording.calls else []
    root = next((part for part in found if part.path == ""), None)
    if root is not None:
        _mark_encoders(root)
    return root


def ancestors_of(node: fx.Node) -> set[fx.Node]:
    """Everything that a node depends on, itself included."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return seen


class _Reader:
    def __init__(self, recording: Recording, image: fx.Node) -> None:
        self.recording, self.image, self.nodes = recording, image, recording.nodes
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.ancestors = ancestors_of(image)
        self.times = Counter(call.path for call in recording.calls)
        self.children: dict[int | None, list[int]] = {}
        for i, call in enumerate(recording.calls):
            self.children.setdefault(call.parent, []).append(i)
        self.features = self._features()

    def _features(self) -> set[fx.Node]:
        """Nodes that depend on inputs and weights: neither conditioning from inputs alone, nor tables."""
        found: set[fx.Node] = set()
        moved: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or (
                not node.meta.get("size") and any(used in moved for used in node.all_input_nodes)
            ):
                moved.add(node)
        weighted = {
            self.nodes[call.end - 1]
            for call in self.recording.calls
            if call.end and any(True for _ in call.module.parameters())
        }
        for node in self.nodes:
            if (node in weighted and node.op == "call_module") or any(
                used in found or used.meta.get("parameter") for used in node.all_input_nodes
            ):
                found.add(node)
        return found & moved if moved else found

    def handed_on(self, i: int) -> list[fx.Node]:
        """Feature maps that come out of a call and that the image needs afterwards; of blocks also tokens."""
        call = self.recording.calls[i]
        return [
            n
            for n in call.outputs
            if n in self.features
            and (self.depth(i) > 1 if "tokens" in n.meta else is_map(n, self.image))
            and (n is self.image or any(u in self.ancestors and self.index[u] >= call.end for u in n.users))
        ]

    def parts(self, i: int) -> list[Part]:
        """A call as a part; or, where it has no weights, hands on no map or runs twice, the parts inside."""
        call = self.recording.calls[i]
        children = [part for j in self.children.get(i, ()) for part in self.parts(j)]
        outputs = self.handed_on(i)
        is_bare = call.macs == 0 or not any(True for _ in call.module.parameters())
        if call.path and (not outputs or is_bare or self.times[call.path] > 1):
            return children
        maps = [n for n in call.inputs if "tokens" in n.meta or is_map(n, self.image)]
        part = Part(
            call,
            max(outputs, key=width_of) if outputs else self.image,
            [n for n in maps if n in self.features],
            maps,
            children,
            self.depth(i),
            call.path,
            is_pyramid=len(outputs) > 1 and rises(max(map(length_of, outputs)), min(map(length_of, outputs))),
            has_parts=i in self.children,
        )
        self.close(i, part)
        return [part]

    def depth(self, i: int) -> int:
        """Number of layers with MACs of their own inside a call, itself included."""
        inner, call = self.children.get(i, ()), self.recording.calls[i]
        own = call.macs > sum(self.recording.calls[j].macs for j in inner)
        # A layer that computes its own weights or styles first is one layer, not two.
        return max(sum(self.depth(j) for j in inner), int(own))

    def close(self, i: int, parent: Part) -> None:
        """Let a single layer end behind the norm and activation that follow it, and alone read its map."""
        by_path = {part.path: part for part in parent.children}
        current: Part | None = None
        for j in self.children.get(i, ()):
            call = self.recording.calls[j]
            part = by_path.get(call.path)
            if part is not None or call.macs > 0:
                current = part if part is not None and part.is_atom else None
                continue
            shapes = {n.meta["shape"] for n in call.outputs}
            elsewhere = set(current.output.users) - set(self.nodes[call.begin : call.end]) if current else ()
            if current is None or elsewhere or shapes != {current.output.meta["shape"]}:
                current = None
            elif any(n is not current.output and is_map(n, self.image) for n in call.inputs):
                current = None  # this merges several maps
            elif self.times[call.path] == 1:  # one activation for all layers closes none of them
                current.closing, current.output = call.path, call.outputs[0]


def _mark_encoders(root: Part) -> None:
    """Mark what makes maps smaller and never larger: a module, or modules side by side in one container.

    What comes last makes the image, whatever its size.
    """
    last = max(part.call.begin for part in root.inside()) if root.children else 0
    groups: dict[str, list[Part]] = {}
    for part in root.inside():
        groups.setdefault(part.path, []).append(part)
        names = part.path.split(".")
        for i in range(1, len(names)):
            groups.setdefault(".".join(names[:i]), []).append(part)
    for members in groups.values():
        first, final = members[0], max(members, key=lambda part: (part.call.end, -part.call.begin))
        reaches_image = max(part.call.begin for part in members) >= last
        least = min(p.length for member in members for p in (member, *member.inside()))
        goes_up = rises(final.length, least)
        if not reaches_image and not goes_up and shrinks(final.length, first.input_length):
            for member in members:
                member.is_encoder = True


def length_of(node: fx.Node) -> float:
    """Side of a map: of its last two axes, since the time of a video goes at a pace of its own."""
    sizes: Sequence[int] = sizes_of(node)[-2:]
    return math.prod(sizes) ** (1 / len(sizes))
