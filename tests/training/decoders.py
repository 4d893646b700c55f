"""Small generators, a metric without weights and helpers for fits; pytest has this folder on its path."""

import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import retroexit
from retroexit.core.files import read_tensors
from retroexit.metrics import QualityMetric


class Distance(QualityMetric):
    name = "distance"

    def compare(self, a, b):
        return ((a - b).square().mean((1, 2, 3)) + 1e-12).sqrt()


class Judge(nn.Module):
    """A discriminator of pixels, with one score or one for each class."""

    def __init__(self, scores=1):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
            self.drop, self.last = nn.Dropout(0.3), nn.Conv2d(4, scores, 1)

    def forward(self, image):
        return self.last(self.drop(torch.relu(self.first(image))))


class Layer(nn.Module):
    def __init__(self, i, o, up=False):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2) if up else nn.Identity()
        self.conv = nn.Conv2d(i, o, 3, padding=1)
        self.norm = nn.BatchNorm2d(o)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(self.up(x))))


class Decoder(nn.Module):
    """Latents ``(N, 4, 4, 4)`` to images ``(N, 3, 16, 16)`` in three stages."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 12, 1)
        self.stages = nn.ModuleList([Layer(12, 12, True), Layer(12, 12, True), Layer(12, 8)])
        self.rgb = nn.Conv2d(8, 3, 1)

    def features(self, z):
        h = self.stem(z)
        for stage in self.stages:
            h = stage(h)
        return h

    def forward(self, z):
        return torch.tanh(2 * self.rgb(self.features(z)))


class Plain(Decoder):
    """Without norms over the batch, whose statistics would tell parts of a batch from the whole."""

    def __init__(self):
        super().__init__()
        for stage in self.stages:
            stage.norm = nn.Identity()


class Noisy(Decoder):
    """Draws noise per sample in front of the stages, uses it behind them, and draws more there."""

    def forward(self, z):
        noise = torch.randn(z.shape[0], 1, 16, 16)
        h = self.features(z + 0.5 * torch.randn_like(z))
        return torch.tanh(self.rgb(h + noise + 0.3 * torch.randn(z.shape[0], 1, 16, 16)))


class SharedNoise(Decoder):
    def forward(self, z):
        noise = torch.randn(1, 1, 16, 16)
        return torch.tanh(self.rgb(self.features(z) + noise))


class Chain(nn.Module):
    """Convolutions of four channels, before which noise is added on request; all maps have one size."""

    def __init__(self, stages, noise=False):
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(stages))
        self.rgb, self.noise = nn.Conv2d(4, 3, 1), noise

    def forward(self, x):
        x = x + torch.randn_like(x) if self.noise else x
        for stage in self.stages:
            x = stage(x).relu()
        return torch.tanh(self.rgb(x))


class Copying(nn.Module):
    """Every map, the image too, is an enlarged copy of the input."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(3)])
        self.rgb = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            for conv in (*self.stages, self.rgb):
                conv.weight.copy_(torch.eye(3)[:, :, None, None])
                conv.bias.zero_()

    def forward(self, x):
        h = self.stages[0](x)
        h = self.stages[1](nn.functional.interpolate(h, scale_factor=2.0))
        h = self.stages[2](nn.functional.interpolate(h, scale_factor=2.0))
        return self.rgb(h)


def make(kind=Decoder):
    """Build a generator with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        generator = kind()
        for module in generator.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return generator.eval()


def wrap(generator=None, **options):
    """Attach fresh branches after the first two stages, without looking for widths, which takes long."""
    defaults = {"attach_at": [1, 2], "scale": 1, "init": "scratch", "image_range": (-1, 1), "adapter": False}
    options = defaults | options
    options.setdefault("example_inputs", (latents(2),))
    return retroexit.wrap(generator if generator is not None else make(), **options)


HALVES = {"init": "inherit", "scale": 0.5, "min_channels": 8}
"""Options of branches with half of the backbone's channels."""


def latents(count):
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(5))


SETTINGS = {"steps": 4, "batch": 3, "predictor_steps": 3, "checkpoint_every": 3}
SETTINGS |= {"cache_batch": 4, "held_out": 0.2}


def fit(model, folder, inputs=None, **settings):
    inputs = latents(10) if inputs is None else inputs
    return retroexit.fit(model, inputs, folder, progress=False, **({"metric": Distance()} | SETTINGS | settings))


def trained(model):
    tensors = {f"branches.{k}": v for k, v in model.branches.state_dict().items()}
    tensors |= {f"predictor.{k}": v for k, v in model.predictor.state_dict().items()}
    if model.bank is not None:
        tensors["bank.values"] = torch.from_numpy(model.bank.values.astype("float32"))
        tensors["bank.source"] = model.bank.source
        tensors["bank.keys"] = model.bank.search(torch.ones(1, 12, 8, 8)).distances
    return tensors


def checkpoint(folder, number):
    """Tensors and step of the checkpoint of an exit."""
    tensors, about = read_tensors(folder / f"branches/exit{number}.safetensors")
    return tensors, about["step"]


def same(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@contextmanager
def interrupted(owner, name, after):
    """Raise from inside the call with this number, as Ctrl-C does, and expect that."""
    real, calls = getattr(owner, name), iter(range(10**6))

    def sometimes(*args, **kwargs):
        if next(calls) == after:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, sometimes)
        yield


def start_script(code, *arguments, launcher=()):
    """Run Python code, which sees `decoders`, `Path` and its arguments as `args`, in processes of its own."""
    setup = "import json, sys, torch\nfrom pathlib import Path\n"
    setup += f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport decoders\n"
    setup += f"args = json.loads(sys.argv[-1])\ntorch.set_num_threads({torch.get_num_threads()})\n"
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(setup + code)
        words = [sys.executable, *launcher, str(script), json.dumps(arguments, default=str)]
        return subprocess.run(words, capture_output=True, text=True, timeout=240)
