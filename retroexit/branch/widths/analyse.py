"""Run a tail on symbolic widths and collect the equations that the run implies.

The tail's own Python code runs on fake tensors, with a fresh symbolic size for every wide parameter dimension
and every integer attribute that may be a channel count. The run is repeated where it shows that an attribute
is a number of groups or heads, which may change too, or that a module cannot run on symbolic sizes. Such a
module becomes opaque: it keeps its widths and is replaced by the outputs of a real run.
"""

from __future__ import annotations

import itertools
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from retroexit.core.nested import flatten, rebuild, tensors
from retroexit.errors import BranchError
from retroexit.split.replay import ReplayTail
from retroexit.split.rerun import is_fake
from retroexit.tracing.recorder import is_user_code, show

__all__ = ["analyse", "blame", "int_attributes"]

logger = logging.getLogger(__name__)

# What PyTorch's layers print about themselves and do not compute with.
_DESCRIPTIONS = ("in_channels", "out_channels", "in_features", "out_features", "num_channels", "embedding_dim")
_COUNTS = ("num_groups", "num_heads", "heads", "n_heads")
_MAX_RUNS = 40
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


def analyse(
    tail: nn.Module,
    values: Sequence[Tensor],
    threshold: int,
    image: Sequence[Any],
    names: Sequence[str],
    opaque: dict[str, str],
    *,
    small: bool = False,
) -> TailWidths:
    """Run a tail with symbolic widths and collect the equations between them.

    Args:
        tail: A module, called as ``tail(feature, *live)``. It is not changed.
        values: Example values of the feature ``(N, C, ...)`` and of the live tensors, which keep their size.
        threshold: Dimensions up to this size never shrink.
        image: Path of the image in the tail's output, all of whose tensors keep their sizes.
        names: Names of the live values.
        opaque: Modules that keep their sizes, by path, with the reason.
        small: Whether channels of weights up to the threshold are symbolic too, so that they can shrink with
            a width of which they are a fraction.

    Raises:
        BranchError: If the tail cannot run on symbolic sizes.
    """
    attempt = _Attempt(_scripted_modules(tail) | opaque)
    for _ in range(_MAX_RUNS):
        run = _SymbolicRun(tail, values, threshold, attempt, small)
        try:
            out = run(values)
        except Exception as error:
            attempt.retract(error, run.paths)
        else:
            if run.new_counts - attempt.refused <= attempt.counts:
                return run.collect(out, image, names)
            attempt.counts |= run.new_counts - attempt.refused
    raise BranchError(
        "the stages after the attach point do not run on symbolic widths, even with these modules at full "
        f"width: {', '.join(attempt.opaque)}. Attach elsewhere, use scale=1, or let an adapter build it.",
        tail,
    )


def _scripted_modules(tail: nn.Module) -> dict[str, str]:
    """List the outermost scripted modules, which compute with plain numbers only."""
    reasons: dict[str, str] = {}
    for path, module in tail.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and not any(path.startswith(f"{p}.") for p in reasons):
            name = getattr(module, "original_name", "")
            reasons[path] = f"code that is not Python: the scripted module {path} ({name})"
    return reasons


@dataclass
class _Attempt:
    """Assumptions of a symbolic run.

    Some modules are opaque (by path, with the reason). Some attributes are a number of groups or heads
    (``counts``); for others that assumption failed (``refused``).
    """

    opaque: dict[str, str]
    counts: set[Attribute] = field(default_factory=set)
    refused: set[Attribute] = field(default_factory=set)

    def retract(self, error: Exception, paths: dict[int, str]) -> None:
        """Retract an assumption about attributes that may have caused an error, else make a module opaque."""
        path, reason = blame(error, paths, self.opaque)
        logger.debug("a symbolic run failed in %r", path, exc_info=error)
        guesses = {(p, n) for p, n in self.counts if not path or path == p or path.startswith(f"{p}.")}
        if guesses:
            self.counts -= guesses
            self.refused |= guesses
        elif path:
            outside = {p: r for p, r in self.opaque.items() if not p.startswith(f"{path}.")}
            self.opaque = outside | {path: reason}
        else:
            raise BranchError(
                f"the stages after the attach point cannot be made narrower because of {reason}. Attach "
                "elsewhere, use scale=1, or let an adapter build the stage.",
                error,
            ) from error


def blame(error: Exception, paths: dict[int, str], opaque: dict[str, str]) -> tuple[str | None, str]:
    """Find the path of the innermost module in which an error arose, and the line of the generator's code.

    ``paths`` holds the path of every module by identity. Modules that are ``opaque`` are not the cause.
    """
    path, line = None, "code that is not Python"
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = paths.get(id(frame.f_locals.get("self")))
        path = owner if owner is not None and owner not in opaque else path
        if is_user_code(frame.f_code.co_filename):
            line = show((frame.f_code.co_filename, number))
    text = (str(error).strip().splitlines() or ["no text"])[0]
    return path, f"{line}, which does not run on other sizes ({type(error).__name__}: {text})"


class _SymbolicRun:
    """A copy of a tail that shares its weights, to run with fake ones whose wide dimensions are symbols."""

    def __init__(
        self, tail: nn.Module, values: Sequence[Tensor], threshold: int, attempt: _Attempt, small: bool
    ) -> None:
        self.small, self.threshold, self.attempt = small, threshold, attempt
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
        self.tensors = {
            name: self.mode.fake(tensor, self._free_axes(name, tensor, widths))
            for name, tensor in real.items()
            if not self._is_opaque(name)
        }
        self.parameters = [name for name in parameters if name in self.tensors]
        self.symbols = {
            (name, axis): size.node.expr
            for name in self.parameters
            for axis, size in enumerate[Any](self.tensors[name].shape)
            if isinstance(size, torch.SymInt)
        }
        self.attributes = self._symbolic_attributes(tail, widths)
        if attempt.opaque:
            self._replace_opaque(tail, values)

    def __call__(self, values: Sequence[Tensor]) -> Any:
        axes = [[1] if v.dim() != 3 or i == 0 else [1, 2] for i, v in enumerate(values)]
        inputs = [
            self.mode.fake(v, [a in wide and v.shape[a] > self.threshold for a in range(v.dim())])
            for v, wide in zip(values, axes, strict=True)
        ]
        self.entry, self.live = inputs[0].shape[1], inputs[1:]
        self.joined: list[list[Any]] = []
        with self.mode.running(), _OpConstraints(self.joined):
            return torch.func.functional_call(self.tail, self.tensors, tuple(inputs))

    def _is_opaque(self, name: str) -> bool:
        return any(name.startswith(f"{path}.") or name == path for path in self.attempt.opaque)

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
            if isinstance(module, torch.jit.ScriptModule) or self._is_opaque(path):
                continue
            shared = {id(owner) for _, owner, _ in int_attributes(original.get_submodule(path))}
            for name, owner, key in list(int_attributes(module)):
                place, value = (id(owner), key), owner[key]
                if place in seen or id(owner) in shared or not _is_width(module, name):
                    continue
                is_count = (path, name) in self.attempt.counts or name in _COUNTS
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

    def _replace_opaque(self, tail: nn.Module, values: Sequence[Tensor]) -> None:
        """Replace the opaque modules by what the tail's modules return for example values."""
        opaque = self.attempt.opaque
        inside = {path for path in opaque if any(path.startswith(f"{outer}.") for outer in opaque)}
        outputs: dict[str, list[Any]] = {path: [] for path in opaque if path not in inside}

        def note(path: str, _module: nn.Module, _args: Any, output: Any) -> None:
            outputs[path].append(rebuild(output, lambda x: x.detach().clone() if isinstance(x, Tensor) else x))

        # A scripted module's own method refuses hooks.
        add_hook = nn.Module.register_forward_hook
        hooks = [add_hook(tail.get_submodule(path), partial(note, path)) for path in outputs]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                run = tail.along_every_path if isinstance(tail, ReplayTail) else tail
                run(*(value.clone() for value in values))
        finally:
            for hook in hooks:
                hook.remove()
        for path, returned in outputs.items():
            old, new = self.tail.get_submodule(path), _OpaqueModule(returned, opaque[path], self.mode)
            for parent in list(self.tail.modules()):
                for name, child in list(parent._modules.items()):
                    if child is old:
                        setattr(parent, name, new)

    def _thin_live(self) -> list[Any]:
        """List the channels of live maps, which a convolution can project; ``None`` for other live values."""
        channels = [self.env.expression(t.shape[1]) if t.dim() > 3 else None for t in self.live]
        others = [size for t in self.live for axis, size in enumerate(t.shape) if axis != 1 or t.dim() < 4]
        bound = {s for size in others for s in symbols_of(self.env.expression(size))}
        return [e if symbols_of(e) and not symbols_of(e) & bound else None for e in channels]

    def collect(self, output: Any, image: Sequence[Any], names: Sequence[str]) -> TailWidths:
        """Collect the equations after a run that gave an output."""
        equations, expression = self.env.equations, self.env.expression
        shapes = {
            name: tuple(map(expression, self.tensors[name].shape)) if name in self.tensors else shape
            for name, shape in self.original.items()
        }
        fixed: dict[sympy.Symbol, str] = {}
        reasons = [
            (tensor, f"{LIVE} {name!r}, which keeps its size") for tensor, name in zip(self.live, names, strict=True)
        ]
        for tensor, reason in (*reasons, *_output_reasons(output, image)):
            for size in tensor.shape:
                fixed.update(dict.fromkeys(symbols_of(expression(size)), reason))
        # A symbol of buffers or attributes alone is no width, but a table or a filter's size.
        entry = expression(self.entry)
        used = symbols_of(entry) | {s for name in self.parameters for e in shapes[name] for s in symbols_of(e)}
        used |= {s for p in equations.products for s in (p.parts, p.each) if symbols_of(p.whole) & used}
        for symbol in equations.values:
            if symbol not in used:
                fixed.setdefault(symbol, "no parameter has this width")
        attributes = {key: expression(value) for key, value in self.attributes.items()}
        return TailWidths(
            shapes=shapes,
            original=self.original,
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
            lines={s: line for s in self.symbols.values() if (line := equations.line_of(s)) is not None},
            symbols=self.symbols,
            opaque=dict(self.attempt.opaque),
            live=self._thin_live(),
            joined=[[expression(size) for size in sizes] for sizes in self.joined],
        )


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
                "to drop it, wrap a module that returns the image alone"
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


class _OpaqueModule(nn.Module):
    """Fixes the sizes of its inputs and returns fakes of the outputs of a real run."""

    def __init__(self, outputs: Sequence[Any], reason: str, mode: SymbolicMode) -> None:
        super().__init__()
        self.outputs, self.reason, self.mode = iter(outputs), reason, mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for tensor in tensors((args, kwargs)):
            for size in tensor.shape:
                self.mode.shape_env.pin(size, self.reason)
        return rebuild(next(self.outputs), lambda x: self.mode.fake(x) if isinstance(x, Tensor) else x)
