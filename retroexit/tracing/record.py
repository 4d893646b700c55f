"""Write one real execution of a generator into a `torch.fx.Graph` whose leaves are whole modules.

`torch.fx.symbolic_trace` runs a forward on proxies and fails at the first ``if`` on a shape. The recorder
runs it on real tensors. Sizes stay symbolic, so that a recording of one sample runs with any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from retroexit.core.nested import flatten, tensors
from retroexit.errors import DeviceError, GeneratorError, ModeError, NonFiniteError, RecordingError
from retroexit.tracing.recorder import QUESTIONS, Call, Read, Recorder

__all__ = ["Recording", "record", "steering_line", "unobserved"]

_ARRAYS = ("numpy", "tolist", "__array__")
_MOST_READS = 16


@dataclass
class Recording:
    """One execution of a generator.

    Attributes:
        graph: The execution. Placeholders are the tensors among the inputs, leaves are whole modules.
        constants: Values that the forward used and that are neither inputs nor parameters nor buffers, by
            node target.
        inputs: For each placeholder, the path of its tensor in ``(args, kwargs)``.
        calls: Every call of a submodule that was not inside a leaf, in order.
        macs: Multiply-accumulates of the whole execution.
        output: What the generator returned.
        modes: ``training`` flag of every submodule during the recording.
        reads: Values that were read out of tensors into Python; they are frozen.
    """

    graph: fx.Graph
    constants: dict[str, Any]
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
    """Run a generator once and write the execution into a graph.

    The generator is left as it was: hooks are removed, changed buffers and random states are restored.

    Args:
        generator: The trained generator, in eval mode.
        args: Its positional inputs.
        kwargs: Its keyword inputs.
        is_leaf: Decides by path and module whether the module becomes one node. By default every module
            without submodules, and everything under ``torch.nn`` but the containers.
        observing: Whether the graph is only looked at, not run: tensors may be inside objects or come from
            outside PyTorch; what depends on what is then a guess.
        change: Number of the read that returns another value, to test what depends on it.

    Raises:
        GeneratorError: If the generator raises on these inputs; its error is shown and chained.
        DeviceError: If it raises and its parameters and the inputs differ in device or precision.
        NonFiniteError: If its output holds NaN or infinity.
        ModeError: If it is in train mode.
        RecordingError: If it passes tensors inside objects that a graph cannot follow.
    """
    kwargs = dict(kwargs or {})
    name = type(generator).__name__
    if generator.training:
        raise ModeError(f"{name} must be in eval mode. Call generator.eval() first.", generator)
    recorder = Recorder(generator, is_leaf or _is_atom, observing=observing, change=change)
    placeholders = _make_placeholders(recorder, args, kwargs)
    with unobserved(generator), torch.no_grad(), recorder.hooked(), recorder.counter, recorder:
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
                f"{name} returned NaN or infinity in a tensor of shape {tuple(tensor.shape)} on the example "
                "inputs. Check its weights and the range of the inputs.",
                tensor,
            )
    return Recording(
        graph=recorder.graph,
        constants=recorder.constants,
        inputs=placeholders,
        calls=recorder.calls,
        macs=recorder.counter.macs,
        output=output,
        modes={name: module.training for name, module in generator.named_modules()},
        reads=recorder.reads,
    )


def _is_atom(_path: str, module: nn.Module) -> bool:
    """Return whether a module is the smallest thing that a recording distinguishes."""
    if isinstance(module, torch.jit.ScriptModule) or not any(True for _ in module.children()):
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    is_builtin = type(module).__module__.startswith("torch.nn.modules")
    is_parametrized = torch.nn.utils.parametrize.is_parametrized(module)
    return (is_builtin and not isinstance(module, containers)) or is_parametrized


@contextmanager
def unobserved(generator: nn.Module) -> Iterator[None]:
    """Restore buffers and random states that change inside the block."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in generator.buffers()]
    devices = {tensor.device for tensor in (*generator.parameters(), *generator.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    try:
        # Leaving inference mode switches gradients on, whatever they were.
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for buffer, copy in buffers:
            if not torch.equal(buffer, copy):
                buffer.detach().copy_(copy)


def _make_placeholders(recorder: Recorder, args: Any, kwargs: Any) -> list[tuple[Any, ...]]:
    paths: list[tuple[Any, ...]] = []
    for path, leaf in flatten((tuple(args), kwargs)):
        if isinstance(leaf, Tensor) and not recorder.stands_for(leaf):
            recorder.bind(recorder.graph.placeholder(f"input{len(paths)}"), leaf)
            paths.append(path)
    return paths


def _drop_unused_sizes(graph: fx.Graph, calls: list[Call]) -> None:
    """Erase the nodes of shapes that were only looked at, and renumber the calls' node ranges."""
    old = list(graph.nodes)
    for node in reversed(old):
        if node.meta.get("size") and not node.users:
            graph.erase_node(node)
    remaining = set(graph.nodes)
    position = [0]
    for node in old:
        position.append(position[-1] + (node in remaining))
    for call in calls:
        call.begin, call.end = position[call.begin], position[call.end]


def _explain(generator: nn.Module, args: Any, kwargs: Any, error: Exception) -> GeneratorError:
    inputs = tensors((args, kwargs))
    weight = next(iter(generator.parameters()), None)
    name, cause = type(generator).__name__, f"The generator raised {type(error).__name__}: {error}."
    for tensor in inputs:
        if weight is None:
            break
        if tensor.device != weight.device:
            return DeviceError(
                f"{name} is on {weight.device} and an input of shape {tuple(tensor.shape)} on {tensor.device}"
                f". Move one of them. {cause}",
                tensor,
            )
        if tensor.is_floating_point() and tensor.dtype != weight.dtype:
            return DeviceError(
                f"{name} has {weight.dtype} parameters and an input of shape {tuple(tensor.shape)} is "
                f"{tensor.dtype}. Convert one of them. {cause}",
                tensor,
            )
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs) or "no tensors"
    return GeneratorError(
        f"{name} rejects the example inputs ({shapes}). Pass inputs that generator(*inputs) takes. {cause}",
        generator,
    )


def steering_line(recording: Recording, record_changed: Callable[[int], Recording]) -> str:
    """Find a read whose value depends on the inputs and changes what the forward does.

    Values of parameters and constants are the same in every call. A question that only guards (another
    answer raises) or that changes nothing may stay frozen.

    Args:
        recording: A recording.
        record_changed: Records again, with another value for the read of this number.

    Returns:
        The line that reads, ``file:line: code``; empty if there is none.
    """
    varies: dict[fx.Node, bool] = {}
    for node in recording.nodes:
        drawn = node.op == "call_function" and not node.all_input_nodes and "rand" in str(node.target)
        varies[node] = node.op == "placeholder" or drawn or any(varies[n] for n in node.all_input_nodes)
    for number, read in enumerate(recording.reads):
        if not varies.get(read.node, False):
            continue
        if read.name in _ARRAYS or number >= _MOST_READS:
            return read.line
        try:
            output = record_changed(number).output
        except Exception:
            if read.name in QUESTIONS:
                continue
            return read.line
        pairs = list(zip(tensors(output), tensors(recording.output), strict=False))
        if any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs):
            return read.line
    return ""
