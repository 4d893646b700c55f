"""Which values of a recording are feature maps, which is the image, and which are tokens.

Tokens are maps with the channels last, ``(N, L, C)`` or ``(N, H, W, C)``, as in transformers. Behind a stage
a recording is rewritten so that they cross as ``(N, C, H, W)``.
"""

from math import prod
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from retroexit.core.modules import CONVOLUTIONS
from retroexit.core.nested import flatten
from retroexit.errors import OptionError, OutputError
from retroexit.tracing.record import Recording
from retroexit.tracing.recorder import Call, assemble

_MOST_LISTED = 6

Maps = dict[tuple[Any, ...], tuple[fx.Node, Tensor]]
Axes = dict[fx.Node, int | None]

_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention)
_CHANNELS_LAST_FUNCTIONS = (F.linear, F.layer_norm, F.rms_norm, F.embedding)
_CHANNELS_SECOND = (
    *(*CONVOLUTIONS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d),
    *(nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LocalResponseNorm, nn.PixelShuffle),
)
_OVERLAPS = ("istft", "fold")  # they lay the columns of a map over one another
_SWAPS = ("transpose", "swapaxes", "swapdims", "transpose_")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a recorded tensor; ``()`` for anything else."""
    shape: tuple[int, ...] = node.meta.get("shape", ())
    return shape


def width_of(node: fx.Node) -> int:
    """Channels of a map or of tokens."""
    return int(shape_of(node)[-1 if "tokens" in node.meta else 1])


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """Spatial size of a map or of tokens."""
    sizes: tuple[int, ...] = node.meta.get("tokens") or shape_of(node)[2:]
    return sizes


def is_map(node: fx.Node, image: fx.Node) -> bool:
    """Return whether a value has at least the axes of what the image was made of, and is no single point."""
    shape = shape_of(node)
    return len(shape) >= max(3, image.meta["map_rank"]) and max(shape[2:]) > 1


# The image.


def find_image(recording: Recording, key: Any) -> tuple[tuple[Any, ...], fx.Node]:
    """Find path and node of the image: that at ``key``, else the only map, or the only one least nested.

    Raises:
        OptionError, OutputError: If there is no map at ``key``, none at all, or several could be the image.
    """
    nodes = _output_nodes(recording.nodes[-1].args[0])
    leaves = [(path, leaf) for path, leaf in flatten(recording.output) if isinstance(leaf, Tensor)]
    maps: Maps = {
        path: (node, leaf)
        for (path, leaf), node in zip(leaves, nodes, strict=True)
        if leaf.is_floating_point() and (leaf.dim() >= 3 or (leaf.dim() == 2 and (path == key or _map_rank(node) > 2)))
    }
    if key is None:
        path = _only_image(maps, recording.output)
    else:
        path = key if isinstance(key, tuple) else (key,)
        if path not in maps:
            _refuse_integers([leaf for place, leaf in leaves if place == path])
            raise OptionError(f"no image at {key!r} in the output; maps are at {_list(maps)}")
    node = maps[path][0]
    node.meta.setdefault("map_rank", _map_rank(node))
    return path, node


def _only_image(maps: Maps, output: Any) -> tuple[Any, ...]:
    candidates: Maps = {}
    for least in (4, 3, 2):  # (N, C, H, W); then (N, C, L) or (N, H, W); then (N, L)
        candidates = candidates or {path: pair for path, pair in maps.items() if pair[1].dim() >= least}
    if not candidates:
        _refuse_integers([leaf for _, leaf in flatten(output) if isinstance(leaf, Tensor)])
        raise OutputError(
            "no image among the generator's outputs: no tensor has shape (N, C, ...). "
            "Wrap the module that returns the image."
        )
    shallow = min(map(len, candidates))
    candidates = {path: pair for path, pair in candidates.items() if len(path) == shallow}
    if len(candidates) > 1:
        raise OutputError(
            f"the generator must return one image, got {len(candidates)} at {_list(candidates)}. "
            f"Choose one with image={next(iter(candidates))[-1]!r} or another of these keys."
        )
    return next(iter(candidates))


def _refuse_integers(outputs: list[Tensor]) -> None:
    """Raise if there are images of integers among some outputs."""
    for leaf in outputs:
        if leaf.dim() >= 3 and not leaf.is_floating_point():
            raise OutputError(
                f"the image must be floating point, since exits are trained by its gradient, got integers: "
                f"{leaf.dtype} of shape {tuple(leaf.shape)}. Wrap the module that returns the image before it "
                "is converted."
            )


def _map_rank(image: fx.Node) -> int:
    """Return the rank of the last layer's maps: the image may have lost an axis since, or gained one (frames)."""
    image_rank, overlaps = len(shape_of(image)), False
    level, seen = [image], {image}
    while level:
        for node in level:
            rank = len(shape_of(node))
            overlaps = overlaps or str(getattr(node.target, "__name__", node.target)) in _OVERLAPS
            if not node.meta.get("macs"):
                continue
            if image_rank == 2:  # a waveform has as many numbers as its map
                has_all = overlaps or prod(shape_of(node)) == prod(shape_of(image))
                return rank if has_all else image_rank
            if rank > 2:  # a vector on the way is a gate or a style
                return min(image_rank, rank) if image_rank > 3 else rank
        level = [n for n in {u: None for node in level for u in node.all_input_nodes} if n not in seen]
        seen.update(level)
    return image_rank


def _output_nodes(result: Any) -> list[fx.Node]:
    """Nodes of the tensors in the output, in order, those inside an assembled output included."""
    nodes: list[fx.Node] = []
    for _, leaf in flatten(result):
        if isinstance(leaf, fx.Node) and leaf.target is assemble:
            nodes.extend(_output_nodes(leaf.args[1]))
        elif isinstance(leaf, fx.Node) and not leaf.meta.get("size"):
            nodes.append(leaf)
    return nodes


def _list(maps: Maps) -> str:
    shown = [f"{path[-1] if path else 'output'!r} {tuple(leaf.shape)}" for path, (_, leaf) in maps.items()]
    more = len(shown) - _MOST_LISTED
    return ", ".join(shown[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


# Tokens.


def mark_tokens(recording: Recording, image: fx.Node) -> None:
    """Store the spatial size of every value that holds tokens in ``meta["tokens"]``.

    Tokens have their channels in the last axis and one row for each place of an earlier map. Tokens with a
    class token, or of windows, are not marked. ``image.meta["map_rank"]`` is the number of axes of a map.
    """
    rank = image.meta["map_rank"]
    modules = {call.path: call.module for call in recording.calls}
    axes: Axes = {}
    sizes: dict[tuple[int, int], tuple[int, ...]] = {}  # of earlier maps, by batch and number of places
    for node in recording.nodes:
        shape = shape_of(node)
        axis = axes[node] = _channel_axis(node, axes, modules) if len(shape) >= 2 else None
        if axis == 1 and len(shape) == rank:
            sizes[shape[0], prod(shape[2:])] = shape[2:]
        elif axis is not None and axis == len(shape) - 1 >= 2:
            places = shape[1:-1] if len(shape) == rank else None
            places = places or (sizes.get((shape[0], shape[1])) if len(shape) == 3 else None)
            if places is not None and max(places) > 1:
                node.meta["tokens"] = places
                sizes[shape[0], prod(places)] = places


def _channel_axis(node: fx.Node, axes: Axes, modules: dict[str, nn.Module]) -> int | None:
    """Find the axis that holds the channels, from the operation that made a value; ``None`` if unknown."""
    shape = shape_of(node)
    last = len(shape) - 1
    if node.op in ("placeholder", "get_attr"):
        return None
    sources = [(used, axis) for used in node.all_input_nodes if (axis := axes.get(used)) is not None]
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, _CHANNELS_SECOND):
        return 1
    if isinstance(module, _CHANNELS_LAST):  # some norms turn maps around inside
        width = getattr(module, "normalized_shape", shape[-1:])[-1]
        keeps = bool(sources) and sources[0][1] == 1 and shape[1] == width and isinstance(module, nn.LayerNorm)
        return 1 if width != shape[-1] or keeps else last
    if node.target in _CHANNELS_LAST_FUNCTIONS:
        return last
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.startswith("conv") or name in ("group_norm", "batch_norm", "instance_norm", "pixel_shuffle"):
        return 1
    if not sources:
        return None
    source, axis = sources[0]
    before = shape_of(source)
    is_turned = name == "getattr" and node.args[1] in ("mT", "mH")
    if is_turned or name in (*_SWAPS, "permute", "movedim", "moveaxis"):
        return _permuted(name, node, axis, len(before))
    alike = [axis for used, axis in sources if shape_of(used) == shape]
    if alike:
        return max(alike)
    if len(before) == len(shape):
        return axis
    if axis == len(before) - 1 and before[-1] == shape[-1]:
        return last
    return 1 if axis == 1 and before[:2] == shape[:2] and last >= 2 else None


def _permuted(name: str, node: fx.Node, axis: int, rank: int) -> int | None:
    """Follow the channel axis through a permutation of ``rank`` axes."""
    if name == "getattr":
        return {rank - 1: rank - 2, rank - 2: rank - 1}.get(axis, axis)
    dims: list[Any] = [*node.args[1:], *node.kwargs.values()]
    if name == "permute":
        order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
        return [int(d) % rank for d in order].index(axis)
    if len(dims) != 2 or not all(isinstance(d, int) for d in dims):
        return None
    a, b = (int(d) % rank for d in dims)
    if name in _SWAPS:
        return {a: b, b: a}.get(axis, axis)
    order = [d for d in range(rank) if d != a]
    order.insert(b, a)
    return order.index(axis)


def lay_out_tokens(recording: Recording, sizes: dict[str, tuple[int, ...]]) -> None:
    """Rewrite a recording so that the tokens of some modules, given with their spatial sizes, cross as a map.

    Nodes behind each module turn its tokens into a map, and back for the users; both are views.
    """
    for path, places in sizes.items():
        call = next(call for call in recording.calls if call.path == path)
        for node in call.outputs:
            if len(shape_of(node)) >= 3 and shape_of(node)[1:-1] in (places, (prod(places),)):
                _write_map(recording, call, node, places)
                break


def _write_map(recording: Recording, call: Call, tokens: fx.Node, places: tuple[int, ...]) -> None:
    nodes, graph, shape = recording.nodes, recording.graph, shape_of(tokens)
    written = [nodes[call.end - 1]]

    def write(method: str, *args: Any, shape: tuple[int, ...] | None = None) -> fx.Node:
        with graph.inserting_after(written[-1]):
            written.append(graph.call_method(method, args))
        written[-1].meta.update({"shape": shape, "dtype": tokens.meta["dtype"]} if shape else {"size": True})
        return written[-1]

    map_shape = (shape[0], shape[-1], *places)
    flat_shape = (shape[0], shape[-1], prod(places))
    is_flat = len(shape) == 3 and len(places) > 1
    if is_flat:
        # The size is read from an earlier map, so that it stays symbolic.
        made = (n for n in reversed(nodes[: call.end]) if shape_of(n)[2:] == places)
        like = next((n for n in made if shape_of(n)[0] == shape[0]), None)
        sides = places if like is None else tuple(write("size", like, 2 + i) for i in range(len(places)))
        moved = write("transpose", tokens, 1, 2, shape=flat_shape)
        laid_out = write("unflatten", moved, 2, sides, shape=map_shape)
    else:
        laid_out = write("movedim", tokens, -1, 1, shape=map_shape)
    inserted = len(written) - 1
    users = set(tokens.users) & set(nodes[call.end :])
    back = write("flatten", laid_out, 2, shape=flat_shape) if is_flat else laid_out
    back = write("movedim", back, 1, -1, shape=shape)
    if tokens.meta.get("contiguous"):  # users may rely on it, also behind a map that was copied
        back = write("contiguous", back, shape=shape)
    back.meta["contiguous"] = tokens.meta.get("contiguous", False)
    for user in users:
        user.replace_input_with(tokens, back)
        user.meta["takes_tokens"] = True
    _renumber(recording, call, inserted, len(written) - 1)
    _rename(call.outputs, tokens, laid_out)
    for other in recording.calls:
        if other.begin >= call.end:
            _rename(other.inputs, tokens, back)
        if other is not call and other.end > call.end:
            _rename(other.outputs, tokens, back)


def _renumber(recording: Recording, call: Call, inserted: int, total: int) -> None:
    """Shift the node ranges of the calls that enclose a call or follow it; the call itself grows less."""
    for other in recording.calls:
        encloses = other.begin <= call.begin and other.end >= call.end and other is not call
        if encloses or other.begin >= call.end:
            other.end += total
        if other.begin >= call.end:
            other.begin += total
    call.end += inserted


def _rename(nodes: list[fx.Node], old: fx.Node, new: fx.Node) -> None:
    nodes[:] = [new if node is old else node for node in nodes]
