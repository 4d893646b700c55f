"""A wrapped generator with a predictor that reads the difficulty from the inputs."""

import pytest
import torch
from torch import nn

import retroexit
from retroexit.guidance import build_bank
from retroexit.retrieval import ExactRetriever


class _Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(10, 10, 3, padding=1), 0

    def forward(self, x):
        self.calls += 1
        return torch.relu(self.conv(x))


class _Decoder(nn.Module):
    """The first number of a latent says how hard the sample is; conditioning ``w`` is a live value."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 10, 1)
        self.stages = nn.ModuleList([_Stage() for _ in range(4)])
        self.style, self.rgb = nn.Linear(5, 10), nn.Conv2d(10, 3, 1)

    def forward(self, z, w):
        h = self.stem(z)
        h = nn.functional.interpolate(self.stages[0](h), scale_factor=2.0)
        for stage in self.stages[1:]:
            h = stage(h) * (1 + self.style(w)[:, :, None, None])
        return {"image": torch.tanh(self.rgb(h)), "mean": h.mean((1, 2, 3))}


class DifficultyPredictor(nn.Module):
    """A predictor that reads a sample's difficulty d off its inputs and predicts (d, d - 1, d - 2)."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return x.flatten(1)[:, :1] - torch.arange(3.0)


@pytest.fixture
def routed():
    """Make a model with exits after stages 1 to 3 whose predictor knows the difficulty of every sample."""

    def make(guided=False):
        torch.manual_seed(1)
        generator = _Decoder().eval()
        adapter = retroexit.Description(name="toy", predictor_inputs=lambda z, w: z[:, 0, 0, 0][:, None])
        options = {"init": "scratch", "adapter": adapter, "guidance": guided, "image": "image"}
        example = (torch.rand(2, 4, 4, 4), torch.rand(2, 5))
        model = retroexit.wrap(generator, [1, 2, 3], 1.0, example_inputs=example, **options)
        model.predictor = DifficultyPredictor()
        if guided:
            keys = [(torch.rand(6, 10, 4, 4), range(6))]
            values = torch.rand(6, 10, 8, 8)
            model.bank = build_bank(keys, lambda rows: values[rows], size=12, retriever=ExactRetriever())
        for stage in generator.stages:
            stage.calls = 0
        return model

    return make
