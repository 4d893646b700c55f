"""Run a tail on symbolic widths and collect the equations that the run implies.

The tail's own Python code runs on fake tensors, with a fresh symbolic size for every wide parameter dimension
and every integer attribute that may be a channel count. The run is repeated where it shows that an attribute
is a number of groups or heads, which may change too. One run of the tail behind the first cut gives the equations
for the tails behind later ones.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from retroexit.branch.widths.equations import Product, symbols_of
from retroexit.branch.widths.plan import LIVE, OUTPUT, TailWidths
from retroexit.branch.widths.shape_env import SizeEnv, SymbolicMode
from retroexit.core.modules import CONVOLUTIONS, clone_module
from retroexit.core.nested import flatten
from retroexit.errors import BranchError
from retroexit.split.rerun import is_fake
from retroexit.tracing.recorder import failure

__all__ = ["Behind", "Chain", "analyse", "int_attributes", "unsuitable"]

# What PyTorch's layers print about themselves and do not compute with.
_DESCRIPTIONS = ("in_channels", "out_channels", "in_features", "out_features", "num_channels", "embedding_dim")
_COUNTS = ("num_groups", "num_heads", "heads", "n_heads")
_MAX_KERNEL = 31
_MAX_DEPTH = 3
_CONVOLUTIONS = tuple(getattr(torch, f"conv{d}d") for d in (1, 2, 3))
_TRANSPOSED = tuple(getattr(torch, f"conv_transpose{d}d") for d in (1, 2, 3))
_GROUP_NORMS = (torch.group_norm, functional.group_norm)
_LAYER_NORMS = (torch.layer_norm, functional.layer_norm)
_LINEAR = (functional.linear,)
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    _GROUP_NORMS: ("input", "num_groups", "weight", "bias"),
    _LAYER_NORMS: ("input", "normalized_shape", "weight", "bias"),
    _LINEAR: ("input", "weight", "bias"),
    _CONVOLUTIONS: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    _TRANSPOSED: ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
_ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh", "elu", "selu", "softmax", "dropout")
_ELEMENTWISE = {
    getattr(owner, name)
    for owner in (torch, functional, Tensor)
    for name in (*_ACTIVATIONS, *(f"{a}_" for a in _ACTIVATIONS))
    if hasattr(owner, name)
}
_JOINS = (torch.cat, torch.concat, torch.concatenate)

Attribute = tuple[str, str]
"""Path of a module, and name of an attribute of it."""


def int_attributes(module: nn.Module) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """List the attributes of a module, or of its configuration, that are integers or lists or tuples of some.

    Yields the name (``channels``, ``cfg.width``, ``widths.16``), the dictionary that holds it, and its key.
    """
    yield from _int_items("", vars(module), _MAX_DEPTH, {id(module)})


def _int_items(
    prefix: str, owner: dict[Any, Any], depth: int, seen: set[int]
) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    for key, value in list(owner.items()):
        name = str(key)
        if type(key) not in (str, int) or name.startswith("_") or "." in name:
            continue
        if type(value) is int or (type(value) in (list, tuple) and any(type(v) is int for v in value)):
            yield prefix + name, owner, key
        elif depth > 0 and id(value) not in seen:
            is_settings = not isinstance(value, (nn.Module, Tensor, type)) and not callable(value)
            package = type(value).__module__.partition(".")[0]
            is_settings &= package not in ("builtins", "torch", "numpy", "collections")
            content = value if type(value) is dict else getattr(value, "__dict__", {}) if is_settings else {}
            yield from _int_items(f"{prefix}{name}.", content, depth - 1, seen | {id(value)})


@dataclass(frozen=True)
class Behind:
    """A tail among those that one symbolic run analyses: a module, and the names of the live values at its cut."""

    tail: nn.Module
    names: Sequence[str]


@dataclass(frozen=True)
class Chain:
    """The tail behind the first cut, cut again: makes its pieces from a copy of it, and its output from their last."""

    pieces: Callable[[nn.Module], Sequence[nn.Module]]
    output: Callable[[Sequence[Any]], Any]


def analyse(
    behind: Sequence[Behind],
    values: Sequence[Tensor],
    threshold: int,
    image: Sequence[Any],
    chain: Chain | None = None,
    *,
    small: bool = False,
) -> list[TailWidths]:
    """Run a tail with symbolic widths and collect the equations between them.

    Args:
        behind: The tail, called as ``tail(feature, *live)``, and those behind later cuts. They are not changed.
        values: Example values of the feature ``(N, C, ...)`` and of the live tensors, which keep their size.
        threshold: Dimensions up to this size never shrink.
        image: Path of the image in the tail's output, all of whose tensors keep their sizes.
        chain: How to stop at the later cuts.
        small: Whether channels of weights up to the threshold are symbolic too, so that they can shrink with
            a width of which they are a fraction.

    Raises:
        BranchError: If the tail cannot run on symbolic sizes.
    """
    counts: set[Attribute] = set()
    is_final = False
    while True:
        run = _SymbolicRun(behind[0].tail, values, threshold, counts, small)
        try:
            out = run(values, chain)
        except Exception as error:
            if is_final or not counts:
                raise unsuitable(error) from error
            counts, is_final = set(), True  # they were no numbers of groups or heads
        else:
            if is_final or run.new_counts <= counts:
                return [run.collect(number, tail, out, image) for number, tail in enumerate(behind)]
            counts = counts | run.new_counts


def unsuitable(error: Exception) -> BranchError:
    """Name the line of the generator's code that does not run on other sizes."""
    return BranchError(
        f"the stages after the attach point must run on other sizes, got {failure(error)}. "
        "Attach elsewhere, use scale=1, or let an adapter build the stage."
    )


class _SymbolicRun:
    """A copy of a tail that shares its weights, to run with fake ones whose wide dimensions are symbols."""

    def __init__(
        self, tail: nn.Module, values: Sequence[Tensor], threshold: int, counts: set[Attribute], small: bool
    ) -> None:
        self.small, self.threshold, self.counts = small, threshold, counts
        self.env = SizeEnv()
        self.env.equations.on_number = self._guess_counts
        self.mode = SymbolicMode(self.env)
        self.new_counts: set[Attribute] = set()
        self.tail = clone_module(tail, share=True)
        self.paths = {id(m): name for name, m in self.tail.named_modules() if name}
        parameters = dict(self.tail.named_parameters())
        real = parameters | dict(self.tail.named_buffers())
        self.original = {name: tuple(tensor.shape) for name, tensor in real.items()}
        self.kernels = {name: _kernel_axes(self.tail, name, shape) for name, shape in self.original.items()}
        widths = {
            size
            for name in parameters
            for axis, size in enumerate(self.original[name])
            if size > threshold and axis not in self.kernels[name]
        }
        self.tensors = {name: self.mode.fake(t, self._free_axes(name, t, widths)) for name, t in real.items()}
        self.parameters = list(parameters)
        self.symbols = {
            (name, axis): size.node.expr
            for name in self.parameters
            for axis, size in enumerate[Any](self.tensors[name].shape)
            if isinstance(size, torch.SymInt)
        }
        self.attributes = self._symbolic_attributes(tail, widths)
        self.crossing: list[Sequence[Any]] = []
        self.joined: list[list[Any]] = []

    def __call__(self, values: Sequence[Tensor], chain: Chain | None) -> Any:
        axes = [[1] if v.dim() != 3 or i == 0 else [1, 2] for i, v in enumerate(values)]
        inputs = [
            self.mode.fake(v, [a in wide and v.shape[a] > self.threshold for a in range(v.dim())])
            for v, wide in zip(values, axes, strict=True)
        ]
        if chain is None:
            self.crossing.append(inputs)
        else:
            self.tail.__dict__["forward"] = partial(self._run_pieces, chain.pieces(self.tail), chain.output)
        with self.mode.running(), _OpConstraints(self.joined):
            return torch.func.functional_call(self.tail, self.tensors, tuple(inputs))

    def _run_pieces(self, pieces: Sequence[nn.Module], output: Callable[[Sequence[Any]], Any], *values: Any) -> Any:
        for piece in pieces:
            self.crossing.append(values)
            values = piece(*values)
        return output(values)

    def _free_axes(self, name: str, tensor: Tensor, widths: set[int]) -> list[bool]:
        """Return which axes may shrink: wide ones, and channels per group if all groups together are wide."""
        owner = self.tail.get_submodule(name.rpartition(".")[0])
        groups = {v for k, v in vars(owner).items() if type(v) is int and v > 1 and _is_width(owner, k)}
        return [
            (size > self.threshold and axis not in self.kernels[name])
            or (axis < 2 and size > 1 and (self.small or any(size * g in widths for g in groups)))
            for axis, size in enumerate(tensor.shape)
        ]

    def _symbolic_attributes(self, original: nn.Module, widths: set[int]) -> dict[Attribute, Any]:
        """Make a symbol of every integer attribute that may be a channel count or a number of groups."""
        symbolic: dict[Attribute, Any] = {}
        seen: set[tuple[int, Any]] = set()  # modules may share a configuration
        for path, module in self.tail.named_modules():
            shared = {id(owner) for _, owner, _ in int_attributes(original.get_submodule(path))}
            for name, owner, key in list(int_attributes(module)):
                place, value = (id(owner), key), owner[key]
                if place in seen or id(owner) in shared or not _is_width(module, name):
                    continue
                is_count = (path, name) in self.counts or name in _COUNTS
                new = [
                    self.env.size(v) if type(v) is int and (v in widths or (is_count and v > 1)) else v
                    for v in (value if type(value) in (list, tuple) else [value])
                ]
                if any(isinstance(v, torch.SymInt) for v in new):
                    seen.add(place)
                    owner[key] = symbolic[path, name] = new[0] if type(value) is int else type(value)(new)
        return symbolic

    def _guess_counts(self, number: int, is_divisor: bool) -> None:
        """Note attributes of the running module that may be a number of groups or heads.

        They equal a constant that a width is divided by (``is_divisor``) or a half, a third or a quarter of it
        (queries, keys and values in one), or are pairs whose product is a constant that a width is divided by
        or equals, or a third of it (heads and their size).
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and id(frame.f_locals.get("self")) not in self.paths:
            frame = frame.f_back
        if frame is None:
            return
        module: nn.Module = frame.f_locals["self"]
        attributes = {name: owner[key] for name, owner, key in int_attributes(module)}
        values = {name: v for name, v in attributes.items() if type(v) is int and v > 1}
        counts = {number // k for k in (1, 2, 3, 4) if number % k == 0} if is_divisor else set()
        for one, other in itertools.combinations(values.values(), 2):
            counts |= {one, other} if one * other in (number, number // 3) else set()
        names = [name for name, value in values.items() if value in counts and _is_width(module, name)]
        alike = [other for other in self.tail.modules() if type(other) is type(module)] if names else []
        self.new_counts |= {(self.paths[id(other)], name) for other in alike for name in names}

    def _thin_live(self, live: Sequence[Any]) -> list[tuple[int, Any] | None]:
        """List axis and size of the channels of live values, which can be projected; ``None`` for vectors and others.

        Tokens ``(N, L, C)`` have them last, maps ``(N, C, ...)`` and signals ``(N, C, L)`` first.
        """
        weights = {e for name in self.parameters for e in map(self.env.expression, self.tensors[name].shape)}
        sizes = [[self.env.expression(size) for size in value.shape] for value in live]
        axes = [2 if len(shape) == 3 and shape[2] in weights else 1 for shape in sizes]
        bound = {
            s for shape, axis in zip(sizes, axes, strict=True) for i, size in enumerate(shape)
            if i != axis or len(shape) < 3 for s in symbols_of(size)
        }  # fmt: skip
        return [
            (axis, shape[axis]) if len(shape) > 2 and symbols_of(shape[axis]) and not symbols_of(shape[axis]) & bound
            else None
            for shape, axis in zip(sizes, axes, strict=True)
        ]  # fmt: skip

    def collect(self, number: int, behind: Behind, output: Any, image: Sequence[Any]) -> TailWidths:
        """Collect the equations of the tail behind a cut after a run that gave an output."""
        equations, expression = self.env.equations, self.env.expression
        feature, *live = self.crossing[number]
        shapes, original, symbols = self._renamed(behind.tail)
        fixed: dict[sympy.Symbol, str] = {}
        reasons = [
            (tensor, f"{LIVE} {name!r}, which keeps its size") for tensor, name in zip(live, behind.names, strict=True)
        ]
        for tensor, reason in (*reasons, *_output_reasons(output, image)):
            for size in tensor.shape:
                fixed.update(dict.fromkeys(symbols_of(expression(size)), reason))
        # A symbol of buffers or attributes alone is no width, but a table or a filter's size.
        entry = expression(feature.shape[1])
        parameters = [shapes[name] for name, _ in behind.tail.named_parameters()]
        used = symbols_of(entry) | {s for shape in parameters for e in shape for s in symbols_of(e)}
        used |= {s for p in equations.products for s in (p.parts, p.each) if symbols_of(p.whole) & used}
        for symbol in equations.values:
            if symbol not in used:
                fixed.setdefault(symbol, "no parameter has this width")
        paths = {name for name, _ in behind.tail.named_modules(remove_duplicate=False)}
        attributes = {key: expression(value) for key, value in self.attributes.items() if key[0] in paths}
        return TailWidths(
            shapes=shapes,
            original=original,
            attributes=attributes,
            entry=entry,
            values={symbol: int(value) for symbol, value in equations.values.items()},
            fixed=fixed,
            # Where one factor of a product is an attribute, that one is the number of parts.
            products=[
                Product(p.each, p.parts, p.whole)
                if p.each in attributes.values() and p.parts not in attributes.values()
                else p
                for p in equations.products
            ],
            conditions=equations.open_conditions(),
            lines={s: line for s in symbols.values() if (line := equations.line_of(s)) is not None},
            symbols=symbols,
            live=self._thin_live(live),
            joined=[[expression(size) for size in sizes] for sizes in self.joined],
        )

    def _renamed(self, tail: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[tuple[str, int], Any]]:
        """Size expressions, sizes and symbols of the tensors of a tail, by name; a tied weight may have another one."""
        owned = [*self.tail.named_parameters(remove_duplicate=False), *self.tail.named_buffers(remove_duplicate=False)]
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(tensor), name) for name, tensor in owned}
        names = {name: names[name] for name, _ in [*tail.named_parameters(), *tail.named_buffers()]}
        shapes = {name: tuple(map(self.env.expression, self.tensors[source].shape)) for name, source in names.items()}
        original = {name: self.original[source] for name, source in names.items()}
        symbols = {
            (name, axis): self.symbols[source, axis]
            for name, source in names.items()
            for axis in range(len(original[name]))
            if (source, axis) in self.symbols
        }
        return shapes, original, symbols


def _output_reasons(output: Any, image: Sequence[Any]) -> list[tuple[Tensor, str]]:
    """List the tensors of an output and why they keep their size; the image last, whose reason counts most."""
    others, images = [], []
    for path, leaf in flatten(output):
        if isinstance(leaf, Tensor) and path == tuple(image):
            images.append((leaf, "the size of the image" if path else OUTPUT))
        elif isinstance(leaf, Tensor):
            entry = "".join(f"[{key!r}]" for key in path)
            reason = (
                f"{OUTPUT}'s entry {entry}, which every exit returns as the backbone does; "
                "pass image_only=True to drop it"
            )
            others.append((leaf, reason))
    return [*others, *images]


def _is_width(module: nn.Module, attribute: str) -> bool:
    """Return whether an attribute may be a channel or group count that a forward computes with."""
    is_builtin = type(module).__module__.startswith("torch.nn")
    return not attribute.startswith("_") and not (is_builtin and attribute in _DESCRIPTIONS)


def _kernel_axes(tail: nn.Module, name: str, shape: Sequence[int]) -> range:
    """List the axes of a parameter that are spatial sizes of a convolution's kernel, never widths.

    A bare parameter is a convolution's by its shape: ``(O, I, k, k)`` or, modulated, ``(1, O, I, k, k)``.
    """
    owner = name.split(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    if isinstance(tail.get_submodule(owner), CONVOLUTIONS):
        return range(2, len(shape))
    first = 3 if len(shape) == 5 and shape[0] == 1 else 2
    is_square = len(shape) >= first + 2 and len(set(shape[first:])) == 1 and shape[-1] <= _MAX_KERNEL
    return range(first, len(shape)) if is_square else range(0)


class _OpConstraints(TorchFunctionMode):
    """Checks the channels of norms and layers, and makes their outputs; fake tensors take much longer.

    Real kernels take a number of groups as a plain integer, or check divisibility only when they compute.

    Args:
        joined: Gets for every concatenation the sizes of its parts along the axis that grows.
    """

    def __init__(self, joined: list[list[Any]]) -> None:
        super().__init__()
        self.joined = joined

    def __torch_function__(
        self, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Check the arguments of a call, then make it, or an output of the right sizes."""
        kwargs = kwargs or {}
        if func in _JOINS:
            parts, axis = (*args, *kwargs.values(), 0)[:2]
            self.joined.append([part.shape[axis] for part in parts if part.dim() > 1])
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not is_fake(x):
            return func(*args, **kwargs)
        if func in _ELEMENTWISE and x.is_floating_point():
            return x if func.__name__.endswith("_") or kwargs.get("inplace") else torch.empty_like(x)
        names = next((names for functions, names in _ARGUMENTS.items() if func in functions), ())
        values = dict(zip(names, args, strict=False)) | kwargs
        weight: Any = values.get("weight")
        bias: Any = values.get("bias")
        if func in _GROUP_NORMS:
            channels, groups = x.shape[1], values["num_groups"]
            _check(channels % groups == 0, f"{channels} channels in {groups} groups")
            for affine in (weight, bias):
                size = channels if affine is None else affine.shape[0]
                _check(size == channels, f"{channels} channels in a norm of {size}")
            return torch.empty_like(x)
        if func in _LAYER_NORMS:
            for sizes in (values["normalized_shape"], *(a.shape for a in (weight, bias) if a is not None)):
                for size, channels in zip(reversed(sizes), reversed(x.shape), strict=False):
                    _check(size == channels, f"{channels} channels in a norm of {size}")
            return torch.empty_like(x)
        if func in _LINEAR:
            _check(x.shape[-1] == weight.shape[1], f"{x.shape[-1]} channels in a layer of {weight.shape[1]}")
            _check(bias is None or bias.shape[0] == weight.shape[0], "a bias of another size")
            return x.new_empty((*x.shape[:-1], weight.shape[0]))
        if func in _CONVOLUTIONS or func in _TRANSPOSED:
            return _convolved(func, values, lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def _convolved(func: Any, values: dict[str, Any], run: Callable[[], Tensor]) -> Tensor:
    """Check the channels of a convolution; return an output of the right sizes."""
    x, weight, bias, groups = values["input"], values["weight"], values.get("bias"), values.get("groups", 1)
    _check(weight.shape[0] % groups == 0, f"{weight.shape[0]} channels in {groups} groups")
    is_transposed = func in _TRANSPOSED
    channels = weight.shape[0] if is_transposed else weight.shape[1] * groups
    out_channels = weight.shape[1] * groups if is_transposed else weight.shape[0]
    axis = 1 if x.dim() == weight.dim() else 0
    _check(x.shape[axis] == channels, f"{x.shape[axis]} channels in a convolution of {channels}")
    _check(bias is None or bias.shape[0] == out_channels, "a bias of another size")
    sizes, kernel = x.shape[axis + 1 :], weight.shape[2:]
    if isinstance(values.get("padding"), str) or any(isinstance(n, torch.SymInt) for n in (*sizes, *kernel)):
        return run()
    options = [
        option if isinstance(option := values.get(name, default), (tuple, list)) else [option]
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0))
    ]
    places = []
    for i, (size, taps) in enumerate(zip(sizes, kernel, strict=True)):
        stride, padding, dilation, extra = (option[i % len(option)] for option in options)
        reach = dilation * (taps - 1)
        if is_transposed:
            places.append((size - 1) * stride - 2 * padding + reach + extra + 1)
        else:
            places.append((size + 2 * padding - reach - 1) // stride + 1)
    _check(min(places) > 0, "an image smaller than the kernel")
    return x.new_empty((*x.shape[:axis], out_channels, *places))


def _check(is_met: Any, sizes: str) -> None:
    if not is_met:
        raise RuntimeError(f"sizes do not match: {sizes}")
