"""Run a tail on symbolic widths and collect what follows about them.

The tail's own Python runs on fake tensors with a fresh symbolic size for every wide parameter dimension and
every integer attribute that could be a channel count; whatever the run asks about sizes, and what it must be
answered, goes into a `Knowledge`. The run is repeated where it shows that more can be left open: a file that
freezes sizes by ``int()``, an attribute that is a number of groups, a module that does not run on symbolic
sizes at all and keeps its own. Private PyTorch interfaces are used here and in
`retroexit.branch.widths.shape_env`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher

from retroexit.branch.expressions import Expr, symbols_of
from retroexit.branch.kernels import kernel_axes
from retroexit.branch.tries import Attribute, Tries
from retroexit.branch.widths.equations import Product
from retroexit.branch.widths.int_attributes import places
from retroexit.branch.widths.op_constraints import Demands, attributes_with
from retroexit.branch.widths.opaque_modules import replace_by_standins
from retroexit.branch.widths.plan import LIVE
from retroexit.branch.widths.shape_env import HalfFakeMode, SizeEnv
from retroexit.branch.widths.solve import Algebra
from retroexit.branch.widths.symint_patch import FrozenSizeError, lenient_python
from retroexit.branch.widths.torchscript import interpret_scripts, unreadable_scripts
from retroexit.core.modules import clone_module
from retroexit.core.nested import flatten
from retroexit.errors import BranchError

__all__ = ["analyse"]

# What PyTorch's own layers print about themselves and do not compute with; `resize` keeps it up to date.
_DESCRIPTIONS = {
    "in_channels",
    "out_channels",
    "in_features",
    "out_features",
    "num_channels",
    "embedding_dim",
}
_COUNTS = {"num_groups", "num_heads"}
_MOST_RUNS = 40


def analyse(
    tail: nn.Module,
    values: Sequence[Tensor],
    *,
    threshold: int,
    image: Sequence[Any] = (),
    names: Sequence[str] = (),
    frozen: dict[str, str] | None = None,
    small: bool = False,
) -> Algebra:
    """Run a tail with symbolic widths and collect what follows about them.

    Args:
        tail: A module; ``tail(feature, *live)``. It is not changed.
        values: Real example values of the feature ``(N, C, ...)`` and the live tensors. The feature's
            channels are free; live values keep their size.
        threshold: Dimensions up to this size never shrink and stay numbers.
        image: Path of the image in the tail's output, all of whose tensors keep their sizes.
        names: What to call the live values.
        frozen: Modules that have to stay as they are, by path, with the reason.
        small: Whether the channels of weights up to the threshold are sizes too, which shrink with what they
            are a fraction of.

    Returns:
        The algebra.

    Raises:
        BranchError: If the tail cannot run on symbolic sizes.
    """
    tries = Tries(unreadable_scripts(tail, values) | (frozen or {}))
    for _ in range(_MOST_RUNS):
        run = _SymbolicRun(tail, values, threshold, tries, small)
        try:
            out = run(values)
        except FrozenSizeError as error:
            tries.covered.append(error.namespace)
        except Exception as error:
            tries.give_way(error, run.paths)
        else:
            if run.found_counts - tries.refused <= tries.counts:
                return run.collect(out, image, names or [f"number {i}" for i in range(1, len(values))])
            tries.counts |= run.found_counts - tries.refused
    raise BranchError(
        "asked for a narrower copy of the stages after the attach point; found no end of what must stay as "
        f"it is: {', '.join(tries.frozen)}. Attach elsewhere, use scale=1, or let an adapter build it.",
        tail,
    )


class _SymbolicRun:
    """A copy of a tail, sharing its weights, to run with fake ones whose wide dimensions are symbols."""

    def __init__(
        self,
        tail: nn.Module,
        values: Sequence[Tensor],
        threshold: int,
        tries: Tries,
        small: bool,
    ) -> None:
        self.small = small
        self.env = SizeEnv()
        self.env.knowledge.noticed = self._note_number
        self.mode = HalfFakeMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.mode.cache_enabled = False  # every call is a new question
        self.threshold, self.tries = threshold, tries
        self.found_counts: set[Attribute] = set()
        self.tail = clone_module(tail, share=True)
        interpret_scripts(self.tail, tries.frozen)
        real = [*self.tail.named_parameters(), *self.tail.named_buffers()]
        parameters = [name for name, _ in self.tail.named_parameters()]
        self.original = {name: tuple(tensor.shape) for name, tensor in real}
        self.kernels = {name: kernel_axes(self.tail, name, self.original[name]) for name in self.original}
        sizes = {
            size
            for name in parameters
            for axis, size in enumerate(self.original[name])
            if size > threshold and axis not in self.kernels[name]
        }
        self.tensors = {
            name: self.fake(tensor, self._free_axes(name, tensor, sizes))
            for name, tensor in real
            if not self._is_frozen(name)
        }
        self.parameters = [name for name in parameters if name in self.tensors]
        self.symbols = {
            (name, axis): size.node.expr
            for name in self.parameters
            for axis, size in enumerate[Any](self.tensors[name].shape)
            if isinstance(size, torch.SymInt)
        }
        self.attributes = self._free_attributes(tail, sizes)
        self.paths = {id(m): name for name, m in self.tail.named_modules() if name}
        replace_by_standins(tail, self.tail, values, tries.frozen, self.fake, self.env)

    def __call__(self, values: Sequence[Tensor]) -> Any:
        axes = [[1] if v.dim() != 3 or i == 0 else [1, 2] for i, v in enumerate(values)]
        entering = [
            self.fake(v, [a in wide and v.shape[a] > self.threshold for a in range(v.dim())])
            for v, wide in zip(values, axes, strict=True)
        ]
        self.entry, self.live = entering[0].shape[1], entering[1:]
        lenient = lenient_python(self.tries.covered, self.tries.exempt)
        with self.mode, enable_python_dispatcher(), torch.no_grad(), lenient, Demands():
            return torch.func.functional_call(self.tail, self.tensors, tuple(entering))

    def fake(self, tensor: Tensor, free: Sequence[bool] | None = None) -> Tensor:
        """Make a fake tensor, some of whose sizes are symbols; indices and single numbers stay real."""
        if not any(free or ()) and (not tensor.is_floating_point() or tensor.numel() <= 1):
            return tensor.detach().clone()
        sizes = [
            self.env.size(size) if is_free else size
            for size, is_free in zip(tensor.shape, free or [False] * tensor.dim(), strict=True)
        ]
        with self.mode:
            return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device)

    def _is_frozen(self, name: str) -> bool:
        return any(name.startswith(f"{path}.") or name == path for path in self.tries.frozen)

    def _note_number(self, number: int, is_divisor: bool) -> None:
        self.found_counts |= {
            (path, name)
            for path, name in attributes_with(number, is_divisor, self.paths)
            if _is_width(self.tail.get_submodule(path), name)
        }

    def _free_axes(self, name: str, tensor: Tensor, sizes: set[int]) -> list[bool]:
        """Tell which axes may shrink: wide ones, and channels per group where all groups together are."""
        owner = self.tail.get_submodule(name.rpartition(".")[0])
        groups = {v for k, v in vars(owner).items() if type(v) is int and v > 1 and _is_width(owner, k)}
        return [
            (size > self.threshold and axis not in self.kernels[name])
            or (axis < 2 and size > 1 and (self.small or any(size * g in sizes for g in groups)))
            for axis, size in enumerate(tensor.shape)
        ]

    def _free_attributes(self, original: nn.Module, sizes: set[int]) -> dict[Attribute, Any]:
        """Make a symbol of every integer attribute that could be a channel count or a number of groups."""
        found: dict[Attribute, Any] = {}
        seen: set[tuple[int, Any]] = set()  # a configuration may be held by many modules
        for path, module in self.tail.named_modules():
            if isinstance(module, torch.jit.ScriptModule) or self._is_frozen(path):
                continue
            shared = {id(owner) for _, owner, _ in places(original.get_submodule(path))}
            for name, owner, key in list(places(module)):
                place, value = (id(owner), key), owner[key]
                if place in seen or id(owner) in shared or not _is_width(module, name):
                    continue
                is_count = (path, name) in self.tries.counts or name in _COUNTS

                def free(v: Any, is_count: bool = is_count) -> Any:
                    can = type(v) is int and (v in sizes or (is_count and v > 1))
                    return self.env.size(v) if can else v

                new = free(value) if type(value) is int else type(value)(map(free, value))
                if any(isinstance(v, torch.SymInt) for v in (new if type(new) in (list, tuple) else [new])):
                    seen.add(place)
                    found[path, name] = owner[key] = new
        return found

    def expression(self, size: Any) -> Expr:
        if isinstance(size, (tuple, list)):
            return type(size)(self.expression(item) for item in size)
        if isinstance(size, torch.SymInt):
            found = self.env.replace(size.node.expr)
            return int(found) if found.is_Integer else found
        return size

    def collect(self, output: Any, image: Sequence[Any], names: Sequence[str]) -> Algebra:
        knowledge = self.env.knowledge
        shapes = {
            name: tuple(map(self.expression, self.tensors[name].shape)) if name in self.tensors else shape
            for name, shape in self.original.items()
        }
        fixed: dict[sympy.Symbol, str] = {}
        for tensor, name in zip(self.live, names, strict=True):
            for size in map(self.expression, tensor.shape):
                fixed.update(dict.fromkeys(symbols_of(size), f"{LIVE} {name!r}, which keeps its size"))
        for tensor, reason in _output_reasons(output, image):
            for size in map(self.expression, tensor.shape):
                fixed.update(dict.fromkeys(symbols_of(size), reason))
        # A symbol that occurs in buffers or attributes alone is no width: tables, filter kernels.
        entry = self.expression(self.entry)
        used = {s for name in self.parameters for e in shapes[name] for s in symbols_of(e)} | symbols_of(
            entry
        )
        used |= {s for p in knowledge.products for s in (p.parts, p.each) if symbols_of(p.whole) & used}
        for symbol in knowledge.values:
            if symbol not in used:
                fixed.setdefault(symbol, "no parameter has this width")
        return Algebra(
            shapes=shapes,
            original=self.original,
            attributes={key: self.expression(v) for key, v in self.attributes.items()},
            entry=entry,
            values={symbol: int(value) for symbol, value in knowledge.values.items()},
            fixed=fixed,
            products=self._products(),
            conditions=knowledge.held(),
            lines={s: line for s in self.symbols.values() if (line := knowledge.line_of(s)) is not None},
            symbols=self.symbols,
            frozen=dict(self.tries.frozen),
        )

    def _products(self) -> list[Product]:
        """List the products; where one factor is an attribute, that one is the number of parts."""
        attributes = {self.expression(v) for v in self.attributes.values() if isinstance(v, torch.SymInt)}
        return [
            Product(p.each, p.parts, p.whole) if p.each in attributes and p.parts not in attributes else p
            for p in self.env.knowledge.products
        ]


def _output_reasons(output: Any, image: Sequence[Any]) -> list[tuple[Tensor, str]]:
    """Say why each tensor of an output keeps its size; the image last, whose reason counts most."""
    others, images = [], []
    for path, leaf in flatten(output):
        if not isinstance(leaf, Tensor):
            continue
        if path == tuple(image):
            images.append((leaf, "the size of the image" if path else "the size of the output"))
        else:
            reason = (
                f"the size of the output's entry {''.join(f'[{key!r}]' for key in path)}, which every exit "
                "returns as the backbone does; to drop it, wrap a module that returns the image alone"
            )
            others.append((leaf, reason))
    return [*others, *images]


def _is_width(module: nn.Module, attribute: str) -> bool:
    """Tell whether an attribute may be a channel or group count that a forward computes with."""
    builtin = type(module).__module__.startswith("torch.nn")
    return not attribute.startswith("_") and not (builtin and attribute in _DESCRIPTIONS)
