"""See through the layouts of transformers: maps whose channels come last, ``(N, L, C)`` or ``(N, H, W, C)``.

A trunk of transformer layers hands tokens on where others hand on maps. They are the same numbers: here is
told which values of a recording are tokens, and a recording is rewritten so that behind a stage they pass by
as the map ``(N, C, H, W)`` that everything else in this library works on.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from retroexit.tracing.record import Recording
from retroexit.tracing.recorder import Call

__all__ = ["lay_out_tokens", "mark_tokens", "sizes_of", "width_of"]

_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention)
_LAST_FUNCTIONS = (F.linear, F.layer_norm, F.rms_norm, F.embedding)
_SECOND = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.PixelShuffle,
)
_SWAPS = ("transpose", "swapaxes", "swapdims", "transpose_")


def width_of(node: fx.Node) -> int:
    """Channels of a map or of tokens."""
    return int(node.meta["shape"][-1 if "tokens" in node.meta else 1])


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """Spatial size of a map or of tokens."""
    found: tuple[int, ...] = node.meta.get("tokens") or node.meta["shape"][2:]
    return found


def mark_tokens(recording: Recording, image: fx.Node) -> None:
    """Write down the spatial size of every value that holds tokens, in ``meta["tokens"]``.

    Tokens are what has its channels in the last axis and one row for each place of a map that was there
    before, so that tokens with a class token, or of windows, are none.

    Args:
        recording: One execution, with every layer as a node.
        image: The node of the image, which knows how many axes a map has.
    """
    rank = image.meta["map_rank"]
    modules = {call.path: call.module for call in recording.calls}
    axes: dict[fx.Node, int | None] = {}
    sizes: dict[tuple[int, int], tuple[int, ...]] = {}  # of maps seen so far, by batch and number of places
    for node in recording.nodes:
        shape = node.meta.get("shape", ())
        axis = axes[node] = _channel_axis(node, axes, modules) if len(shape) >= 2 else None
        if axis == 1 and len(shape) == rank:
            sizes[shape[0], math.prod(shape[2:])] = tuple(shape[2:])
        elif axis is not None and axis == len(shape) - 1 >= 2:
            places = tuple(shape[1:-1]) if len(shape) == rank else None
            places = places or (sizes.get((shape[0], shape[1])) if len(shape) == 3 else None)
            if places is not None and max(places) > 1:
                node.meta["tokens"] = places
                sizes[shape[0], math.prod(places)] = places


def _channel_axis(
    node: fx.Node, axes: dict[fx.Node, int | None], modules: dict[str, nn.Module]
) -> int | None:
    """Tell which axis of a value holds channels, from what made it; ``None`` where nothing tells."""
    shape = node.meta["shape"]
    last = len(shape) - 1
    if node.op in ("placeholder", "get_attr"):
        return None
    if node.op == "call_module":
        module = modules.get(str(node.target))
        if isinstance(module, _SECOND):
            return 1
        if isinstance(module, _LAST):
            return _norm_axis(module, node, axes)
    if node.target in _LAST_FUNCTIONS:
        return last
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.startswith("conv") or name in ("group_norm", "batch_norm", "instance_norm", "pixel_shuffle"):
        return 1
    known = [(used, axis) for used in node.all_input_nodes if (axis := axes.get(used)) is not None]
    if not known:
        return None
    alike = [axis for used, axis in known if used.meta["shape"] == shape]
    source, axis = known[0]
    before = source.meta["shape"]
    is_turned = name == "getattr" and node.args[1] in ("mT", "mH")
    if is_turned or name in (*_SWAPS, "permute", "movedim", "moveaxis"):
        return _moved(name, node, axis, len(before))
    if alike:
        return max(alike)
    if len(before) == len(shape):
        return axis
    if axis == len(before) - 1 and before[-1] == shape[-1]:
        return last
    return 1 if axis == 1 and before[:2] == shape[:2] and last >= 2 else None


def _norm_axis(module: nn.Module, node: fx.Node, axes: dict[fx.Node, int | None]) -> int:
    """Tell which axis a layer works on that should work on the last: some norms turn maps around inside."""
    shape = node.meta["shape"]
    last = len(shape) - 1
    width = getattr(module, "normalized_shape", shape[-1:])[-1]
    came = next((axis for used in node.all_input_nodes if (axis := axes.get(used)) is not None), None)
    if width != shape[-1] or (came == 1 and shape[1] == width and isinstance(module, nn.LayerNorm)):
        return 1
    return last


def _moved(name: str, node: fx.Node, axis: int, rank: int) -> int | None:
    """Follow the channel axis through a permutation."""
    if name == "getattr":
        return {rank - 1: rank - 2, rank - 2: rank - 1}.get(axis, axis)
    given: list[Any] = [*node.args[1:], *node.kwargs.values()]
    if name == "permute":
        order = given[0] if isinstance(given[0], (tuple, list)) else given
        return [int(d) % rank for d in order].index(axis)
    if len(given) != 2 or not all(isinstance(d, int) for d in given):
        return None
    a, b = (int(d) % rank for d in given)  # type: ignore[call-overload]
    if name in _SWAPS:
        return b if axis == a else a if axis == b else axis
    order = [d for d in range(rank) if d != a]
    order.insert(b, a)
    return order.index(axis)


def lay_out_tokens(recording: Recording, sizes: dict[str, tuple[int, ...]]) -> None:
    """Let the tokens that some modules return pass by as a map.

    Behind each module are written nodes that lay the tokens out, which the call returns from now on, and that
    turn them back into tokens, which everything that follows reads. Both only look at the same memory in
    another order.

    Args:
        recording: An execution in which the modules are single nodes; it is changed.
        sizes: Spatial size of the tokens, by path of the module that returns them.
    """
    for path, places in sizes.items():
        call = next(call for call in recording.calls if call.path == path)
        tokens = next((n for n in call.outputs if _holds(n, places)), None)
        if tokens is not None:
            _write_map(recording, call, tokens, places)


def _holds(node: fx.Node, places: tuple[int, ...]) -> bool:
    shape = node.meta.get("shape", ())
    return len(shape) >= 3 and shape[1:-1] in (places, (math.prod(places),))


def _write_map(recording: Recording, call: Call, tokens: fx.Node, places: tuple[int, ...]) -> None:
    nodes = recording.nodes
    behind = nodes[call.end - 1]
    batch, *_, width = tokens.meta["shape"]
    flat = len(tokens.meta["shape"]) == 3
    graph = recording.graph
    written: list[fx.Node] = []

    def write(method: str, *args: Any, shape: tuple[int, ...] | None = None) -> fx.Node:
        with graph.inserting_after(written[-1] if written else behind):
            node = graph.call_method(method, args)
        node.meta.update({"shape": shape, "dtype": tokens.meta["dtype"]} if shape else {"size": True})
        written.append(node)
        return node

    if flat and len(places) > 1:
        like = next((n for n in reversed(nodes[: call.end]) if _is_laid_out(n, batch, places)), None)
        sides = places if like is None else tuple(write("size", like, 2 + i) for i in range(len(places)))
        moved = write("transpose", tokens, 1, 2, shape=(batch, width, math.prod(places)))
        laid_out = write("unflatten", moved, 2, sides, shape=(batch, width, *places))
    else:
        laid_out = write("movedim", tokens, -1, 1, shape=(batch, width, *places))
    inserted = len(written)
    users = set(tokens.users) & set(nodes[call.end :])
    back = laid_out
    if flat and len(places) > 1:
        back = write("flatten", back, 2, shape=(batch, width, math.prod(places)))
    back = write("movedim", back, 1, -1, shape=tokens.meta["shape"])
    if tokens.meta.get("contiguous"):  # what comes next may rely on it, also behind a map that was copied
        back = write("contiguous", back, shape=tokens.meta["shape"])
    back.meta["contiguous"] = tokens.meta.get("contiguous", False)
    for user in users:
        user.replace_input_with(tokens, back)
        user.meta["takes_tokens"] = True
    _renumber(recording, call, len(written))
    call.end += inserted
    _rename(call.outputs, tokens, laid_out)
    for other in recording.calls:
        if other.begin >= call.end:
            _rename(other.inputs, tokens, back)
        if other is not call and other.end > call.end:
            _rename(other.outputs, tokens, back)


def _renumber(recording: Recording, own: Call, total: int) -> None:
    """Put the ranges of the calls right that enclose a call or come behind it."""
    for call in recording.calls:
        encloses = call.begin <= own.begin and call.end >= own.end and call is not own
        if encloses or call.begin >= own.end:
            call.end += total
        if call.begin >= own.end:
            call.begin += total


def _rename(nodes: list[fx.Node], old: fx.Node, new: fx.Node) -> None:
    nodes[:] = [new if node is old else node for node in nodes]


def _is_laid_out(node: fx.Node, batch: int, places: tuple[int, ...]) -> bool:
    shape = node.meta.get("shape", ())
    return len(shape) == 2 + len(places) and shape[0] == batch and tuple(shape[2:]) == places
