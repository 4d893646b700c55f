"""The paper's losses by name: what they are made of, and branches of real generators that train on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.errors import OptionError, PluginError, RetroExitWarning, WeightsError
from retroexit.metrics import LPIPS, MSSSIM, QualityMetric
from retroexit.plugins import Description
from retroexit.plugins.training_types import TrainingBatch
from retroexit.training.losses import L1
from retroexit.training.losses.plan import LossOptions, LossPlan, _value, find_weights, plan_losses
from retroexit.training.losses.terms import OBJECTIVES

oasis = pytest.importorskip("retroexit_oasis", reason="install the project to get its adapters")

LABELS = 6
ADVERSARIAL = {"adversarial": 1, "l1": 1}
UNKNOWN = Description(name="unknown")


class Near(QualityMetric):
    """Stands in for LPIPS where there are no weights."""

    name = "lpips-near"

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))


class Judge(nn.Module):
    """A discriminator of pixels, with one score or one for each class."""

    def __init__(self, scores: int = 1) -> None:
        super().__init__()
        self.look = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.score = nn.Conv2d(4, scores, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.score(torch.relu(self.look(image)))


class Looks(nn.Module):
    """A gaze network."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(image.mean((2, 3)))


def generator() -> nn.Module:
    return oasis.OASISGenerator(LABELS, 4, 2, (64, 128), 8).eval()


def labels() -> Tensor:
    return oasis.one_hot(
        torch.randint(LABELS, (2, 8, 16)).repeat_interleave(8, 1).repeat_interleave(8, 2), LABELS
    )


def plan(
    losses: Any, metric: QualityMetric | None = None, description: Description | None = None, **options: Any
) -> LossPlan:
    return plan_losses(generator(), LossOptions(losses, **options), metric or Near(), description=description)


def test_the_preset_oasis_is_equation_3() -> None:
    with pytest.warns(RetroExitWarning, match="the discriminator OASISDiscriminator is untrained. Pass the"):
        made = plan("oasis", instead={"vgg": "features-random"})
    assert dict(made.weights) == {"adversarial": 1, "features-random": 1, "lpips": 1}
    assert made.equalise == 50
    assert made.objective is not None
    assert made.objective.name == "oasis"
    assert isinstance(made.discriminator, oasis.OASISDiscriminator)
    assert isinstance(made.terms["lpips"], Near)
    one, other = made.for_branch(), made.for_branch()
    assert one.needs_inputs
    assert one.adversary is not None
    assert other.adversary is not None
    own = {id(p) for p in one.adversary.parameters()}
    assert not own & {id(p) for p in [*other.adversary.parameters(), *made.discriminator.parameters()]}
    pairs = zip(one.adversary.parameters(), other.adversary.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_preset_megaportraits_is_equation_4() -> None:
    made = plan(
        "megaportraits",
        instead={"vgg": "features-random"},
        discriminator=Judge(),
        gaze=Looks(),
        description=Description(name="face", image_range=(0.0, 1.0)),
    )
    names = ["adversarial", "features-random", "ms-ssim", "l1", "feature-matching", "gaze"]
    assert list(made.weights) == names
    assert made.objective is OBJECTIVES["hinge"]
    assert made.image_range == (0, 1)
    loss = made.for_branch()
    assert not loss.needs_inputs
    image = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    batch = TrainingBatch(image, torch.rand(2, 3, 32, 32) * 2 - 1)
    assert loss.adversary is not None
    loss.adversary.module.eval()  # so that its spectral norm stays from here on
    total, parts = loss(batch)
    total.backward()
    assert list(parts) == names
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()
    assert loss.equaliser is not None
    lengths = []
    for name in names:
        (gradient,) = torch.autograd.grad(
            loss.equaliser.factor(name) * _value(name, loss.terms[name][1], batch), image
        )
        loss.adversary.forget()
        lengths.append(float(gradient.norm()))
    assert lengths == pytest.approx([lengths[0]] * 6, rel=1e-3)


def test_a_branch_of_oasis_trains_on_equation_3() -> None:
    model = retroexit.wrap(generator(), [1], 1 / 2, min_channels=4)
    made = plan("oasis", instead={"vgg": "l1"}, discriminator=Judge(LABELS + 1))
    loss, branch, label = made.for_branch(), model.branches[0], labels()
    assert loss.adversary is not None
    optimizer = torch.optim.Adam(branch.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in branch.named_parameters()}
    opponent = [p.detach().clone() for p in loss.adversary.parameters()]
    with torch.no_grad():
        values = model.split.advance(model.split.start((label,), {}), 0)
        crossing = model.split.crossing(values, 0)
        target = model.split.place_of(model.split.finish(values))
    for _ in range(3):
        batch = TrainingBatch(model.split.place_of(branch(*crossing)), target, (label,))
        total, parts = loss(batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        parts |= loss.adversary.step(batch)
    names = ["adversarial", "l1", "lpips"]
    assert list(parts) == [*names, *(f"discriminator-{part}" for part in ("real", "fake", "labelmix"))]
    assert all(math.isfinite(value) for value in parts.values())
    assert [name for name, p in branch.named_parameters() if torch.equal(before[name], p)] == []
    assert not any(torch.equal(a, b) for a, b in zip(opponent, loss.adversary.parameters(), strict=True))
    assert int(loss.state()["equaliser.count"]) == 3


def test_a_trained_discriminator_comes_from_a_file(tmp_path: Path) -> None:
    trained = oasis.OASISDiscriminator(LABELS)
    torch.save(trained.state_dict(), tmp_path / "D.pth")
    loss = plan({"adversarial": 1}, discriminator=tmp_path / "D.pth").for_branch()
    assert loss.adversary is not None
    assert torch.equal(loss.adversary.module.layer_up_last.weight, trained.layer_up_last.weight)


def test_terms_come_from_their_names() -> None:
    metric = MSSSIM()
    made = plan({"l1": 2, "quality": 1, "ms-ssim": 0.5, "features-random": 1, "vgg": 0}, metric)
    assert dict(made.weights) == {"l1": 2, "quality": 1, "ms-ssim": 0.5, "features-random": 1}
    assert made.terms["quality"] is made.terms["ms-ssim"] is metric
    assert isinstance(made.terms["l1"], L1)
    assert made.equalise == 0
    assert made.discriminator is None
    loss = made.for_branch()
    assert loss.adversary is None
    assert loss.equaliser is None
    assert plan({"l1": 1}, equalise=True).equalise == 50
    assert plan({"l1": 1}, equalise=7).equalise == 7
    assert plan("oasis", instead={"vgg": "l1"}, equalise=False, discriminator=Judge()).equalise == 0


def test_lpips_is_the_metric_of_the_fit_or_alexnet(shared: Path) -> None:
    file = shared / "data" / "weights" / "lpips_alex_v0.1.pth"
    metric = Near()
    assert plan({"lpips": 1}, metric).terms["lpips"] is metric
    other = plan({"lpips": 1}, MSSSIM(), loss_weights={"lpips": file}).terms["lpips"]
    assert isinstance(other, LPIPS)
    assert other.name == "lpips-alex"


def test_feature_matching_alone_leaves_the_discriminator_as_it_is() -> None:
    loss = plan({"feature-matching": 1}, discriminator=Judge(), adversarial="hinge").for_branch()
    assert loss.adversary is None
    image = (torch.rand(1, 3, 8, 8)).requires_grad_()
    loss(TrainingBatch(image, torch.rand(1, 3, 8, 8)))[0].backward()
    assert image.grad is not None
    assert image.grad.any()


def test_what_a_resumed_fit_must_share_is_told() -> None:
    judge, gaze = Judge(), Looks()
    made = plan({"adversarial": 1, "gaze": 2}, discriminator=judge, gaze=gaze, adversarial="hinge")
    told = made.describe()
    assert told["weights"] == {"adversarial": 1, "gaze": 2}
    assert told["objective"] == "hinge"
    assert (
        told
        == plan({"adversarial": 1, "gaze": 2}, discriminator=judge, gaze=gaze, adversarial="hinge").describe()
    )
    with torch.no_grad():
        judge.score.bias.add_(1)
    assert made.describe()["discriminator"] != told["discriminator"]
    assert set(plan({"l1": 1}).describe()) == {"weights", "equalise"}


@pytest.mark.parametrize(
    ("losses", "options", "error", "message"),
    [
        (
            "oasys",
            {},
            OptionError,
            "one of 'oasis', 'megaportraits', got 'oasys'",
        ),
        ({"l1": -1}, {}, OptionError, "losses must have weights >= 0 by name, one of them > 0, got"),
        ({"l1": 0}, {}, OptionError, "losses must have weights >= 0 by name"),
        ({}, {}, OptionError, "one of them > 0, got {}"),
        (["l1"], {}, OptionError, r"one of them > 0, got \['l1'\]"),
        (
            {"l1": 1},
            {"instead": {"vgg": "l1"}},
            OptionError,
            "the losses l1 by another one, got 'l1' instead of 'vgg'",
        ),
        ({"l1": 1}, {"equalise": -1}, OptionError, "equalise must be >= 0, got -1"),
        (
            {"l1": 1},
            {"loss_weights": {"vgg": "x"}},
            OptionError,
            "loss_weights must name one of l1, got 'vgg'",
        ),
        ({"l2": 1}, {}, PluginError, "no loss 'l2'; closest: 'l1'"),
        (
            ADVERSARIAL,
            {"discriminator": None},
            OptionError,
            "'adversarial' needs a discriminator, got none. Pass .*{'l",
        ),
        (
            ADVERSARIAL,
            {"discriminator": Judge(), "adversarial": "best"},
            OptionError,
            "of_discriminator, got 'best'",
        ),
        (
            ADVERSARIAL,
            {"discriminator": 3},
            OptionError,
            "discriminator must be a module, a file, 'auto' or None, got 3",
        ),
        (
            ADVERSARIAL,
            {"discriminator": "no.pth"},
            WeightsError,
            "discriminator='no.pth' must be a file with a state dict of OASISDiscriminator",
        ),
        (
            ADVERSARIAL,
            {"discriminator": "D", "description": UNKNOWN},
            OptionError,
            "no adapter makes a discriminator for OASISGenerator to load 'D'",
        ),
        (
            {"feature-matching": 1},
            {"discriminator": None},
            OptionError,
            "'feature-matching' needs a discriminator",
        ),
        (
            {"gaze": 1, "l1": 2},
            {},
            OptionError,
            "'gaze' needs a gaze network, got none. Pass gaze=..., or leave .*2.0",
        ),
    ],
)
def test_losses_that_cannot_be_had_are_refused(
    losses: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(losses, **options)


def test_vgg_is_never_replaced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(WeightsError, match="the loss 'vgg' needs vgg19-dcbb9e9d.pth"):
        plan("oasis", discriminator=Judge())


def test_names_may_be_replaced_in_place() -> None:
    assert list(find_weights("oasis", {"vgg": "features-alex"})) == ["adversarial", "features-alex", "lpips"]
