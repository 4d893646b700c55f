"""Record one real execution of a generator as a `torch.fx.Graph` whose leaves are whole modules.

`torch.fx.symbolic_trace` fails at the first ``if`` on a shape; the recorder runs on real tensors. Sizes stay symbolic,
so that a recording of one sample runs with any batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from retroexit.core.nested import flatten, tensors
from retroexit.core.samples import conversion_advice
from retroexit.errors import DeviceError, GeneratorError, ModeError, NonFiniteError, RecordingError
from retroexit.tracing.kept_state import kept_state
from retroexit.tracing.recorder import QUESTIONS, Call, Read, Recorder, forget
from retroexit.tracing.unchanged import Snapshot, refuse_accelerate

_ARRAYS = ("numpy", "tolist", "__array__")
_MOST_READS = 16


@dataclass
class Recording:
    """One execution of a generator."""

    graph: fx.Graph  # the execution. Placeholders are the input tensors, leaves are whole modules
    constants: dict[str, Any]  # values that are neither inputs nor parameters nor buffers, by node target
    inputs: list[tuple[Any, ...]]  # for each placeholder, the path of its tensor in (args, kwargs)
    calls: list[Call]  # every call of a module outside of leaves, in order; the generator's own is the first
    macs: int
    output: Any  # what the generator returned
    snapshot: Snapshot  # the generator's modules, hooks and settings when it ran
    reads: list[Read]  # values read out of tensors into Python; they are frozen in the graph
    draws: bool = False  # whether the forward drew random numbers from PyTorch's generators

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
    """Run a generator, in eval mode, once and record the execution as a graph; leaves the generator unchanged.

    Args:
        generator: The trained generator.
        args: Its positional inputs.
        kwargs: Its keyword inputs.
        is_leaf: Decides by path and module whether the module becomes one node. Default: every module without
            submodules, and everything under ``torch.nn`` except containers.
        observing: Allow tensors inside objects and tensors made outside PyTorch, and guess what depends on them. Such a
            graph can be analysed, but not run.
        change: Number of the read that returns another value, to test what depends on it.

    Raises:
        GeneratorError: If the generator raises (`DeviceError`: by device or precision), is in train mode (`ModeError`),
            has hooks of accelerate, or its output is not finite (`NonFiniteError`).
        RecordingError: If it passes tensors inside objects that a graph cannot follow.
    """
    kwargs = dict(kwargs or {})
    name = type(generator).__name__
    if generator.training:
        raise ModeError(f"{name} must be in eval mode. Call generator.eval() first.")
    refuse_accelerate(generator)
    snapshot = Snapshot(generator)
    recorder = Recorder(generator, is_leaf or _is_atom, observing=observing, change=change)
    inputs: list[tuple[Any, ...]] = []
    for path, leaf in flatten((tuple(args), kwargs)):
        if isinstance(leaf, Tensor) and not recorder.has_node(leaf):
            recorder.bind(recorder.graph.placeholder(f"input{len(inputs)}"), leaf)
            inputs.append(path)
    output, draws = _run(recorder, snapshot, args, kwargs)
    for tensor in tensors(output):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"{name} returned NaN or infinity in a tensor of shape {tuple(tensor.shape)} on the example "
                "inputs. Check its weights and the range of the inputs."
            )
    graph, calls, macs = recorder.graph, recorder.calls, recorder.counter.macs
    return Recording(graph, recorder.constants, inputs, calls, macs, output, snapshot, recorder.reads, draws)


def _run(recorder: Recorder, snapshot: Snapshot, args: Any, kwargs: Any) -> tuple[Any, bool]:
    """Run the generator and complete the graph; returns the output, and whether random numbers were drawn."""
    generator = recorder.generator
    with unobserved(generator), kept_state(generator), torch.no_grad(), recorder.hooked(), recorder.counter, recorder:
        recorder.is_running = True
        before = random_states(generator)
        try:
            output = generator(*args, **kwargs)
            result = recorder.to_nodes(output)
        except RecordingError:
            raise
        except Exception as error:
            raise _explain(generator, args, kwargs, error) from error
        finally:
            recorder.is_running = False
            forget(vars(recorder).get("memoised", ()))  # their keys hold the recording
        snapshot.drop_changed()  # before what the forward has set is set back
        draws = any(not torch.equal(a, b) for a, b in zip(before, random_states(generator), strict=True))
    recorder.graph.output(result)
    _drop_unused_sizes(recorder.graph, recorder.calls)
    return output, draws


def random_states(generator: nn.Module) -> list[Tensor]:
    """States of the random number generators that a forward draws from."""
    devices = {parameter.device for parameter in generator.parameters() if parameter.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _is_atom(_path: str, module: nn.Module) -> bool:
    """Return whether a module is the smallest thing that a recording distinguishes."""
    if isinstance(module, torch.jit.ScriptModule) or not any(True for _ in module.children()):
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    is_builtin = type(module).__module__.startswith("torch.nn.modules")
    is_parametrized = torch.nn.utils.parametrize.is_parametrized(module)
    return (is_builtin and not isinstance(module, containers)) or is_parametrized


@contextmanager
def unobserved(generator: nn.Module, draws: bool = True) -> Iterator[None]:
    """Restore buffers and random states that change inside the block.

    Random states are the process's: without ``draws`` they are left alone, and with them other threads' draws.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in generator.buffers()]
    devices = {tensor.device for tensor in (*generator.parameters(), *generator.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    try:
        # Leaving inference mode switches gradients on, whatever they were.
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.random.fork_rng(cuda, draws):
            yield
    finally:
        for buffer, copy in buffers:
            if not torch.equal(buffer, copy):
                buffer.detach().copy_(copy)


def _drop_unused_sizes(graph: fx.Graph, calls: list[Call]) -> None:
    """Erase the nodes of unused sizes, and renumber the node ranges of calls."""
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
    for x in inputs:
        if weight is not None and (x.device != weight.device or (x.is_floating_point() and x.dtype != weight.dtype)):
            return DeviceError(
                f"{name} and its inputs must share device and precision, got parameters on {weight.device} in "
                f"{weight.dtype} and an input {tuple(x.shape)} on {x.device} in {x.dtype}. Convert one. {cause}"
            )
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs) or "no tensors"
    return GeneratorError(
        f"{name} rejects the example inputs ({shapes}). Pass inputs that generator(*inputs) takes."
        f"{conversion_advice((args, kwargs))} {cause}"
    )


def steering_line(recording: Recording, record_changed: Callable[[int], Recording]) -> str:
    """Find a read whose value depends on the inputs and changes what the forward does.

    A read may stay frozen if another value raises or changes nothing. ``record_changed`` records again, with another
    value for the read of this number. Returns ``file:line: code``, empty if there is none.
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
