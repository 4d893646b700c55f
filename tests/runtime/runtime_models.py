"""A routed model with a promise, and its inputs; pytest has this folder on its path."""

import torch
from torch import nn

import retroexit
from retroexit.guidance import build_bank, with_slopes
from retroexit.retrieval import ExactRetriever
from retroexit.routing.calibration import Calibration
from retroexit.routing.predictor import Predictor


class Decoder(nn.Module):
    """Four stages; the second writes into its input; a gain is handed in and passes by."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 1)
        self.stages = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.rgb = nn.Conv2d(8, 3, 1)

    def forward(self, x, gain):
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = nn.functional.interpolate(x, scale_factor=2.0) if i == 2 else x
            x = stage(x).relu_() + gain[:, None, None, None]
        return {"image": torch.tanh(self.rgb(x)), "mean": x.mean((1, 2, 3))}


def inputs(count, size=(8, 8)):
    return torch.randn(count, 4, *size), torch.rand(count)


def wrapped(guidance=None, order=0, reads="features", rule=None, attach_at=(2, 3)):
    """A model whose predictor is random, with a promise that lets about half of the inputs leave early."""
    torch.manual_seed(0)
    stages = [f"stages.{i}" for i in range(4)]
    options = {"stages": stages, "min_channels": 4, "guidance": guidance, "adapter": False, "image": "image"}
    model = retroexit.wrap(Decoder().eval(), list(attach_at), 1 / 2, example_inputs=inputs(1), **options)
    if guidance:
        keys, values = torch.randn(6, 8, 8, 8), torch.randn(6, 8, 8, 8)
        patch = guidance.patch
        model.bank = build_bank(
            [(keys, range(6))], lambda rows: values[rows], patch=patch, size=20, retriever=ExactRetriever()
        )
        if order:
            model.bank = with_slopes(model.bank, [(keys, values)], 6 * 64)
    exits = len(attach_at)
    model.predictor = Predictor(5 if reads == "inputs" else 8, exits, reads=reads).eval()
    if rule is not None:
        predicted = model.predict(*inputs(60))
        losses = predicted * torch.rand(60, exits) * 1.2
        model.calibration = Calibration(losses, predicted, 0.3, **rule)
    return model
