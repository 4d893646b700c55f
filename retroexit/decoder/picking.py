"""Pick l_1..l_N in a recording (paper section 3.1: "a series of convolutional modules we label l_i").

A person who picks stages looks for the coarsest modules that hand the feature map from one to the next.
The same is read off a recording here: start from the generator, open a module while it is a mere container or
spans several resolutions, then keep what lies on the way from the smallest feature map to the image.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from retroexit.decoder.record import Recording
from retroexit.decoder.recorder import Call, assemble
from retroexit.decoder.structure import flatten
from retroexit.errors import AttachPointError, OptionError, OutputError

__all__ = ["choose_stages", "find_image", "is_map"]

_HEAD_CHANNELS = 4  # a map with so few channels is an image or a mask, not a feature


def find_image(recording: Recording, wanted: Any) -> tuple[tuple[Any, ...], fx.Node]:
    """Find the image among the outputs: its path there, and its node."""
    nodes = recording.nodes
    produced = _output_nodes(nodes[-1].args[0])
    maps = {
        path: (node, leaf)
        for (path, leaf), node in zip(_tensor_leaves(recording.output), produced, strict=True)
        if leaf.dim() >= 3 and leaf.is_floating_point()
    }
    if wanted is not None:
        path = wanted if isinstance(wanted, tuple) else (wanted,)
        if path not in maps:
            raise OptionError(
                f"asked for image={wanted!r}; found maps at {_list(maps)} in the output. Pass one of these "
                "keys.",
                wanted,
            )
        return path, maps[path][0]
    flat = {path: pair for path, pair in maps.items() if pair[1].dim() >= 4} or maps
    if not flat:
        raise OutputError(
            "found no image among the generator's outputs: no tensor of shape (N, C, ...). "
            "Wrap the module that returns the image.",
            recording.output,
        )
    if len(flat) > 1:
        raise OutputError(
            f"found {len(flat)} image outputs, at {_list(flat)}; exits are judged by one image. Say which "
            "with "
            f"image={next(iter(flat))[-1]!r} or another of these keys.",
            recording.output,
        )
    path = next(iter(flat))
    return path, flat[path][0]


def _tensor_leaves(output: Any) -> list[tuple[tuple[Any, ...], Tensor]]:
    return [(path, leaf) for path, leaf in flatten(output) if isinstance(leaf, Tensor)]


def _output_nodes(result: Any) -> list[fx.Node]:
    """Nodes of the tensors in the output, in order; an assembled output is looked into."""
    found: list[fx.Node] = []
    for _, leaf in flatten(result):
        if isinstance(leaf, fx.Node) and leaf.target is assemble:
            found.extend(_output_nodes(leaf.args[1]))
        elif isinstance(leaf, fx.Node) and not leaf.meta.get("size"):
            found.append(leaf)
    return found


def _list(maps: dict[tuple[Any, ...], tuple[fx.Node, Tensor]]) -> str:
    return ", ".join(
        f"{path[-1] if path else 'output'!r} {tuple(leaf.shape)}" for path, (_, leaf) in maps.items()
    )


@dataclass
class _Candidate:
    call: Call
    output: fx.Node
    children: list[_Candidate]
    weight_layers: int
    entering: list[fx.Node]
    has_parts: bool
    end: str = ""

    @property
    def size(self) -> int:
        """Length of the last spatial axis."""
        return int(self.output.meta["shape"][-1])

    @property
    def input_size(self) -> int:
        """Length of the last spatial axis of the features that go in; conditioning maps do not count."""
        return int(max((n.meta["shape"][-1] for n in self.entering), default=self.size))

    @property
    def is_atom(self) -> bool:
        return self.weight_layers <= 1

    @property
    def is_bare(self) -> bool:
        """Tell whether it is a layer without parts."""
        return not self.has_parts

    def sizes(self) -> set[int]:
        """Lengths of the last spatial axis that occur inside, of maps laid out like the output."""
        own = self.output.meta["shape"][2:]
        shapes = [node.meta["shape"][2:] for node in self.outputs()]
        return {
            int(shape[-1])
            for shape in shapes
            if all(n * own[-1] == shape[-1] * o for n, o in zip(shape, own, strict=True))
        }

    def outputs(self) -> set[fx.Node]:
        """Outputs of all calls inside, its own included."""
        return {self.output}.union(*(child.outputs() for child in self.children))


class _Reader:
    """Looks at a deep recording the way a person does who picks stages."""

    def __init__(self, recording: Recording, image: fx.Node) -> None:
        self.recording, self.image = recording, image
        self.opens_heads = False
        self.nodes = recording.nodes
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.ancestors = _ancestors(image)
        self.features = self._features()
        self.times = Counter(call.path for call in recording.calls)
        self.children: dict[int | None, list[int]] = {}
        for i, call in enumerate(recording.calls):
            self.children.setdefault(call.parent, []).append(i)

    @property
    def head_channels(self) -> int:
        """Maps with no more channels than this are images or masks."""
        return max(_HEAD_CHANNELS, int(self.image.meta["shape"][1]))

    def _features(self) -> set[fx.Node]:
        """Nodes that depend on a weight, as opposed to conditioning made from the inputs alone."""
        found: set[fx.Node] = set()
        weighted = {
            self.nodes[call.end - 1]
            for call in self.recording.calls
            if call.end and _has_weights(call.module)
        }
        for node in self.nodes:
            if (node in weighted and node.op == "call_module") or any(
                used in found or used.meta.get("parameter") for used in node.all_input_nodes
            ):
                found.add(node)
        return found

    def candidate(self, i: int) -> _Candidate | None:
        """A call that could be a stage, with the calls inside it that could be one."""
        call = self.recording.calls[i]
        outputs = [
            n for n in call.outputs if n in self.ancestors and n in self.features and is_map(n, self.image)
        ]
        usable = bool(outputs) and call.macs > 0 and (call.path == "" or self.times[call.path] == 1)
        children = [c for j in self.children.get(i, ()) if (c := self.candidate(j)) is not None]
        if not usable and call.path:
            return None
        output = max(outputs, key=lambda n: n.meta["shape"][1]) if outputs else self.image
        entering = [n for n in call.inputs if n in self.features and is_map(n, self.image)]
        return _Candidate(
            call, output, children, self.weight_layers(i), entering, i in self.children, call.path
        )

    def weight_layers(self, i: int) -> int:
        """Number of called layers with MACs inside a call; one for a bare convolution."""
        inner = self.children.get(i, ())
        return sum(self.weight_layers(j) for j in inner) or int(self.recording.calls[i].macs > 0)

    def opens(self, candidate: _Candidate) -> bool:
        """Tell whether a module is to be looked into rather than taken as one stage."""
        blocks = [c for c in candidate.children if not c.is_atom]
        if candidate.call.path == "":
            return True
        if candidate.is_atom or not candidate.children:
            return False
        if self.opens_heads and candidate.output.meta["shape"][1] <= self.head_channels:
            return True
        if len(candidate.children) == 1:
            only = candidate.children[0]
            return only.call.macs > 0.95 * candidate.call.macs and not only.is_atom and self.opens(only)
        if isinstance(candidate.call.module, (nn.Sequential, nn.ModuleList)) and len(blocks) >= 2:
            return True
        sizes = candidate.sizes()
        if len(sizes) >= 3 and max(sizes) >= 4 * min(sizes):
            return True
        kinds = Counter(type(c.call.module).__name__ for c in blocks)
        is_large = candidate.call.macs > 0.5 * self.recording.macs
        return is_large and max(kinds.values(), default=0) >= 3 and self.is_chain(candidate)

    def is_chain(self, candidate: _Candidate) -> bool:
        """Tell whether inside a module each block hands only its own output on to the next."""
        outside = self.nodes[candidate.call.end :]
        for child in candidate.children[:-1]:
            later = self.nodes[child.call.end : candidate.call.end]
            made = self.nodes[candidate.call.begin : child.call.end]
            used_later = {used for node in later for used in node.all_input_nodes}
            used_outside = {used for node in outside for used in node.all_input_nodes}
            spatial = [
                n
                for n in made
                if n in self.features and n in used_later - used_outside and is_map(n, self.image)
            ]
            if any(n is not child.output for n in spatial):
                return False
        return True

    def partition(self, candidate: _Candidate) -> list[_Candidate]:
        """Break a module into the coarsest stages."""
        if not self.opens(candidate):
            return [candidate]
        parts = [part for child in candidate.children for part in self.partition(child)]
        if isinstance(candidate.call.module, nn.Sequential):
            self.close(candidate, parts)
        return parts

    def close(self, container: _Candidate, parts: list[_Candidate]) -> None:
        """Let a bare convolution in a flat sequence end behind the norm and activation that follow it."""
        calls = self.recording.calls
        inside = self.children.get(calls.index(container.call), ())
        by_path = {part.call.path: part for part in parts}
        current: _Candidate | None = None
        for j in inside:
            call = calls[j]
            part = by_path.get(call.path)
            if part is not None or call.macs > 0:
                current = part if part is not None and part.is_atom else None
                continue
            shapes = {n.meta["shape"] for n in call.outputs}
            if current is None or shapes != {current.output.meta["shape"]}:
                current = None
                continue
            current.end, current.output = call.path, call.outputs[0]

    def select(self, parts: list[_Candidate]) -> list[_Candidate]:
        """Keep the decoder: from the smallest feature map to the image, without heads and side branches."""
        parts = [p for p in parts if p.output.meta["shape"][1] > self.head_channels]
        if not parts:
            return []
        smallest = min(p.size for p in parts)
        starts = [
            i for i, p in enumerate(parts) if p.size == smallest and (i == 0 or parts[i - 1].size != smallest)
        ]
        parts = [p for p in parts[starts[-1] :] if p.input_size <= p.size]
        kept: list[_Candidate] = []
        for part in reversed(parts):
            if not kept or part.output in _ancestors(kept[0].output):
                kept.insert(0, part)
        return self._without_glue(self._prefer_narrow_places(kept))

    def _prefer_narrow_places(self, parts: list[_Candidate]) -> list[_Candidate]:
        """Where enough stages are the only feature map alive at their end, take only those."""
        alone = [p for p in parts if not self._alive_beside(p)]
        total = sum(p.call.macs for p in parts)
        return alone if len(alone) >= 2 and sum(p.call.macs for p in alone) >= 0.5 * total else parts

    def _alive_beside(self, part: _Candidate) -> list[fx.Node]:
        end = self.index[part.output]
        return [
            n
            for n in self.features & self.ancestors
            if self.index[n] <= end
            and n is not part.output
            and n.op != "get_attr"
            and is_map(n, self.image)
            and n.meta["shape"][1] > self.head_channels
            and any(self.index[u] > end and u in self.ancestors for u in n.users)
        ]

    @staticmethod
    def _without_glue(parts: list[_Candidate]) -> list[_Candidate]:
        """Drop bare layers between blocks that do most of the work, unless they raise the resolution."""
        total = sum(p.call.macs for p in parts)
        for is_glue in (lambda p: p.is_atom, lambda p: p.is_bare):
            blocks = [p for p in parts if not is_glue(p)]
            if len(blocks) >= 3 and sum(p.call.macs for p in blocks) >= 0.4 * total:
                return [p for p in parts if not is_glue(p) or p.input_size < p.size]
        return parts


def choose_stages(recording: Recording, image: Any) -> dict[str, str]:
    """Pick the stages of a deep recording: path -> path of the module that closes the stage."""
    _, node = find_image(recording, image)
    reader = _Reader(recording, node)
    root = reader.candidate(0)
    parts = reader.select(reader.partition(root)) if root is not None else []
    if not parts and root is not None:
        reader.opens_heads = True  # one sequence from input to image is no stage, but what is inside may be
        parts = reader.select(reader.partition(root))
    if not parts:
        raise AttachPointError(
            "found no decoder stage: no module with weights passes a feature map on to the image. "
            "Name them with stages=[...].",
            recording,
        )
    return {part.call.path: part.end for part in parts}


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def is_map(node: fx.Node, image: fx.Node) -> bool:
    """Tell whether a node is a map with as many axes as the image."""
    shape = node.meta.get("shape", ())
    return len(shape) == len(image.meta["shape"]) and len(shape) >= 3 and (max(shape[2:]) > 1)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return seen
