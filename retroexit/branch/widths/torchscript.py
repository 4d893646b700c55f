"""Run scripted modules as Python, so that their widths can be found out like anybody's.

TorchScript's interpreter knows plain numbers only. The graph of a scripted module is short and can be read:
`Interpreted` runs it node by node, on symbolic sizes too. It serves the analysis of widths; a branch keeps
scripted modules, with narrower weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.branch.widths.opaque_modules import exchange
from retroexit.core.modules import clone_module
from retroexit.core.nested import tensors

__all__ = ["Interpreted", "interpret_scripts", "unreadable_scripts"]

_NUMBERS: dict[str, Callable[..., Any]] = {
    "aten::Bool": bool,
    "aten::Float": lambda x: x if isinstance(x, torch.SymFloat) else float(x),
    "aten::Int": lambda x: x if isinstance(x, torch.SymInt) else int(x),
    "aten::__contains__": operator.contains,
    "aten::__getitem__": operator.getitem,
    "aten::__is__": operator.is_,
    "aten::__isnot__": operator.is_not,
    "aten::__not__": operator.not_,
    "aten::add": operator.add,
    "aten::append": lambda items, item: items.append(item) or items,
    "aten::div": operator.truediv,
    "aten::eq": operator.eq,
    "aten::floordiv": operator.floordiv,
    "aten::format": str.format,
    "aten::ge": operator.ge,
    "aten::gt": operator.gt,
    "aten::le": operator.le,
    "aten::list": list,
    "aten::len": len,
    "aten::lt": operator.lt,
    "aten::mul": operator.mul,
    "aten::ne": operator.ne,
    "aten::neg": operator.neg,
    "aten::remainder": operator.mod,
    "aten::slice": lambda items, start=None, end=None, step=1: items[start:end:step],
    "aten::sub": operator.sub,
    "prim::max": max,
    "prim::min": min,
}
_OF_TENSORS: dict[str, Callable[..., Any]] = {
    "aten::__getitem__": operator.getitem,
    "aten::__is__": operator.is_,
    "aten::__isnot__": operator.is_not,
    "aten::dim": Tensor.dim,
    "aten::group_norm": torch.group_norm,  # under this name it is seen by torch functions' modes
    "aten::len": len,
    "aten::size": lambda x, axis=None: list(x.shape) if axis is None else x.shape[axis],
    "prim::device": lambda x: x.device,
    "prim::dtype": lambda x: x.dtype,
}


class UnreadableScriptError(Exception):
    """A scripted module does something that is not known here."""


def outermost_scripted(root: nn.Module) -> list[str]:
    """List the paths of scripted modules that lie in no other scripted module."""
    found: list[str] = []
    for path, module in root.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and not any(path.startswith(f"{p}.") for p in found):
            found.append(path)
    return found


def interpret_scripts(root: nn.Module, spare: Iterable[str] = ()) -> None:
    """Put `Interpreted` modules in place of scripted ones, in place.

    Args:
        root: A copy of a tail.
        spare: Paths that stay as they are.
    """
    for path in set(outermost_scripted(root)) - set(spare):
        exchange(root, path, Interpreted(root.get_submodule(path)))


def unreadable_scripts(tail: nn.Module, values: Sequence[Tensor]) -> dict[str, str]:
    """Try every scripted module of a tail as Python; give those that do not do the same, and why.

    Args:
        tail: The tail.
        values: Example values of the feature and the live tensors.

    Returns:
        By path, why the module keeps its widths.
    """
    found = {}
    for path in outermost_scripted(tail):
        trial = clone_module(tail, share=True)
        exchange(trial, path, Interpreted(tail.get_submodule(path)))
        name = getattr(tail.get_submodule(path), "original_name", "")
        try:
            want, got = (_output(module, values) for module in (tail, trial))
            same = all(torch.allclose(a, b, equal_nan=True) for a, b in zip(want, got, strict=True))
            why = "" if same else "it gives something else when it is read as Python"
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
        if why:
            found[path] = f"code that is not Python: the scripted module {path} ({name}); {why}"
    return found


def _output(module: nn.Module, values: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [t for t in tensors(module(*(value.clone() for value in values))) if t.is_floating_point()]


class Interpreted(nn.Module):
    """A scripted module's forward, run in Python on parameters of the same names.

    Args:
        script: The module; its weights are shared.

    Raises:
        UnreadableScriptError: In a call, where the script does something that is not known here.
    """

    def __init__(self, script: Any) -> None:
        super().__init__()
        self._script = (script,)  # out of sight of nn.Module
        for name, tensor in script.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        for name, tensor in script.named_buffers(recurse=False):
            self.register_buffer(name, tensor)
        for name, child in script.named_children():
            self.add_module(name, Interpreted(child))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the script; takes and gives what it does."""
        script = self._script[0]
        formal = script.forward.schema.arguments[1:]
        for argument in formal[len(args) :]:
            args = (*args, kwargs.get(argument.name, argument.default_value))
        graph = script.forward.graph.copy()
        torch._C._jit_pass_inline(graph)
        values = dict(zip((value.debugName() for value in graph.inputs()), (self, *args), strict=True))
        results = _run(graph, values)
        return results[0] if len(results) == 1 else tuple(results)

    def attribute(self, name: str) -> Any:
        """Give a part of the module, or a constant of the script."""
        known = name in self._parameters or name in self._buffers or name in self._modules
        return getattr(self, name) if known else self._script[0]._c.getattr(name)


def _run(block: Any, values: dict[str, Any]) -> list[Any]:
    """Run the nodes of a graph or a block; gives the values of its outputs."""
    for node in block.nodes():
        outputs = [value.debugName() for value in node.outputs()]
        given = [values[value.debugName()] for value in node.inputs()]
        found = _step(node, given, values)
        values.update(zip(outputs, found if len(outputs) != 1 else [found], strict=True))
    return [values[value.debugName()] for value in block.outputs()]


def _step(node: Any, given: Sequence[Any], values: dict[str, Any]) -> Any:
    """Run one node; gives its value, or a sequence of them where it has not exactly one."""
    kind = node.kind()
    match kind:
        case "prim::Constant":
            return node.output().toIValue()
        case "prim::GetAttr":
            return given[0].attribute(node.s("name"))
        case "prim::ListConstruct":
            return list(given)
        case "prim::TupleConstruct":
            return tuple(given)
        case "prim::ListUnpack" | "prim::TupleUnpack":
            found = list(given[0])
            return found[0] if len(found) == 1 else found
        case "prim::unchecked_cast":
            return given[0]
        case "prim::If":
            branch = list(node.blocks())[0 if given[0] else 1]
            return _one_or_all(_run(branch, values))
        case "prim::Loop":
            return _one_or_all(_loop(next(iter(node.blocks())), given, values))
        case "prim::RaiseException":
            raise UnreadableScriptError(f"the script raises {given[0]}")
    is_of_tensor = bool(given) and isinstance(given[0], Tensor)
    known = (_OF_TENSORS if is_of_tensor else _NUMBERS).get(kind)
    if known is not None:
        return known(*given)
    namespace, _, name = kind.partition("::")
    if namespace != "aten" or not hasattr(torch.ops.aten, name):
        raise UnreadableScriptError(f"the script uses {kind}")
    schema = torch._C.parse_schema(node.schema())
    operation = getattr(getattr(torch.ops.aten, name), schema.overload_name or "default")
    pairs = list(zip(schema.arguments, given, strict=True))
    positional = [value for argument, value in pairs if not argument.kwarg_only]
    return operation(*positional, **{a.name: value for a, value in pairs if a.kwarg_only})


def _loop(body: Any, given: Sequence[Any], values: dict[str, Any]) -> list[Any]:
    most, goes_on, *carried = given
    names = [value.debugName() for value in body.inputs()]
    turn = 0
    while goes_on and turn < most:
        goes_on, *carried = _run(body, {**values, **dict(zip(names, (turn, *carried), strict=True))})
        turn += 1
    return carried


def _one_or_all(found: list[Any]) -> Any:
    return found[0] if len(found) == 1 else found
