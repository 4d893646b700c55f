"""Find the image among a generator's outputs, and tell which tensors are feature maps laid out like it."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, fx

from retroexit.core.nested import flatten
from retroexit.errors import OptionError, OutputError
from retroexit.tracing.record import Recording
from retroexit.tracing.recorder import assemble

__all__ = ["find_image", "is_map"]

_MOST_LISTED = 6

Maps = dict[tuple[Any, ...], tuple[fx.Node, Tensor]]


def find_image(recording: Recording, wanted: Any) -> tuple[tuple[Any, ...], fx.Node]:
    """Find the image among the outputs: its path there, and its node.

    Where nobody says which one it is, it is the only map, or the only one that is not nested deeper than the
    others; several of one depth are a question for the user.

    Args:
        recording: One execution.
        wanted: Its key, index or path, or ``None``.

    Raises:
        OptionError: If there is no map at ``wanted``.
        OutputError: If there is no map, or more than one that could be meant.
    """
    produced = _output_nodes(recording.nodes[-1].args[0])
    maps: Maps = {
        path: (node, leaf)
        for (path, leaf), node in zip(_tensor_leaves(recording.output), produced, strict=True)
        if leaf.is_floating_point() and (leaf.dim() >= 3 or (leaf.dim() == 2 and _map_rank(node) > 2))
    }
    if wanted is not None:
        path = wanted if isinstance(wanted, tuple) else (wanted,)
        if path not in maps:
            raise OptionError(
                f"no image at {wanted!r} in the output; maps are at {_list(maps)}. Pass one of these keys.",
                wanted,
            )
    else:
        path = _only_image(maps, recording.output)
    node = maps[path][0]
    node.meta.setdefault("map_rank", _map_rank(node))
    return path, node


def _only_image(maps: Maps, output: Any) -> tuple[Any, ...]:
    candidates: Maps = {}
    for least in (4, 3, 2):  # (N, C, H, W); then (N, C, L) or (N, H, W); then (N, L)
        candidates = candidates or {path: pair for path, pair in maps.items() if pair[1].dim() >= least}
    if not candidates:
        raise OutputError(
            "no image among the generator's outputs: no tensor has shape (N, C, ...). "
            "Wrap the module that returns the image.",
            output,
        )
    shallow = min(map(len, candidates))
    candidates = {path: pair for path, pair in candidates.items() if len(path) == shallow}
    if len(candidates) > 1:
        raise OutputError(
            f"the generator must return one image, got {len(candidates)} at {_list(candidates)}. "
            f"Choose one with image={next(iter(candidates))[-1]!r} or another of these keys.",
            output,
        )
    return next(iter(candidates))


def _map_rank(image: fx.Node) -> int:
    """Least number of axes of the feature maps behind an image: that of the last layer at work on it.

    The image itself may have lost an axis since (a depth map ``(N, H, W)``, a waveform ``(N, L)``) or gained
    one (the frames of a video, folded into the batch before, or unfolded for that last layer alone).
    """
    own = len(image.meta["shape"])
    level, seen = [image], {image}
    while level:
        for node in level:
            rank = len(node.meta.get("shape", ()))
            if not node.meta.get("macs"):
                continue
            if own == 2:  # a waveform is all of a map; what was pooled or came from a vector is none
                same = prod(node.meta["shape"]) == prod(image.meta["shape"])
                return rank if same else own
            if rank > 2:  # a vector on the way is a gate or a style
                return min(own, rank) if own > 3 else rank
        level = [n for n in {u: None for node in level for u in node.all_input_nodes} if n not in seen]
        seen.update(level)
    return own


def is_map(node: fx.Node, image: fx.Node) -> bool:
    """Tell whether a node is a map: at least the axes of what the image was made of, and not a point."""
    shape = node.meta.get("shape", ())
    return len(shape) >= max(3, image.meta["map_rank"]) and max(shape[2:]) > 1


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


def _list(maps: Maps) -> str:
    shown = [f"{path[-1] if path else 'output'!r} {tuple(leaf.shape)}" for path, (_, leaf) in maps.items()]
    more = len(shown) - _MOST_LISTED
    return ", ".join(shown[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
