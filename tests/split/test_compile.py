"""A wrapped generator under `torch.compile` and `torch.export`, with batches and sizes of other inputs."""

import pytest
import torch
from torch import nn

import retroexit
from retroexit.core.nested import rebuild, tensors
from retroexit.errors import GeneratorError, NotRecordedError
from retroexit.routing.predictor import Predictor


class AtExit(nn.Module):
    def __init__(self, model, leave):
        super().__init__()
        self.model, self.leave = model, leave

    def forward(self, x):
        return self.model(x, exit=self.leave)


@pytest.fixture
def model(toys):
    toy = toys.TOYS["group_norm"]()
    torch.manual_seed(0)
    model = retroexit.wrap(toy.generator, [1], 1 / 4, min_channels=8, example_inputs=toy.args)
    model.predictor = Predictor(32, 1).eval()
    return model


SHAPES = [(2, 4, 8, 8), (3, 4, 12, 10)]


@torch.no_grad()
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about graph breaks
def test_a_compiled_model_renders_what_the_model_renders(model):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for shape in SHAPES:
        x = torch.rand(shape)
        limit = float(model.predict(x)[:, 0].median())
        for options in ({}, {"exit": 1}, {"threshold": limit}):
            assert torch.equal(compiled(x, **options), model(x, **options)), (shape, options)
    model.generator.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(GeneratorError, match=r"blocks\.1.*hooks"):
        compiled(x, exit=1)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("leave", [1, 2])
def test_an_exit_exports_for_every_batch_and_size(model, leave, strict):
    free = torch.export.Dim.DYNAMIC
    options = {"dynamic_shapes": {"x": {0: free, 2: free, 3: free}}, "strict": strict}
    exported = torch.export.export(AtExit(model, leave), (torch.rand(4, 4, 8, 8),), **options).module()
    for shape in SHAPES:
        x = torch.rand(shape)
        assert torch.equal(exported(x), model(x, exit=leave))


class Vocoder(nn.Module):
    """Upsamples a spectrogram by transposed convolutions, as HiFi-GAN does."""

    def __init__(self):
        super().__init__()
        self.pre, self.post = nn.Conv1d(4, 32, 7, padding=3), nn.Conv1d(16, 1, 7, padding=3)
        self.ups = nn.ModuleList(nn.ConvTranspose1d(i, o, 4, 2, padding=1) for i, o in ((32, 24), (24, 16), (16, 16)))
        self.mixes = nn.ModuleList(nn.Conv1d(o, o, 3, dilation=3, padding=3) for o in (24, 16, 16))

    def forward(self, x):
        x = self.pre(x)
        for up, mix in zip(self.ups, self.mixes, strict=True):
            x = up(nn.functional.leaky_relu(x, 0.1))
            x = x + mix(nn.functional.leaky_relu(x, 0.1))
        return torch.tanh(self.post(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [pytest.param("compile", marks=pytest.mark.long), "export"])
@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("list_input_with_unet_skips", 2),
        ("modulated_convolution_with_skip_image", 1),  # its input has no size
        ("dict_output", 2),
        ("vocoder", 2),
    ],
)
def test_other_kinds_of_generators_compile_and_export(toys, name, scale, way):
    generator, example = Vocoder().eval(), [torch.rand(2, 4, 16)]
    if name != "vocoder":
        toy = toys.TOYS[name]()
        generator, example = toy.generator, list(toy.args)
    model = retroexit.wrap(generator, [1, 2], 1 / 4, min_channels=8, example_inputs=tuple(example))

    def inputs(count, scale):
        return rebuild(example, lambda x: torch.rand(count, x.shape[1], *(scale * side for side in x.shape[2:])))

    called = AtExit(model, 2)
    if way == "compile":
        torch.compiler.reset()
        called = torch.compile(called, backend="eager", dynamic=True)
    else:
        free = torch.export.Dim.DYNAMIC
        axes = rebuild(example, lambda x: {i: free for i in range(x.dim()) if i == 0 or (i > 1 and scale > 1)})
        called = torch.export.export(called, tuple(inputs(4, 1)), dynamic_shapes=tuple(axes)).module()
    for shape in ((2, 1), (3, 1), (5, scale)):
        args = inputs(*shape)
        assert all(map(torch.equal, tensors(called(*args)), tensors(model(*args, exit=2))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [pytest.param("compile", marks=pytest.mark.long), "export"])
def test_a_model_that_is_not_recorded_says_so(toys, way):
    torch.compiler.reset()  # at its limit of recompilations, torch would call the model uncompiled
    toy = toys.TOYS["group_norm"]()
    wrapper = AtExit(retroexit.wrap(toy.generator, [1], 1 / 4), 1)
    with pytest.raises(NotRecordedError, match="must be recorded before .*Call the model once, or pass example_inputs"):
        if way == "compile":
            torch.compile(wrapper, backend="eager")(*toy.args)
        else:
            torch.export.export(wrapper, toy.args)
