"""Decoders that run once per chunk of frames."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retroexit
from retroexit.errors import InputMismatchError


class _Causal(nn.Module):
    """A convolution over time that keeps the last frame of a chunk, in the decoder's cache or its own result."""

    def __init__(self, i, o):
        super().__init__()
        self.conv = nn.Conv3d(i, o, (2, 3, 3), padding=(0, 1, 1))

    def forward(self, x, cache):
        before = cache.get(id(self), torch.zeros_like(x[:, :, :1]))
        cache[id(self)] = x[:, :, -1:]
        return F.relu(self.conv(torch.cat([before, x], 2)))


class _Level(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.first, self.second = _Causal(i, o), _Causal(o, o)

    def forward(self, x, cache):
        x = self.second(self.first(x, cache), cache)
        return F.interpolate(x, scale_factor=(1, 2, 2))


class _Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList([_Level(4, 32), _Level(32, 32), _Level(32, 16)])
        self.head = nn.Conv3d(16, 3, 1)

    def forward(self, z):
        cache, frames = {}, torch.zeros(z.shape[0], 3, z.shape[2], 8 * z.shape[3], 8 * z.shape[4])
        for i in range(z.shape[2]):
            x = z[:, :, i : i + 1]
            for level in self.levels:
                x = level(x, cache)
            frames[:, :, i : i + 1] = self.head(x)
        return frames


@pytest.fixture(scope="module")
def video():
    torch.manual_seed(0)
    return _Video().eval(), torch.randn(1, 4, 3, 2, 2)


def test_a_stage_that_runs_once_per_chunk_is_one_stage(video):
    generator, z = video
    stages = retroexit.find_stages(generator, (z,))
    assert [stage.path for stage in stages] == ["levels.0", "levels.1", "levels.2"]
    assert [stage.macs for stage in stages][1] == 3 * (4 * 4 * 2 * 2 * 9 * 32 * 32)  # three turns, two layers at 4x4
    assert stages[0].shape == (1, 32, 1, 4, 4)
    live = [shape for _, shape in stages[0].live]  # the features of the other turns, and nothing that layers keep
    assert sorted(live) == [(1, 4, 3, 2, 2), (1, 32, 1, 4, 4), (1, 32, 1, 4, 4)]


@pytest.mark.parametrize("scale", [1, 1 / 4])
def test_a_branch_replaces_the_rest_of_every_turn(video, scale):
    generator, z = video
    model = retroexit.wrap(generator, [1, 2], scale, min_channels=4, example_inputs=(z,))
    larger = torch.randn(2, 4, 3, 2, 3)
    with torch.no_grad():
        for x in (z, larger):
            expected = generator(x)
            outputs = model.all_exits(x)
            assert torch.equal(outputs[-1], expected)
            assert all(o.shape == expected.shape for o in outputs)
            if scale == 1:
                assert all(map(torch.equal, outputs, [expected] * 3))
            else:
                moving = (outputs[0][:, :, 1:] - outputs[0][:, :, :-1]).abs().amax((0, 1, 3, 4))
                assert (moving > 0).all()  # no turn is a copy of another


def test_another_number_of_chunks_is_refused(video):
    model = retroexit.wrap(video[0], [1], 1 / 4, min_channels=4, example_inputs=(video[1],))
    with pytest.raises(InputMismatchError, match=r"\(1, 4, 5, 2, 2\).*Wrap again with such example inputs"):
        model(torch.randn(1, 4, 5, 2, 2), exit=1)
