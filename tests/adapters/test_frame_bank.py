"""The frame bank of MegaPortraits: filled by a fit, searched by pose and expression, saved."""

import pytest
import retroexit_megaportraits as megaportraits
import torch
from torch import nn
from toys import Distance

import retroexit
from retroexit.errors import BankError

describe = megaportraits.retroexit_describe

FRAMES = 10


def drivers(count, seed):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *shape, generator=source) for shape in ((24, 4, 4), (3,), (512,))]


def distances(angles, expression):
    _, frame_angles, frame_expressions = drivers(FRAMES, 1)
    return (frame_angles - angles).square().sum(1) + (frame_expressions - expression).square().sum(1)


@pytest.fixture(scope="module")
def driven():
    torch.manual_seed(0)
    return megaportraits.DrivenG2d(megaportraits.MegaPortraitsG2d(24, 16, 4).eval())


@pytest.fixture(scope="module")
def fitted(driven, tmp_path_factory):
    folder, frames = tmp_path_factory.mktemp("avatar"), list(zip(*drivers(FRAMES, 1), strict=True))
    model = retroexit.wrap(driven, [2, 6], 1 / 4, min_channels=2, guidance=True, adapter=describe(driven))
    settings = {"steps": 2, "batch": 2, "crop": 16, "predictor_steps": 20, "progress": False}
    retroexit.fit(model, frames, folder, metric=Distance(), **settings)
    return model, folder


def test_the_bank_has_every_frame_under_its_pose_and_expression(fitted, driven):
    bank, (feature, angles, expression) = fitted[0].bank, drivers(FRAMES, 1)
    keys = megaportraits.frame_key(angles, expression)
    ids = bank.search(keys).ids
    assert ids.shape == (FRAMES, 1, 1) and bank.source[ids.flatten()].tolist() == list(range(FRAMES))
    with torch.no_grad():
        frames = driven(feature, angles, expression)
    torch.testing.assert_close(bank.glue(ids), frames, rtol=0, atol=1e-3)
    # In training, a frame is searched among the others.
    others = [distances(angles[i], expression[i]).topk(2, largest=False).indices[1] for i in range(FRAMES)]
    assert bank.source[bank.search(keys, torch.arange(FRAMES)).ids.flatten()].tolist() == others


@pytest.mark.parametrize("exit", [1, 2])
def test_an_early_exit_gets_the_frame_nearest_in_pose_and_expression(fitted, driven, handed, exit):
    feature, angles, expression = drivers(6, 7)
    expression[3:] = drivers(FRAMES, 1)[2][:3] + 0.3 * expression[3:]  # three that look like certain frames
    guides = handed(fitted[0].branches[exit - 1])
    fitted[0](feature, angles, expression, exit=exit)
    nearest = [int(distances(a, e).argmin()) for a, e in zip(angles, expression, strict=True)]
    assert len(set(nearest)) > 2
    with torch.no_grad():
        frames = driven(*drivers(FRAMES, 1))
    torch.testing.assert_close(guides[0], frames[nearest], rtol=0, atol=1e-3)


def test_the_frame_is_resized_by_a_convolution_for_every_stage_of_a_branch(fitted):
    for exit, (branch, stages) in enumerate(zip(fitted[0].branches, (7, 3), strict=True), 1):
        sizes = []
        entries = [branch.entry, *branch.injections.values()]
        assert len(entries) == stages
        note = lambda _module, _args, output, sizes=sizes: sizes.append(tuple(output.shape[1:]))  # noqa: E731
        hooks = [entry.resize.register_forward_hook(note) for entry in entries]
        fitted[0](*drivers(1, 3), exit=exit)
        for hook in hooks:
            hook.remove()
        # Three blocks double the map of 4x4; the frame has 32x32.
        assert [size[1:] for size in sizes] == [(4, 4)] * (stages - 2) + [(8, 8), (16, 16)]
        assert all(size[0] <= 3 for size in sizes)


def test_a_routed_batch_of_mixed_exits_gives_every_sample_its_own_frame(fitted):
    model, _ = fitted
    batch = drivers(12, 9)
    predicted = model.predict(*batch)
    threshold = float(predicted.min(1).values.median())
    images, exits = model.routed(*batch, threshold=threshold)
    assert len(exits.unique()) >= 2 and 3 in exits and int(exits.min()) < 3
    for i, leave in enumerate(exits.tolist()):
        alone = model(*(part[i : i + 1] for part in batch), exit=leave)
        torch.testing.assert_close(images[i], alone[0], rtol=1e-4, atol=1e-5)


def test_a_saved_model_retrieves_the_same_frames(fitted, driven, installed):
    model, folder = fitted
    installed(megaportraits=megaportraits)
    loaded = retroexit.load(folder, driven)
    batch = drivers(4, 11)
    for exit in (1, 2, 3):
        assert torch.equal(loaded(*batch, exit=exit), model(*batch, exit=exit))
    assert loaded.options.guidance == model.options.guidance
    assert loaded.router.overhead() == model.router.overhead()


def test_an_evaluation_measures_the_distance_to_the_retrieved_frame(fitted):
    model, _ = fitted
    feature, angles, expression = drivers(3, 17)
    samples = list(zip(feature, angles, expression, strict=True))
    evaluation = retroexit.evaluate(model, samples, metric=Distance(), repeats=0, progress=False)
    expected = [float(distances(a, e).min().sqrt()) for a, e in zip(angles, expression, strict=True)]
    assert evaluation.distance.tolist() == pytest.approx(expected, rel=1e-4)
    # One search of all frames, and the predictor.
    assert evaluation.overhead[0] - evaluation.overhead[-1] == FRAMES * 515


def test_a_driver_that_does_not_fit_is_refused_with_the_reason(fitted):
    model, _ = fitted
    feature, _, expression = drivers(2, 15)
    with pytest.raises(BankError, match=r"raised ValueError: angles must have the shape \(N, 3\), got \(2, 4\)"):
        model(feature, torch.zeros(2, 4), expression, exit=1)


# Decoders of other people.


class OtherG2d(nn.Module):
    """Somebody's decoder: other names, other normalisation, blocks in a Sequential."""

    def __init__(self):
        super().__init__()
        self.inlet = nn.Conv2d(24, 16, 1)
        self.res = nn.Sequential(*(OtherBlock(16, 16) for _ in range(4)))
        self.up1 = nn.Sequential(nn.Upsample(scale_factor=2), OtherBlock(16, 8))
        self.final = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1), nn.Sigmoid())

    def forward(self, volume):
        return self.final(self.up1(self.res(self.inlet(volume))))


class OtherBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.skip(x) + self.conv(x.relu())


BLOCKS = ["res.0", "res.1", "res.2", "res.3", "up1"]


def test_another_decoder_is_described_by_its_blocks_and_their_constructor():
    torch.manual_seed(0)
    driven = megaportraits.DrivenG2d(OtherG2d().eval())
    built = []

    def build(stage, c_in, c_out):
        built.append((type(stage).__name__, c_in, c_out))
        return OtherBlock(c_in, c_out) if isinstance(stage, OtherBlock) else None

    description = megaportraits.describe_g2d(driven, BLOCKS, build_block=build)
    model = retroexit.wrap(driven, [2, 4], 1 / 4, min_channels=2, adapter=description, guidance=True)
    model.record(*drivers(1, 1))
    assert [leave.attach_at for leave in model.exits] == ["decoder.res.1", "decoder.res.3", ""]
    assert built[:3] == [("OtherBlock", 16 + 3, 4), ("OtherBlock", 4 + 3, 4), ("Sequential", 4 + 2, 2)]
    assert model.branches[0].plan.built.keys() == {"decoder.res.2", "decoder.res.3"}
    with pytest.raises(ValueError, match=r"no module 'res\.4' in the OtherG2d; it has 'inlet', 'res'"):
        megaportraits.describe_g2d(OtherG2d(), ["res.0", "res.4"])
