"""Every adapter of the project passes the conformance test, and names wrong shapes."""

import importlib
from pathlib import Path

import pytest
import torch
from retroexit_megaportraits import MegaPortraitsG2d, frame_key
from retroexit_oasis import OASISDiscriminator, OASISGenerator, one_hot
from small import kl, oasis, stylegan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retroexit.testing import check_adapter

FOLDER = Path(__file__).resolve().parents[2] / "adapters"


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
    "retroexit_oasis": lambda _: oasis(crop=(64, 64)),
    "retroexit_stylegan": lambda _: fainter(stylegan(), "torgb.weight"),
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


@pytest.mark.parametrize(
    ("network", "inputs", "gigamacs"),
    [(MegaPortraitsG2d, (1, 1536, 64, 64), 213.05), (OASISGenerator, (1, 35, 256, 512), 318.6)],
)
def test_a_network_of_full_size_costs_what_its_paper_counts(network, inputs, gigamacs):
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network().eval()(torch.zeros(inputs))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gigamacs, abs=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frame_key(torch.zeros(2, 4), torch.zeros(2, 512)), r"angles .* \(N, 3\), got \(2, 4\)"),
        (lambda: frame_key(torch.zeros(2, 3), torch.zeros(1, 512)), r"\(2, 512\), got \(1, 512\)"),
        (lambda: MegaPortraitsG2d(24, 64, 4)(torch.zeros(1, 24, 8, 8)), r"\(24, 4, 4\)\), got \(1, 24, 8, 8\)"),
        (lambda: MegaPortraitsG2d(channels=12), "channels must be a multiple of 8, got 12"),
        (lambda: oasis()(torch.zeros(1, 6, 32, 64)), "label map has 6 channels, the generator 5 labels"),
        (lambda: oasis()(torch.zeros(1, 5, 32, 64), torch.zeros(1, 3)), r"\(1, 4\) or \(1, 4, 32, 64\), got \(1, 3\)"),
        (lambda: oasis(use_noise3d=False)(torch.zeros(1, 5, 32, 64), torch.zeros(1, 4)), "use_noise3d=False"),
        (lambda: oasis(crop=(40, 64)), r"multiples of 32, got \(40, 64\)"),
        (lambda: one_hot(torch.full((2, 4, 8), 4), 4), r"labels must lie in 0\.\.3, got 4 to 4"),
        (lambda: one_hot(torch.zeros(2, 3, 4, 8), 6), r"\(N, 1, H, W\), got \(2, 3, 4, 8\)"),
        (lambda: OASISDiscriminator(6)(torch.zeros(1, 3, 96, 64)), r"multiple of 64 .* got \(1, 3, 96, 64\)"),
        (lambda: OASISDiscriminator.for_dataset("kitti"), "data set 'kitti'; there are ade20k, city"),
        (lambda: stylegan(c_dim=5)(torch.zeros(2, 9)), r"z must have the shape \(N, 8\), got \(2, 9\)"),
        (lambda: stylegan(c_dim=5)(torch.zeros(2, 8)), r"c must have the shape \(2, 5\), got None"),
        (lambda: stylegan(c_dim=5)(torch.zeros(2, 8), torch.zeros(1, 5)), r"\(2, 5\), got \(1, 5\)"),
        (lambda: stylegan()(torch.zeros(2, 8), noise_mode="const "), r"'none', got 'const '"),
        (lambda: stylegan().synthesis(torch.zeros(1, 7, 6)), r"shape \(N, 8, 6\), got \(1, 7, 6\)"),
        (lambda: stylegan(resolution=48), "power of two from 4 up, got 48"),
        (lambda: stylegan(channels=[4, 4]), r"one for each of the blocks \[4, 8, 16, 32\], got \[4, 4\]"),
    ],
)
def test_wrong_shapes_and_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
