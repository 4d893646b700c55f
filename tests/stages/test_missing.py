"""Errors for decoders without stages; their advice works."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retroexit
from retroexit.errors import AttachPointError, RepeatedStageError


class _Shared(nn.Module):
    def __init__(self, *, advised=False):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        if advised:
            self.turns = nn.ModuleList(nn.Sequential(self.block) for _ in range(3))
        self.to_rgb = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        for i in range(3):
            x = F.interpolate(x, scale_factor=2)
            x = x + (self.turns[i](x) if hasattr(self, "turns") else self.block(x))
        return self.to_rgb(x)


ADVICE = r"self\.turns = nn\.ModuleList\(nn\.Sequential\(self\.block\) for _ in range\(3\)\)"


def test_a_block_that_runs_in_a_loop_is_named_with_the_line_to_write():
    generator, x = _Shared().eval(), torch.randn(1, 16, 4, 4)
    with pytest.raises(AttachPointError, match=rf"'block' runs 3 times.*{ADVICE}.*stages=\['turns.0', 'turns.1'\]"):
        retroexit.find_stages(generator, (x,))
    with pytest.raises(RepeatedStageError, match=f"'block' runs 3 times.*{ADVICE}"):
        retroexit.find_stages(generator, (x,), stages=["block"])


def test_the_advice_gives_stages_with_shared_weights():
    generator, z = _Shared(advised=True).eval(), torch.randn(1, 16, 4, 4)
    stages = retroexit.find_stages(generator, (z,))
    assert [stage.path for stage in stages] == ["turns.0", "turns.1", "turns.2"]
    model = retroexit.wrap(generator, [1, 2], 1.0, example_inputs=(z,))
    with torch.no_grad():
        assert all(torch.equal(model(z, exit=k), generator(z)) for k in (1, 2, 3))


class _Rolled(nn.Module):
    """A recurrent cell that is unrolled, behind a stem that runs once."""

    def __init__(self):
        super().__init__()
        self.stem, self.cell = nn.Conv2d(3, 32, 1), nn.Conv2d(64, 32, 3, padding=1)
        self.to_rgb = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        state = torch.zeros_like(x)
        for _ in range(4):
            state = torch.tanh(self.cell(torch.cat([x, state], 1)))
        return self.to_rgb(state)


def test_an_unrolled_cell_is_named_beside_what_runs_once():
    with pytest.raises(AttachPointError, match=r"'cell' runs 4 times.*Or name what runs once: stages=\['stem'\]"):
        retroexit.find_stages(_Rolled().eval(), (torch.randn(1, 3, 16, 16),))

    stages = retroexit.find_stages(_Rolled().eval(), (torch.randn(1, 3, 16, 16),), stages=["stem"])
    assert [stage.path for stage in stages] == ["stem"]


def test_the_error_for_a_generator_without_feature_maps_advises_to_group_its_layers():
    flat = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3 * 8 * 8), nn.Unflatten(1, (3, 8, 8)))
    with pytest.raises(AttachPointError, match="no module with weights.*Put the layers of each resolution into"):
        retroexit.find_stages(flat.eval(), (torch.randn(1, 8),))
