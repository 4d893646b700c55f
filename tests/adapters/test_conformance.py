"""Every adapter of the project passes the conformance test."""

import importlib
from pathlib import Path

import pytest
import torch
from small import kl
from torch import nn

from retroexit.testing import check_adapter

FOLDER = Path(__file__).resolve().parents[2] / "adapters"


def stylegan(adapter):
    sizes = {"z_dim": 16, "w_dim": 16, "resolution": 32, "channel_base": 512, "num_mapping_layers": 2}
    return fainter(adapter.StyleGANGenerator(**sizes), "torgb.weight")


def fainter(generator, name):
    """Keep the image of untrained weights in its range, where nothing bounds it."""
    with torch.no_grad():
        for path, parameter in generator.named_parameters():
            if path.endswith(name):
                parameter.mul_(0.1)
    return generator


INSTANCES = {
    "retroexit_diffusers": lambda _: fainter(kl(norm_num_groups=8).decoder, "conv_out.weight"),
    "retroexit_megaportraits": lambda adapter: adapter.MegaPortraitsG2d(24, channels=16, size=4),
    "retroexit_oasis": lambda adapter: adapter.OASISGenerator(5, 3, channels=2, crop=(64, 128), spade_hidden=8),
    "retroexit_stylegan": stylegan,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTANCES)
def test_the_adapter_conforms(name):
    adapter = importlib.import_module(name)
    generator = INSTANCES[name](adapter).eval()
    others = [nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()]
    report = check_adapter(generator, plugin=adapter, thin_at=[1], strangers=others)
    assert len(report.stages) >= 2
    claims = ["the generator is recognised, others are not", "example inputs run", "stages run once, in order"]
    claims += ["the image keeps its range", "at scale 1 every exit is the generator, bit for bit"]
    assert {*claims, "the generator is left as it was"} <= set(report.checked)
    batch = "samples of a batch do not change each other"
    assert batch in report.checked or f"{batch}: the generator draws random numbers" in report.skipped


def test_no_adapter_is_forgotten():
    assert {folder.name for folder in FOLDER.iterdir() if (folder / "plugin.py").exists()} <= set(INSTANCES)
