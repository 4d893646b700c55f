"""A wrapped generator under `torch.compile` and `torch.export`, with batches and sizes of other inputs."""

import pytest
import torch
from torch import nn

import retroexit
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["compile", "export"])
def test_a_model_that_is_not_recorded_says_so(toys, way):
    toy = toys.TOYS["group_norm"]()
    wrapper = AtExit(retroexit.wrap(toy.generator, [1], 1 / 4), 1)
    with pytest.raises(NotRecordedError, match="must be recorded before .*Call the model once, or pass example_inputs"):
        if way == "compile":
            torch.compile(wrapper, backend="eager")(*toy.args)
        else:
            torch.export.export(wrapper, toy.args)
