"""Compiled pieces and batches whose samples leave apart: one graph each, one pass, one wait for the device."""

import copy

import pytest
import torch
from runtime_models import Decoder, inputs, wrapped
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import retroexit
from retroexit.routing.render import Choice, render


def image(model, *args, **options):
    return model.image(model(*args, **options))


@torch.no_grad()
@pytest.mark.parametrize(
    ("backend", "exits", "thresholds", "other_size"),
    [
        pytest.param("eager", (1, 2, 3), (0.0, 0.8, 2.0), (12, 20), marks=pytest.mark.long),
        pytest.param("inductor", (1,), (), (8, 8), marks=pytest.mark.slow),  # it chooses kernels by size
    ],
)
def test_every_piece_is_one_graph_for_all_batches(backend, exits, thresholds, other_size):
    torch.compiler.reset()
    model = wrapped(rule={}, attach_at=(1, 2, 3))
    expected = copy.deepcopy(model)
    model.compile(backend=backend)
    routes = [{"exit": exit} for exit in exits] + [{"threshold": t} for t in thresholds]
    counters.clear()
    for count in (1, 2, 16):  # one sample is compiled apart; PyTorch's convolution for the CPU looks at 16
        for options in routes:
            image(model, *inputs(count), **options)
    warm = counters["stats"]["unique_graphs"]
    assert warm and not counters["graph_break"]
    for count, size in ((17, (8, 8)), (7, other_size), (1, other_size), (3, (8, 8))):
        args = inputs(count, size)
        for options in routes:
            output, reference = image(model, *args, **options), image(expected, *args, **options)
            torch.testing.assert_close(output, reference, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == warm <= 3 * 8


@torch.no_grad()
def test_compilation_follows_the_model_to_another_precision_and_not_into_copies():
    torch.compiler.reset()
    model = wrapped(attach_at=(2,))
    model.compile(backend="eager")
    twin, x = copy.deepcopy(model), inputs(2)
    branch = copy.deepcopy(model.branches[0])
    counters.clear()
    branch(*model.split.crossing(model.split.begin(x, {}).values, 0))
    first = counters["stats"]["unique_graphs"]
    model(*x, exit=1)
    assert counters["stats"]["unique_graphs"] == first + 1  # the stem is compiled, the copied branch is not
    model.double()
    x = tuple(value.double() for value in x)
    before = counters["stats"]["unique_graphs"]
    assert image(model, *x, exit=1).dtype == torch.float64 and counters["stats"]["unique_graphs"] == before + 2
    twin(*inputs(2), exit=1)
    assert counters["stats"]["unique_graphs"] == before + 4


def test_a_model_compiled_before_it_is_recorded_is_compiled_then():
    torch.compiler.reset()
    model = retroexit.wrap(Decoder().eval(), [2], 1 / 2, min_channels=4, adapter=False, image="image")
    model.compile(backend="eager")
    counters.clear()
    with torch.no_grad():
        model(*inputs(2), exit=1)
    assert counters["stats"]["unique_graphs"] == 2


@torch.no_grad()
def test_a_sample_is_the_same_whatever_its_company():
    model, args = wrapped(rule={}, attach_at=(1, 2, 3)), inputs(12)
    seen = set()
    for threshold in (0.5, 0.8, 1.1, 2.0):
        together, exits = model.routed(*args, threshold=threshold)
        seen.update(exits.tolist())
        for rows in ([11, 3, 7], [5]):
            apart, alone = model.routed(*(x[rows] for x in args), threshold=threshold)
            assert alone.tolist() == exits[rows].tolist()
            torch.testing.assert_close(apart["image"], together["image"][rows], atol=1e-5, rtol=0)
    assert len(seen) >= 3


class Waits(TorchFunctionMode):
    """Counts what would wait for a device: reads of values, and operations whose result's size depends on them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy", "unique"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_mixed_batch_runs_each_stage_once_and_waits_once_per_call():
    model = wrapped(attach_at=(1, 2, 3))
    runs, waits = [], []
    for segment in (*model.split.segments, model.split.rest):
        segment.register_forward_hook(lambda module, args, out: runs.append(len(args[0])))
    for count in (4, 32):
        args = inputs(count)
        exits = torch.arange(count) % 4 + 1
        begun = model.split.begin(args, {})
        runs.clear()
        with Waits() as seen:
            render(model.split, model.branches, model.guide, begun, Choice(exits))
        assert seen.names == ["tolist"] and runs == [count * 3 // 4, count // 2, count // 4]
        with Waits() as seen:
            model(*args, threshold=0.8)
        waits.append(len(seen.names))
    assert waits[0] == waits[1]
