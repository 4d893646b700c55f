"""Recording one forward pass, without side effects on the generator."""

import threading
import warnings

import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.core.modules import MacCounter
from retroexit.core.nested import flatten, rebuild, tensors
from retroexit.tracing.record import record


def test_macs_are_counted_per_call(toys):
    toy = toys.TOYS["group_norm"]()
    recording = record(toy.generator, toy.args)
    macs = {call.path: call.macs for call in recording.calls}
    assert macs["stem"] == 2 * 64 * 9 * 4 * 32
    assert macs["blocks.0"] == macs["blocks.0.a"] + macs["blocks.0.b"] == 2 * 64 * 2 * 9 * 32 * 32
    assert macs[""] == recording.macs == sum(macs[p] for p in ("stem", "blocks.0", "blocks.1", "blocks.2", "rgb"))


def test_counting_installs_no_hooks_that_other_threads_would_run():
    from torch.nn.modules import module as registry

    with MacCounter() as counter:
        assert not registry._global_forward_hooks and not registry._global_forward_pre_hooks
        nn.Linear(3, 5)(torch.rand(2, 3))
    assert counter.macs == 2 * 3 * 5


def test_recording_leaves_no_trace(every_toy, untouched):
    with untouched(every_toy.generator):
        record(every_toy.generator, every_toy.args, every_toy.kwargs)


def test_buffers_that_a_forward_changes_are_put_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layer(x)

    generator = Counts().eval()
    record(generator, (torch.rand(1, 3, 4, 4),))
    assert generator.calls.item() == 0


@pytest.mark.parametrize("runs_same_layer", [True, False])
def test_another_thread_is_not_recorded(runs_same_layer):
    other = nn.Conv2d(3, 3, 1)

    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            layer = self.layer if runs_same_layer else other
            thread = threading.Thread(target=lambda: layer(torch.rand(1, 3, 2, 2)))
            thread.start()
            thread.join()
            return self.layer(x)

    recording = record(Waits().eval(), (torch.rand(1, 3, 4, 4),))
    assert [call.path for call in recording.calls] == ["", "layer"]


def test_sizes_stay_symbolic_through_arithmetic():
    class Arithmetic(nn.Module):
        def forward(self, x):
            n, c, h, w = x.shape
            return x.reshape(n, (c * h) // 2, 2 * w) + x.new_zeros(n, 1, x.size(3) + w) + x.numel() * 0

    recording = record(Arithmetic().eval(), (torch.rand(1, 2, 4, 4),))
    reshape = next(node for node in recording.nodes if node.target == "reshape")
    assert all(hasattr(size, "op") for size in reshape.args[1:])


@pytest.mark.parametrize("grad", [True, False])
def test_the_gradient_mode_survives(toys, grad):
    toy = toys.TOYS["group_norm"]()
    with torch.set_grad_enabled(grad):
        record(toy.generator, toy.args)
        assert torch.is_grad_enabled() is grad
    with torch.inference_mode():
        record(toy.generator, toy.args)
        assert torch.is_inference_mode_enabled()


def test_nested_values_are_walked_and_rebuilt(toys):
    x, y = torch.rand(2), torch.rand(3)
    value = {"a": [x, (y, 1)], "b": toys.Pair(x, None), "c": toys.Picture(y, x), "d": slice(0, 2)}
    paths = [path for path, leaf in flatten(value) if isinstance(leaf, Tensor)]
    assert paths == [("a", 0), ("a", 1, 0), ("b", 0), ("c", "image"), ("c", "score")]
    doubled = rebuild(value, lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf)
    assert all(torch.equal(a, 2 * b) for a, b in zip(tensors(doubled), tensors(value), strict=True))
    assert type(doubled["b"]) is toys.Pair and doubled["c"].note == "kept" and doubled["d"] == slice(0, 2)
    assert torch.equal(value["c"].image, y)


@pytest.mark.parametrize("draw", [torch.randn_like, torch.rand_like, nn.Dropout(0.5).train(), torch.zeros_like])
def test_a_forward_that_draws_random_numbers_is_noticed(toys, draw):
    expected = draw is not torch.zeros_like

    class Noisy(nn.Module):
        def forward(self, x):
            return x + 0.1 * draw(x)

    toy = toys.chain(lambda i, o, up: toys.Block(i, o, up, lambda channels: Noisy()))
    generator, (x,) = toy.generator.eval(), toy.args
    assert record(generator, (x,)).draws is expected
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        retroexit.wrap(generator, [1], 1, example_inputs=(x,), self_test=False)
    texts = [str(warning.message) for warning in caught if "draws random numbers" in str(warning.message)]
    assert len(texts) == expected and all("torch.manual_seed" in text for text in texts)
