"""A toy module in a folder of its own, and the command line run beside it."""

import itertools
import re
import sys
from dataclasses import dataclass

import pytest

from retroexit import cli

pytest.importorskip("typer")

TOY = """
import torch
from torch import nn

class Stage(nn.Module):
    def __init__(self, up):
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1)
        self.up = nn.Upsample(scale_factor=up)

    def forward(self, x):
        return self.up(torch.relu(self.conv(x)))

class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(4, 12, 1)
        self.stages = nn.ModuleList([Stage(2), Stage(2), Stage(1)])
        self.rgb = nn.Conv2d(12, 3, 1)

    def forward(self, z):
        h = self.stem(z)
        for stage in self.stages:
            h = stage(h)
        return torch.tanh(3 * self.rgb(h))

def decoder():
    return Decoder()

def with_inputs():
    return Decoder(), torch.rand(1, 4, 4, 4)

def with_keywords():
    return Decoder(), (), {"z": torch.rand(1, 4, 4, 4)}

def with_dict():
    return Decoder(), {"z": torch.rand(2, 4, 4, 4)}

def sized(width, bias=True, *, name="toy"):
    made = Decoder()
    made.stem = nn.Conv2d(width, 12, 1, bias=bias)
    return made

class Labelled(Decoder):
    def forward(self, z, label):
        return super().forward(z * (label + 1)[:, None, None, None])

class Stateful(Decoder):
    def forward(self, z):
        h = self.stages[0](self.stem(z))
        state = self.stages[1](h)
        return {"image": torch.tanh(self.rgb(self.stages[2](state))), "state": state}

def stateful():
    return Stateful()

def wrong_keywords():
    return Decoder(), (), 3

ready = Decoder()

def broken():
    raise RuntimeError("no weights here")

def number():
    return 3

def keyword_samples():
    return [{"z": z} for z in samples]

samples = torch.randn(12, 4, 4, 4, generator=torch.Generator().manual_seed(1))
few = samples[:5]
others = torch.randn(12, 4, 4, 4, generator=torch.Generator().manual_seed(2))

class Judge(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))

class Looks(nn.Sequential):
    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
"""


FIT = {"inputs": "toy.py:samples", "attach_at": "1,2", "scale": "1/2,3/4", "min_channels": "4"}
FIT |= {"metric": "ms-ssim", "steps": "2", "batch": "2", "predictor_steps": "3", "out": "run"}
FACE = (
    *("--loss", "megaportraits", "--instead", "vgg=features-random", "--instead", "ms-ssim=quality"),
    *("--discriminator", "toy.py:Judge", "--gaze", "toy.py:Looks"),
)


@dataclass
class Result:
    status: int
    out: str
    err: str
    next: str = ""  # the last line of the output, which says what to type next

    def fails_with(self, message):
        """Check that the command ended with one line, a pattern in it, and status 1."""
        assert self.status == 1
        assert re.fullmatch(rf"(warning: .*\n)*error: .*{message}.*\n", self.err), self.err
        assert "Traceback" not in self.err + self.out

    def succeeds(self):
        """Check the status; returns what was printed."""
        assert self.status == 0, self.err
        return self.out


@dataclass
class Runner:
    """Runs a command line; ``fit`` runs a fast fit of the toy, with some options replaced."""

    capsys: pytest.CaptureFixture[str]
    FACE = FACE

    def __call__(self, *arguments):
        self.capsys.readouterr()
        status = 0
        try:
            cli.main(arguments)
        except SystemExit as end:
            status = end.code or 0
        printed = self.capsys.readouterr()
        lines = printed.out.splitlines(keepends=True)
        following = lines.pop() if lines and lines[-1].startswith("next: ") else ""
        if isinstance(status, str):  # as the interpreter does
            return Result(1, "".join(lines), printed.err + status + "\n", following)
        return Result(status, "".join(lines), printed.err, following)

    def fit(self, *words, target="toy.py:decoder", **options):
        pairs = [(f"--{name.replace('_', '-')}", value) for name, value in (FIT | options).items()]
        return self("fit", target, *itertools.chain(*pairs), *words)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield Runner(capsys)
    for name in [name for name in sys.modules if str(tmp_path) in name]:
        del sys.modules[name]
