"""The conformance test of adapters: passes good ones and lists the problems of bad ones."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import Block

import retroexit
from retroexit.errors import AdapterError, BranchError, RetroExitError
from retroexit.plugins import Description, hookimpl
from retroexit.testing import AdapterReport, check_adapter


class Decoder(nn.Module):
    """Codes of a codebook to a picture and a depth map; with ``noisy``, noise is drawn in front of it all."""

    def __init__(self, codes=6, noisy=False):
        super().__init__()
        self.book, self.noisy = nn.Embedding(codes, 8), noisy
        self.blocks = nn.ModuleList([Block(8, 16), Block(16, 16), Block(16, 16)])
        self.rgb, self.depth = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 1, 1)

    def forward(self, codes):
        x = self.book(codes).permute(0, 3, 1, 2)
        if self.noisy:
            x = x + torch.randn(x.shape[0], 8, 1, 1)
        for block in self.blocks:
            x = block(x)
        return {"depth": self.depth(x), "rgb": torch.sigmoid(self.rgb(x))}


def codes(generator):
    return (torch.arange(64).view(1, 8, 8) % generator.book.num_embeddings,), {}


class Judge(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.Conv2d(4, 1, 3))


def describe(generator, **changed):
    book = generator.book
    description = Description(
        name="toy",
        stages=("blocks.0", "blocks.1", "blocks.2"),
        example_inputs=codes,
        image="rgb",
        image_range=(0.0, 1.0),
        predictor_inputs=lambda codes: book(codes).permute(0, 3, 1, 2),
        key_after=1,
        value_after="blocks.1",
        key=lambda codes: book(codes).mean((1, 2)),
        discriminator=lambda generator: Judge(),
        adversarial="hinge",
    )
    return dataclasses.replace(description, **changed)


class Adapter:
    """A good adapter; ``changed`` makes it a bad one."""

    def __init__(self, **changed):
        self.changed = changed

    @hookimpl
    def retroexit_describe(self, generator):
        return describe(generator, **self.changed) if isinstance(generator, Decoder) else None


class BuildingAdapter(Adapter):
    @hookimpl
    def retroexit_build_stage(self, stage, in_channels, out_channels):
        return Block(in_channels, out_channels) if isinstance(stage, Block) else None


@pytest.fixture
def decoder():
    return Decoder().eval()


def problems_of(generator, **options):
    """Fail the conformance test; gives its problems, a line for each."""
    with pytest.raises(AdapterError) as failed:
        check_adapter(generator, thin_at=[1], **options)
    assert isinstance(failed.value, RetroExitError) and isinstance(failed.value, AssertionError)
    assert failed.value.problems
    assert all(f"\n  - {problem}" in str(failed.value) for problem in failed.value.problems)
    return "\n".join(failed.value.problems)


def test_a_good_adapter_passes_and_the_report_says_what_was_checked(decoder, untouched):
    with untouched(decoder):
        report = check_adapter(decoder, plugin=BuildingAdapter())
    assert isinstance(report, AdapterReport)
    assert report.name == "toy"
    assert report.stages == ("blocks.0", "blocks.1", "blocks.2")
    assert report.skipped == ()
    assert len(report.checked) == 17
    assert {"stages run once, in order", "build_stage makes stages that run"} < set(report.checked)
    first = "adapter for toy: 3 stages\n  ok       the generator is recognised, others are not\n"
    assert str(report).startswith(first)


def test_what_a_description_leaves_out_is_skipped(decoder):
    described = Description(name="little", image="rgb")
    report = check_adapter(decoder, description=described, example_inputs=codes(decoder)[0], thin_at=[1])
    assert len(report.stages) >= 2
    assert len(report.skipped) == 9
    assert "the image keeps its range: the description has no image_range" in report.skipped


def test_noise_drawn_inside_the_forward_is_no_problem():
    report = check_adapter(Decoder(noisy=True).eval(), plugin=Adapter(), thin_at=[1, 2])
    assert "samples of a batch do not change each other" in report.checked


def test_everything_that_is_wrong_is_listed_at_once(decoder):
    shared = Judge()
    wrong = {
        "image_range": (0, 255),
        "predictor_inputs": lambda codes: codes.float(),
        "key": lambda codes: codes.flatten(1).float() - codes.flatten(1).float().mean(0),
        "key_after": "blocks.7",
        "value_after": 3,
        "discriminator": lambda generator: shared,
        "build_stage": lambda stage, c_in, c_out: Block(c_in, c_out + 1),
    }
    problems = problems_of(decoder, plugin=Adapter(**wrong))
    for problem in (
        "got (0, 255). State the range of the trained generator",
        "predictor_inputs must return floating-point (N, C, H, W) with N = 1, got torch.float32",
        "key of a sample depends on the others in its batch",
        "key_after must be a module that runs once in a forward pass, got 'blocks.7', which does not exist",
        "value_after must be a stage from 1 to 2, got 3",
        "the discriminator shares weights with the generator or an earlier one",
        "'blocks.1' with 16 to 4 channels must return [(1, 4, 8, 8)], got [(1, 5, 8, 8)]",
        "build_stage must return None for a stage of an unknown class",
    ):
        assert problem in problems


class Idle(Judge):
    """Detaches its input, and has a layer that it never uses."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(1, 1)

    def forward(self, image):
        return self[0](image.detach())


class Constant:
    name, needs_inputs = "constant", False

    def of_branch(self, verdict, batch):
        return verdict.scores[0].mean() * 0

    def of_discriminator(self, judge, batch):
        return {"nothing": judge(batch.target).scores[0].mean() * 0}


def change_weights(generator):
    generator.book.weight.data.add_(1)
    return codes(generator)


ONCE = "stage must be a module that runs once in a forward pass, got 'blocks.9', w"
PAIR = "example_inputs must return (args, kwargs), tuple and dict, got tensor([0.])"
ROWS = "predictor_inputs must return shapes that differ in N only, got (2, 2, 8, 8) for two samples and (1"


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        ({"stages": ("blocks.1", "blocks.0", "blocks.2")}, ["stages run in the order ['blocks.0', 'blocks.1'"]),
        ({"stages": ("blocks.0", "blocks.9")}, [ONCE]),
        ({"image": "colour"}, ["the generator can be read with these stages: "]),
        ({"example_inputs": lambda g: torch.zeros(1)}, [PAIR]),
        ({"example_inputs": lambda g: ((torch.zeros(1, 8, 8),), {})}, ["example inputs run: RuntimeError"]),
        ({"example_inputs": None}, ["the description has no example_inputs; write them, or pass"]),
        ({"example_inputs": change_weights}, ["the adapter changed weights or buffers of the generator; work on a "]),
        (
            {"discriminator": lambda generator: Idle()},
            ["hinge gives the branch no gradient; do not detach", "reaches 2.weight, 2.bias, spare.weight, spare.bi"],
        ),
        ({"discriminator": lambda generator: nn.Linear(3, 1)}, ["discriminator and objective train a branch: "]),
        ({"build_stage": lambda stage, *_: stage}, ["build_stage for 'blocks.0' must return a new module, got Block("]),
        ({"build_stage": lambda stage, c_in, c_out: 1 / 0}, ["build_stage for 'blocks.0': ZeroDivisionError"]),
        ({"image_range": (0.9, 1.0)}, ["got (0.9, 1.0). State the range of the trained"]),
        ({"predictor_inputs": lambda c: c[:, None].float().expand(-1, len(c), -1, -1)}, [ROWS]),
        ({"adversarial": "best"}, ["of_discriminator, got 'best'"]),
        ({"adversarial": Constant()}, ["constant gives the branch no gradient", "constant does not train the discr"]),
    ],
)
def test_what_is_wrong_with_a_description_is_named(decoder, changed, problems):
    listed = problems_of(decoder, plugin=Adapter(**changed))
    assert [text for text in problems if text not in listed] == []


class Mixing(Decoder):
    def forward(self, codes):
        x = self.book(codes).permute(0, 3, 1, 2)
        x = self.blocks[1](self.blocks[0](x + self.noisy * torch.randn(x.shape[0], 8, 1, 1)))
        x = self.blocks[2](x - x.mean(0, keepdim=True) + x.mean())
        return {"depth": self.depth(x), "rgb": torch.sigmoid(self.rgb(x))}


class Narrow(Decoder):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(8, 2), Block(2, 2), Block(2, 2)])
        self.rgb, self.depth = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 1, 1)


@pytest.mark.parametrize("noisy", [False, True])
def test_exits_that_depend_on_the_batch_are_named(noisy):
    problems = problems_of(Mixing(noisy=noisy).eval(), plugin=Adapter())
    assert "exit 1 of two samples differs from each alone by up to" in problems


def test_exits_that_do_not_shrink_are_named():
    problems = problems_of(Narrow().eval(), plugin=Adapter())
    assert "no branch shrinks at scale 0.25, min_channels=4" in problems


def test_every_stage_at_which_wrapping_fails_is_named(decoder, monkeypatch):
    def wrap_partly(generator, attach_at, *args, **options):
        if 2 in attach_at:
            raise BranchError("stage 2 has no room for a branch")
        return retroexit.wrap(generator, attach_at, *args, **options)

    monkeypatch.setattr("retroexit.testing.claims.wrap", wrap_partly)
    problems = problems_of(decoder, plugin=Adapter())
    assert problems == "no branch of scale 1 after stage 2 (blocks.1): stage 2 has no room for a branch"


class Greedy:
    @hookimpl
    def retroexit_describe(self, generator):
        return Description(name="everything", image="rgb")


class Failing(Adapter):
    @hookimpl
    def retroexit_describe(self, generator):
        return describe(generator)  # a stranger has no codebook


def hook(name):
    return SimpleNamespace(__name__="Blind", hook=hookimpl(lambda generator: None, specname=name))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"plugin": Greedy(), "example_inputs": (torch.ones(1, 8, 8).long(),)}, "recognises a Stranger too"),
        ({"plugin": Failing()}, "plug-in 'Failing': retroexit_describe raised AttributeError: "),
        ({"plugin": hook("retroexit_describe")}, "Blind does not recognise a Decoder; return a Description"),
        ({"plugin": hook("retroexit_descibe")}, "the plug-in does not fit: unknown hook 'retroexit_descibe' in plugin"),
        ({}, "no installed plug-in recognises a Decoder; install the adapter's distribution"),
        ({"plugin": Adapter(), "strangers": [Decoder()]}, "the adapter recognises a Decoder too"),
    ],
)
def test_an_adapter_that_recognises_too_much_or_too_little_is_named(decoder, options, problem):
    assert problem in problems_of(decoder, **options)
