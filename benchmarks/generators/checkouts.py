"""Generators in checkouts of public repositories, imported from there; nothing of them is ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from generators.entry import Entry, Made


def oasis(folder: Path) -> Made:
    module = load_module(folder, "models.generator")
    options = SimpleNamespace(
        channels_G=8,
        semantic_nc=6,
        z_dim=8,
        no_3dnoise=False,
        gpu_ids="-1",
        no_spectral_norm=False,
        param_free_norm="syncbatch",
        spade_ks=3,
        crop_size=64,
        num_res_blocks=6,
        aspect_ratio=2.0,
    )
    return Made(module.OASIS_Generator(options), (torch.rand(1, 6, 32, 64),))


def spade(folder: Path) -> Made:
    with absent_modules_stubbed(folder):
        module = load_module(folder, "models.networks.generator")
    options = SimpleNamespace(
        ngf=16,
        semantic_nc=6,
        use_vae=False,
        num_upsampling_layers="normal",
        crop_size=64,
        aspect_ratio=1.0,
        norm_G="spectralspadebatch3x3",
    )
    generator = module.SPADEGenerator(options)
    # As the code's own training begins, with spectral norms that have settled: without, the tanh saturates,
    # and a difference in the last digit turns an image black.
    generator.init_weights("xavier", 0.02)
    with torch.no_grad():
        for _ in range(5):
            generator.train()(torch.rand(2, 6, 64, 64))
    return Made(generator.eval(), (torch.rand(1, 6, 64, 64),))


def stylegan2_ada(folder: Path) -> Made:
    module = load_module(folder, "training.networks")
    options = {"channel_base": 1024, "channel_max": 64}
    model = module.Generator(16, 0, 16, 64, 3, {"num_layers": 2}, options)
    return Made(model, (torch.randn(1, 16), None), {"noise_mode": "const"})


def stylegan2_rosinality(folder: Path) -> Made:
    # Its operators are compiled on import; on a CPU it then uses plain torch.
    with mock.patch("torch.utils.cpp_extension.load", return_value=None):
        module = load_module(folder, "model")
    with mock.patch.dict(module.Generator.__init__.__globals__):
        model = module.Generator(32, 16, 2, channel_multiplier=1)
    return Made(model, ([torch.randn(1, 16)],), {"randomize_noise": False})


def _of_networks(name: str, *args: Any, size: int = 64, **options: Any) -> Callable[[Path], Made]:
    """Make a class of ``models/networks.py`` that maps an image to an image; the first argument is its channels."""

    def make(folder: Path) -> Made:
        model = getattr(load_module(folder, "models.networks"), name)(*args, **options)
        return Made(model, (torch.rand(1, args[0], size, size),))

    return make


def biggan(folder: Path) -> Made:
    module = load_module(folder, "BigGAN")
    model = module.Generator(
        G_ch=16, dim_z=40, resolution=64, G_attn="32", n_classes=10, hier=True, shared_dim=16, no_optim=True
    )
    return Made(model, (torch.randn(1, model.dim_z), torch.randn(1, 16)))


def rrdbnet(folder: Path) -> Made:
    module = load_module(folder, "RRDBNet_arch")
    return Made(module.RRDBNet(3, 3, 32, 4, gc=16), (torch.rand(1, 3, 16, 16),))


def megaportraits(folder: Path) -> Made:
    with absent_modules_stubbed(folder):
        module = load_module(folder, "model")
    return Made(module.G2d(96), (torch.randn(1, 96, 4, 4),))


def load_module(folder: Path, name: str) -> ModuleType:
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


@contextmanager
def absent_modules_stubbed(folder: Path) -> Iterator[None]:
    """Let the files of a checkout import what is not installed and not needed for their generator."""
    finder = _Stubs(folder)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Stubs:
    """The last finder: whatever no other finder knows is an empty module that has every name.

    Only for files of one checkout: installed packages try optional ones and do without where they are absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if self._is_needed() else None

    def _is_needed(self) -> bool:
        """Whether the file that imports is one of the checkout's."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if "importlib" not in name and name != __file__:
                return name.startswith(self.folder)
            frame = frame.f_back
        return False

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return mock.MagicMock(name=spec.name, __path__=["stub"], __spec__=spec)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as it is."""


def _up(depth: int) -> str:
    """Path of the transposed convolution at a depth of pix2pix's nested U-Net, 0 the innermost."""
    inside = ".model.3" * (4 - depth)
    return f"model.model.1{inside}.model.{3 if depth == 0 else 5}"


_NORM = torch.nn.InstanceNorm2d

ENTRIES = (
    Entry("oasis", oasis, "body.{0-5}", checkout="OASIS", draws=True),
    Entry("spade", spade, "head_0 G_middle_0 G_middle_1 up_{0-3}", checkout="SPADE"),
    Entry(
        "stylegan2-ada",
        stylegan2_ada,
        "synthesis.b4 synthesis.b8 synthesis.b16 synthesis.b32 synthesis.b64",
        checkout="stylegan2-ada-pytorch",
    ),
    Entry("stylegan2-rosinality", stylegan2_rosinality, "conv1 convs.{0-5}", checkout="stylegan2-pytorch", image=0),
    Entry(
        "pix2pixhd-global",
        _of_networks("GlobalGenerator", 5, 3, 16, n_blocks=4, norm_layer=_NORM),
        "model.{13-16} model.17 model.20 model.23",
        checkout="pix2pixHD",
    ),
    # The global generator at half the size, then the enhancer's own blocks.
    Entry(
        "pix2pixhd-local",
        _of_networks("LocalEnhancer", 5, 3, 16, n_blocks_global=4, norm_layer=_NORM),
        "model.{13-16} model.17 model.20 ?model.23 model1_2.{0-2} model1_2.3",
        checkout="pix2pixHD",
    ),
    Entry(
        "cyclegan-resnet",
        _of_networks("ResnetGenerator", 3, 3, 32, size=32, norm_layer=_NORM, n_blocks=6),
        "model.{12-19} model.20|model.21 ?model.21 model.24|model.25 ?model.25",
        checkout="pytorch-CycleGAN-and-pix2pix",
    ),
    Entry(
        "pix2pix-unet",
        _of_networks("UnetGenerator", 3, 3, 6, 16),
        " ".join(_up(d) for d in range(5)),
        checkout="pytorch-CycleGAN-and-pix2pix",
    ),
    Entry("biggan", biggan, "blocks.{0-3}", checkout="BigGAN-PyTorch"),
    # A residual trunk at one resolution, then two up-sampling convolutions and one more.
    Entry(
        "esrgan-rrdbnet", rrdbnet, "?conv_first RRDB_trunk.{0-3} ?trunk_conv upconv1 upconv2 ?HRconv", checkout="ESRGAN"
    ),
    Entry("megaportraits-g2d", megaportraits, "res_blocks.{0-7} upsample{1-3}", checkout="MegaPortrait-hack"),
)
