"""Which terms a fit trains on, the paper's losses by name, and fits on them."""

import json

import decoders
import pytest
import retroexit_oasis as oasis
import torch
from decoders import Distance, Judge, latents, wrap
from torch import nn

import retroexit
from retroexit.errors import CheckpointError, OptionError, PluginError, RetroExitWarning, WeightsError
from retroexit.metrics import LPIPS, MSSSIM
from retroexit.plugins import Description
from retroexit.plugins.training_types import TrainingBatch
from retroexit.training.losses import L1
from retroexit.training.losses.plan import LossOptions, _value, find_weights, plan_losses
from retroexit.training.losses.terms import OBJECTIVES

LABELS = 6
ADVERSARIAL = {"adversarial": 1, "l1": 1}


class Near(Distance):
    """Stands in for LPIPS where there are no weights."""

    name = "lpips-near"


class Gaze(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

    def forward(self, image):
        return super().forward(image.mean((2, 3)))


def generator():
    return oasis.OASISGenerator(LABELS, 4, 2, (64, 64), 4).eval()


def plan(losses, metric=None, description=None, **options):
    return plan_losses(generator(), LossOptions(losses, **options), metric or Near(), description=description)


def test_the_preset_oasis_is_equation_3():
    with pytest.warns(RetroExitWarning, match="the discriminator OASISDiscriminator is untrained. Pass the"):
        losses = plan("oasis", instead={"vgg": "features-random"})
    assert dict(losses.weights) == {"adversarial": 1, "features-random": 1, "lpips": 1}
    assert losses.equalise == 50
    assert losses.objective is not None and losses.objective.name == "oasis"
    assert isinstance(losses.discriminator, oasis.OASISDiscriminator)
    assert isinstance(losses.terms["lpips"], Near)
    one, other = losses.for_branch(), losses.for_branch()
    assert one.needs_inputs
    parameters = {id(p) for p in one.adversary.parameters()}
    assert not parameters & {id(p) for p in [*other.adversary.parameters(), *losses.discriminator.parameters()]}
    pairs = zip(one.adversary.parameters(), other.adversary.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_preset_megaportraits_is_equation_4():
    face = Description(name="face", image_range=(0.0, 1.0))
    options = {"instead": {"vgg": "features-random"}, "discriminator": Judge().eval(), "gaze": Gaze()}
    losses = plan("megaportraits", description=face, **options)
    names = ["adversarial", "features-random", "ms-ssim", "l1", "feature-matching", "gaze"]
    assert list(losses.weights) == names
    assert losses.objective is OBJECTIVES["hinge"] and losses.image_range == (0, 1)
    loss = losses.for_branch()
    assert not loss.needs_inputs
    loss.adversary.module.eval()  # without dropout, and the spectral norm stays
    image = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    batch = TrainingBatch(image, torch.rand(2, 3, 32, 32) * 2 - 1)
    total, parts = loss(batch)
    total.backward()
    assert list(parts) == names
    assert image.grad is not None and image.grad.isfinite().all()
    lengths = []
    for name in names:
        value = loss.equaliser.factor(name) * _value(name, loss.terms[name][1], batch)
        lengths.append(float(torch.autograd.grad(value, image)[0].norm()))
        loss.adversary.forget()
    assert lengths == pytest.approx([lengths[0]] * 6, rel=1e-3)


def test_a_fit_of_an_oasis_generator_on_equation_3(tmp_path):
    numbers = torch.randint(LABELS, (4, 2, 2)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    samples = oasis.one_hot(numbers, LABELS)
    model = retroexit.wrap(generator(), [4], 1 / 2, min_channels=1, init="scratch")
    before = {name: p.detach().clone() for name, p in model.branches.named_parameters()}
    options = {"losses": "oasis", "instead": {"vgg": "l1"}, "equalise": 1, "batch": 2, "metric": Near()}
    decoders.fit(model, tmp_path, samples, discriminator=Judge(LABELS + 1), **options)
    assert model.about["fit"]["losses"] == {"adversarial": 1, "l1": 1, "lpips": 1}
    assert [name for name, p in model.branches.named_parameters() if torch.equal(before[name], p)] == []
    record = json.loads((tmp_path / "fit.json").read_text())["loss"]
    assert record["objective"] == "oasis" and record["equalise"] == 1
    with pytest.raises(CheckpointError, match=r"other settings: loss\.discriminator was .*, is "):
        decoders.fit(model, tmp_path, samples, discriminator=Judge(LABELS + 2), **options)


def test_a_fit_in_bfloat16_with_adversaries_works(tmp_path):
    losses = {"l1": 1.0, "adversarial": 0.1, "feature-matching": 0.5}
    options = {"discriminator": Judge(), "adversarial": "hinge", "bfloat16": True}
    assert decoders.fit(wrap(), tmp_path, losses=losses, **options).about["fit"]["losses"] == losses


def test_the_users_own_objective_gets_the_inputs(tmp_path):
    seen = []

    class Gap:
        name, needs_inputs = "gap", True

        def of_branch(self, output, batch):
            seen.append(tuple(batch.args[0].shape))
            return -output.scores[0].mean()

        def of_discriminator(self, judge, batch):
            return {"gap": (judge(batch.image).scores[0] - judge(batch.target).scores[0]).mean()}

    options = {"losses": {"adversarial": 1.0}, "discriminator": Judge(), "adversarial": Gap()}
    decoders.fit(wrap(), tmp_path, latents(10), **options)
    assert set(seen) == {(3, 4, 4, 4)}


def test_a_trained_discriminator_comes_from_a_file(tmp_path):
    trained = oasis.OASISDiscriminator(LABELS)
    torch.save(trained.state_dict(), tmp_path / "D.pth")
    loss = plan({"adversarial": 1}, discriminator=tmp_path / "D.pth").for_branch()
    assert torch.equal(loss.adversary.module.layer_up_last.weight, trained.layer_up_last.weight)


def test_terms_come_from_their_names():
    metric = MSSSIM()
    losses = plan({"l1": 2, "quality": 1, "ms-ssim": 0.5, "features-random": 1, "vgg": 0}, metric)
    assert dict(losses.weights) == {"l1": 2, "quality": 1, "ms-ssim": 0.5, "features-random": 1}
    assert losses.terms["quality"] is losses.terms["ms-ssim"] is metric
    assert isinstance(losses.terms["l1"], L1)
    assert losses.equalise == 0 and losses.discriminator is None
    loss = losses.for_branch()
    assert loss.adversary is None and loss.equaliser is None
    assert [plan({"l1": 1}, equalise=steps).equalise for steps in (True, 7)] == [50, 7]
    assert plan("oasis", instead={"vgg": "l1"}, equalise=False, discriminator=Judge()).equalise == 0
    assert list(find_weights("oasis", {"vgg": "features-alex"})) == ["adversarial", "features-alex", "lpips"]


def test_lpips_is_the_metric_of_the_fit_or_alexnet(shared):
    file = shared / "data" / "weights" / "lpips_alex_v0.1.pth"
    metric = Near()
    assert plan({"lpips": 1}, metric).terms["lpips"] is metric
    other = plan({"lpips": 1}, MSSSIM(), loss_weights={"lpips": file}).terms["lpips"]
    assert isinstance(other, LPIPS) and other.name == "lpips-alex"


def test_feature_matching_alone_does_not_train_the_discriminator():
    loss = plan({"feature-matching": 1}, discriminator=Judge(), adversarial="hinge").for_branch()
    assert loss.adversary is None
    image = torch.rand(1, 3, 8, 8).requires_grad_()
    loss(TrainingBatch(image, torch.rand(1, 3, 8, 8)))[0].backward()
    assert image.grad is not None and image.grad.any()


def test_the_record_of_a_fit_tells_other_losses_apart():
    options = {"discriminator": Judge(), "gaze": Gaze(), "adversarial": "hinge"}
    losses = plan({"adversarial": 1, "gaze": 2}, **options)
    record = losses.describe()
    assert record["weights"] == {"adversarial": 1, "gaze": 2} and record["objective"] == "hinge"
    assert record == plan({"adversarial": 1, "gaze": 2}, **options).describe()
    with torch.no_grad():
        options["discriminator"].last.bias.add_(1)
    assert losses.describe()["discriminator"] != record["discriminator"]
    assert set(plan({"l1": 1}).describe()) == {"weights", "equalise"}


@pytest.mark.parametrize(
    ("losses", "options", "error", "message"),
    [
        ("oasys", {}, OptionError, "one of 'oasis', 'megaportraits', got 'oasys'"),
        ({"l1": -1}, {}, OptionError, "losses must have weights >= 0 by name, one of them > 0, got"),
        ({"l1": 0}, {}, OptionError, "losses must have weights >= 0 by name"),
        ({}, {}, OptionError, "one of them > 0, got {}"),
        (["l1"], {}, OptionError, r"one of them > 0, got \['l1'\]"),
        ({"l1": 1}, {"instead": {"vgg": "l1"}}, OptionError, "losses l1 by another one, got 'l1' instead of"),
        ({"l1": 1}, {"equalise": -1}, OptionError, "equalise must be >= 0, got -1"),
        ({"l1": 1}, {"loss_weights": {"vgg": "x"}}, OptionError, "must name one of l1, got 'vgg'"),
        ({"l2": 1}, {}, PluginError, "no loss 'l2'; closest: 'l1'"),
        (ADVERSARIAL, {"discriminator": None}, OptionError, "'adversarial' needs a discriminator, got none"),
        (ADVERSARIAL, {"discriminator": Judge(), "adversarial": "best"}, OptionError, "got 'best'"),
        (ADVERSARIAL, {"discriminator": 3}, OptionError, "must be a module, a file, 'auto' or None, got 3"),
        (ADVERSARIAL, {"discriminator": "no.pth"}, WeightsError, "cannot read no.pth: .*Pass a file with a state"),
        (
            ADVERSARIAL,
            {"discriminator": "D", "description": Description(name="unknown")},
            OptionError,
            "no adapter makes a discriminator for OASISGenerator to load 'D'",
        ),
        ({"feature-matching": 1}, {"discriminator": None}, OptionError, "'feature-matching' needs a discrim"),
        ({"gaze": 1, "l1": 2}, {}, OptionError, "'gaze' needs a gaze network, got none. Pass gaze=..., or .*2.0"),
    ],
)
def test_losses_that_lack_something_are_refused(losses, options, error, message):
    with pytest.raises(error, match=message):
        plan(losses, **options)


def test_a_missing_vgg_is_an_error_and_never_replaced(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(WeightsError) as caught:
        plan("oasis", discriminator=Judge())
    for part in (
        f"the loss 'vgg' needs vgg19-dcbb9e9d.pth, which is not in {tmp_path / 'checkpoints'}",
        "from https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
        "whose sha256 starts with dcbb9e9d",
        "Other networks: 'features-alex', 'features-squeeze', 'features-random'",
    ):
        assert part in str(caught.value)
