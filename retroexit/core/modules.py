"""Modules: their device, deep copies, and the multiply-accumulates (MACs, the paper's "GFLOPs") of a call.

1 MAC = 2 FLOPs. Convolutions, matrix products and attention count; interpolation, norms and activations do not.
"""

import contextlib
import copy
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from retroexit.core.nested import tensors

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""PyTorch's convolutions."""


def device_of(module: nn.Module, default: torch.device | None = None) -> torch.device:
    """Return the device of a module's weights; without any, ``default`` or the CPU."""
    return next((p.device for p in module.parameters()), default or torch.device("cpu"))


def wait_for(device: torch.device) -> None:
    """Wait until a GPU is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def without_autocast(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Switch `torch.autocast` off on a module's device."""
    kind = device_of(module).type
    is_known = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if is_known else contextlib.nullcontext()


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return dtype, shape and numbers of a tensor as bytes, to be hashed."""
    raw = tensor.detach().cpu().contiguous()
    return f"{raw.dtype}{tuple(raw.shape)}".encode() + raw.reshape(-1).view(torch.uint8).numpy().tobytes()


def precision_of(module: nn.Module) -> torch.dtype | None:
    """Return the type of a module's first floating-point parameter; ``None`` without any."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def clone_module(module: nn.Module, memo: dict[int, Any] | None = None, *, share: bool = False) -> nn.Module:
    """Copy a module deeply, also after a forward of legacy spectral norm; parameters of it require gradient.

    ``memo`` has copies that exist already, by id of the original. With ``share`` tensors are not copied.
    """
    memo = {} if memo is None else memo
    if share:
        memo.update({id(t): t for t in (*module.parameters(), *module.buffers())})
    for owner in module.modules():
        for value in vars(owner).values():
            if isinstance(value, Tensor) and id(value) not in memo and (share or not value.is_leaf):
                memo[id(value)] = value if share else value.detach().clone()
    with torch.no_grad():  # scripted modules copy parameters by an operation that records gradients
        duplicate = copy.deepcopy(module, memo)
    for parameter in () if share else duplicate.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return duplicate


@contextlib.contextmanager
def watching(module: nn.Module, paths: Iterable[str], see: Callable[[str, Any, Any, Any], None]) -> Iterator[None]:
    """Call ``see(path, args, kwargs, output)`` after every call of some submodules inside the block."""
    handles = []
    try:
        for path in paths:
            hook = lambda _, *call, path=path: see(path, *call)  # noqa: E731
            handles.append(module.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _NoModules(contextlib.nullcontext[None]):
    """Replaces PyTorch's module tracker, which hooks every module of the process. Totals do not need it."""

    parents = frozenset({"Global"})


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


class MacCounter(FlopCounterMode):
    """PyTorch's counter of floating-point operations, for totals alone."""

    def __init__(self) -> None:
        # The CPU's own attention kernel, which some releases of PyTorch leave out of the count.
        attention: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        super().__init__(display=False, custom_mapping={attention: _attention_flops})
        self.mod_tracker: Any = _NoModules()

    @property
    def macs(self) -> int:
        """Multiply-accumulates so far."""
        return int(self.get_total_flops()) // 2


def compile_alone(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function as one graph for any batch and size: all axes of its tensors but the second.

    torch.compile counts compilations per code object and gives up after a few, so each function gets its own. With
    ``dynamic=True`` it would take axes of equal size for one.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    own: Any = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    compiled: Any = torch.compile(own, fullgraph=True, **options)

    def marked(*args: Any, **kwargs: Any) -> Any:
        for tensor in tensors((args, kwargs)):
            for axis in range(tensor.dim()):
                if axis != 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return compiled(*args, **kwargs)

    return marked


def count_macs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Count the MACs of one call of ``function(*args, **kwargs)``, run without gradient."""
    with torch.no_grad(), MacCounter() as counter:
        function(*args, **kwargs)
    return counter.macs


def unit_of(macs: float) -> tuple[str, float]:
    """Choose a unit for a number of MACs: its name, and MACs per unit."""
    for name, least, scale in (("TMACs", 1e13, 1e12), ("GMACs", 1e8, 1e9), ("MMACs", 1e5, 1e6)):
        if macs >= least:
            return name, scale
    return "kMACs", 1e3
