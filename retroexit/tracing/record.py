"""Write one real execution of a generator down as a `torch.fx.Graph` whose leaves are whole modules.

`torch.fx.symbolic_trace` runs a forward on proxies and stops at the first ``if`` on a shape. The recorder
runs it on real tensors instead: a `TorchFunctionMode` writes every tensor function as a node and a patched
``nn.Module.__call__`` writes chosen modules as ``call_module`` nodes. Sizes read from a tensor stay symbolic
(`TracedInt`), so that a recording made with a batch of one runs with a batch of eight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from retroexit.core.nested import flatten, tensors
from retroexit.errors import DeviceError, GeneratorError, ModeError, NonFiniteError, RecordingError
from retroexit.tracing.recorder import Call, Recorder
from retroexit.tracing.tensor_reads import Read

__all__ = ["Recording", "record", "unobserved"]

_PATCH_LOCK = threading.RLock()


@dataclass
class Recording:
    """One execution of a generator.

    Attributes:
        graph: The execution; placeholders are the tensors among the inputs, leaves are whole modules.
        constants: Tensors that the forward used and that are neither inputs nor parameters nor buffers, by
            node target.
        inputs: For each placeholder, the path of its tensor in ``(args, kwargs)``.
        calls: Every call of a submodule that was not inside a leaf, in order.
        macs: Multiply-accumulates of the whole execution.
        output: What the generator returned.
        modes: ``training`` flag of every submodule during the recording.
        reads: Values that were read out of tensors into Python; such values are frozen.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    inputs: list[tuple[Any, ...]]
    calls: list[Call]
    macs: int
    output: Any
    modes: dict[str, bool]
    reads: list[Read]

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes, in the order of execution."""
        return list(self.graph.nodes)


def record(
    generator: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    is_leaf: Callable[[str, nn.Module], bool] | None = None,
    *,
    observing: bool = False,
    change: int | None = None,
) -> Recording:
    """Run a generator once and write the execution down as a graph.

    The generator is left as it was: buffers that the run changed are put back, random number generators too.

    Args:
        generator: The trained generator, in eval mode.
        args: Its positional inputs.
        kwargs: Its keyword inputs.
        is_leaf: Tells for a path and a module whether the module becomes one node. By default every module
            that has no submodules of its own, and everything under ``torch.nn`` but the containers.
        observing: Whether the graph is to be looked at and not to be run: tensors may hide in objects or come
            from outside PyTorch; what depends on what is then a guess.
        change: Number of the read to which another value is given, to see what depends on it.

    Returns:
        The recording.

    Raises:
        GeneratorError: If the generator raises on these inputs (its own error is shown and chained).
        DeviceError: If it raises and its parameters and the inputs differ in device or precision.
        NonFiniteError: If its output holds NaN or infinity.
        ModeError: If it is in train mode.
        RecordingError: If it passes tensors around inside objects that a graph cannot follow.
    """
    kwargs = dict(kwargs or {})
    if generator.training:
        raise ModeError(
            f"asked to record {type(generator).__name__}; found it in train mode, where one forward pass "
            "changes "
            "its buffers. Call generator.eval() first.",
            generator,
        )
    recorder = Recorder(generator, is_leaf or is_atom, observing=observing, change=change)
    placeholders = _make_placeholders(recorder, args, kwargs)
    with unobserved(generator), torch.no_grad(), _patched_calls(recorder), recorder.counter, recorder:
        recorder.is_running = True
        try:
            output = generator(*args, **kwargs)
            result = recorder.to_nodes(output)
        except RecordingError:
            raise
        except Exception as error:
            raise _explain(generator, args, kwargs, error) from error
        finally:
            recorder.is_running = False
    recorder.graph.output(result)
    _drop_unused_sizes(recorder.graph, recorder.calls)
    for tensor in tensors(output):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"{type(generator).__name__} returned NaN or infinity in a tensor of shape "
                f"{tuple(tensor.shape)} on "
                "the example inputs. Check its weights and the range of the inputs.",
                tensor,
            )
    return Recording(
        graph=recorder.graph,
        constants=recorder.constants,
        inputs=placeholders,
        calls=recorder.calls,
        macs=recorder._macs(),
        output=output,
        modes={name: module.training for name, module in generator.named_modules()},
        reads=recorder.reads,
    )


def is_atom(path: str, module: nn.Module) -> bool:
    """Tell whether a module is the smallest thing a recording distinguishes."""
    if isinstance(module, torch.jit.ScriptModule) or not any(True for _ in module.children()):
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    is_builtin = type(module).__module__.startswith("torch.nn.modules")
    is_parametrized = torch.nn.utils.parametrize.is_parametrized(module)
    return (is_builtin and not isinstance(module, containers)) or is_parametrized


@contextmanager
def unobserved(generator: nn.Module) -> Iterator[None]:
    """Leave no trace of what runs inside: changed buffers and random number generators are put back."""
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in generator.buffers()]
    devices = {tensor.device for tensor in (*generator.parameters(), *generator.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    try:
        # Leaving inference mode switches gradients on, whatever they were.
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for buffer, version, copy in buffers:
            if buffer._version != version:
                buffer.detach().copy_(copy)


@contextmanager
def _patched_calls(recorder: Recorder) -> Iterator[None]:
    # The patch is seen by all threads; `Recorder.call_module` lets other threads' calls pass.
    with _PATCH_LOCK:
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder.call_module(original, module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]


def _make_placeholders(recorder: Recorder, args: Any, kwargs: Any) -> list[tuple[Any, ...]]:
    paths: list[tuple[Any, ...]] = []
    for path, leaf in flatten((tuple(args), kwargs)):
        if isinstance(leaf, Tensor) and id(leaf) not in recorder._node_of:
            recorder._bind(recorder.graph.placeholder(f"input{len(paths)}"), leaf)
            paths.append(path)
    return paths


def _drop_unused_sizes(graph: fx.Graph, calls: list[Call]) -> None:
    """Erase the nodes of shapes that were only looked at, and renumber the calls' node ranges."""
    old = list(graph.nodes)
    for node in reversed(old):
        if node.meta.get("size") and not node.users:
            graph.erase_node(node)
    remaining = set(graph.nodes)
    kept = [0]
    for node in old:
        kept.append(kept[-1] + (node in remaining))
    for call in calls:
        call.begin, call.end = kept[call.begin], kept[call.end]


def _explain(generator: nn.Module, args: Any, kwargs: Any, error: Exception) -> GeneratorError:
    given = tensors((args, kwargs))
    own = next(iter(generator.parameters()), None)
    name, cause = type(generator).__name__, f"{type(error).__name__}: {error}"
    for tensor in given:
        if own is not None and tensor.device != own.device:
            return DeviceError(
                f"{name} is on {own.device} and an input of shape {tuple(tensor.shape)} on {tensor.device}; "
                "the "
                f"generator raised {cause}. Move one of them.",
                tensor,
            )
        if own is not None and tensor.is_floating_point() and tensor.dtype != own.dtype:
            return DeviceError(
                f"{name} has {own.dtype} parameters and an input of shape {tuple(tensor.shape)} is "
                f"{tensor.dtype}; "
                f"the generator raised {cause}. Convert one of them.",
                tensor,
            )
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given) or "no tensors"
    return GeneratorError(
        f"{name} rejects the example inputs ({shapes}); it raised {cause}. Pass inputs that "
        "generator(*inputs) takes.",
        generator,
    )
