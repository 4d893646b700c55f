"""What the recorder relies on in PyTorch beyond its documentation."""

import pytest
import torch
from torch import nn

from retroexit.tracing.record import record


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_hooks_can_be_put_on_scripted_modules_and_run_around_the_users():
    order = []
    for module in (nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2))):
        order.clear()
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(lambda *_: order.append("user's pre-hook"))
            module.register_forward_hook(lambda *_: order.append("user's hook"))
        nn.Module.register_forward_pre_hook(module, lambda *_: order.append("first"), prepend=True, with_kwargs=True)
        nn.Module.register_forward_hook(module, lambda *_: order.append("last"), always_call=True)
        module(torch.rand(1, 2))
        assert (order[0], order[-1]) == ("first", "last")


def test_a_forward_that_catches_an_error_of_a_module_is_recorded():
    class Part(nn.Module):
        def forward(self, x):
            if x.dim() == 3:
                raise ValueError
            return x * 2

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.layer = Part(), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            try:
                self.part(x[0])
            except ValueError:
                x = x + 1
            return self.layer(self.part(x))

    recording = record(Tries().eval(), (torch.rand(1, 3, 4, 4),))
    called = [node.target for node in recording.nodes if node.op == "call_module"]
    assert called == ["part", "layer"]


def test_the_users_hooks_run_as_before_and_stay():
    generator = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval()
    calls = []
    generator[0].register_forward_hook(lambda _m, _a, out: out + len(calls) * 0 + 1)
    generator[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.rand(1, 3, 4, 4)
    expected, hooks = generator(x), [dict(m._forward_hooks) for m in generator.modules()]
    assert torch.equal(record(generator, (x,)).output, expected)
    assert [dict(m._forward_hooks) for m in generator.modules()] == hooks
    assert not any(m._forward_pre_hooks for m in generator.modules() if m is not generator[0])
    assert len(calls) == 2
