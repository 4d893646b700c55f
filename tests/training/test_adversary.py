"""Both sides of equation 1: numbers, who learns what, which discriminators are understood, going on later."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retroexit.errors import CheckpointError, OptionError, TrainingError
from retroexit.plugins.training_types import Objective, TrainingBatch
from retroexit.training.losses.terms import (
    OBJECTIVES,
    Adversarial,
    Adversary,
    FeatureMatching,
    captured_layers,
    find_objective,
)


class Patches(nn.Module):
    """Scores of patches, from a sequence with activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(4, 5, 3, 2, 1),
            nn.LeakyReLU(0.2, True),
        )
        self.score = nn.Conv2d(5, 1, 1)

    def forward(self, image: Tensor) -> Any:
        return self.score(self.model(image))


class Scales(nn.Module):
    """Features and score at two scales, as lists in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = Patches(), Patches()

    def forward(self, image: Tensor) -> list[list[Tensor]]:
        found = []
        for part in (self.fine, self.coarse):
            first = torch.relu(part.model[0](image))
            second = torch.relu(part.model[2](first))
            found.append([first, second, part.score(second)])
            image = nn.functional.avg_pool2d(image, 2)
        return found


@pytest.fixture
def batch() -> TrainingBatch:
    made = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    return TrainingBatch(made, torch.rand(2, 3, 16, 16) * 2 - 1)


FORMS: dict[str, tuple[Callable[[float], float], Callable[[float], float], Callable[[float], float]]] = {
    "hinge": (lambda s: -s, lambda s: max(0.0, 1 - s), lambda s: max(0.0, 1 + s)),
    "non-saturating": (
        lambda s: -math.log(1 / (1 + math.exp(-s))),
        lambda s: -math.log(1 / (1 + math.exp(-s))),
        lambda s: -math.log(1 - 1 / (1 + math.exp(-s))),
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", [Patches, Scales])
def test_both_sides_minimise_what_equation_1_says(
    name: str, kind: type[nn.Module], batch: TrainingBatch
) -> None:
    judge, (branch, real, fake) = kind(), FORMS[name]

    def mean(image: Tensor, form: Callable[[float], float]) -> float:
        output = judge(image)
        scores = [output] if isinstance(output, Tensor) else [scale[-1] for scale in output]
        means = [sum(map(form, s.flatten().tolist())) / s.numel() for s in scores]
        return sum(means) / len(means)

    adversary = Adversary(judge, find_objective(name))
    value = Adversarial(adversary).of_batch(batch)
    assert value.item() == pytest.approx(mean(batch.image, branch), rel=1e-5)
    assert adversary.step(batch) == {
        "discriminator-real": pytest.approx(mean(batch.target, real), rel=1e-5),
        "discriminator-fake": pytest.approx(mean(batch.image, fake), rel=1e-5),
    }


def test_a_branch_gets_gradient_and_the_discriminator_learns_from_its_own_step_alone(
    batch: TrainingBatch, untouched: Callable[..., Any]
) -> None:
    judge = Patches().eval()
    with untouched(judge):
        adversary = Adversary(judge, OBJECTIVES["non-saturating"])
        Adversarial(adversary).of_batch(batch).backward()
        assert batch.image.grad is not None
        assert batch.image.grad.any()
        assert [n for n, p in adversary.module.named_parameters() if p.grad is not None] == []
        before = [p.detach().clone() for p in adversary.parameters()]
        batch.image.grad = None
        adversary.step(batch)
    assert batch.image.grad is None
    assert not any(torch.equal(a, b) for a, b in zip(before, adversary.parameters(), strict=True))
    assert all(p.grad is None for p in adversary.parameters())


def test_a_discriminator_learns_to_tell_the_two_apart() -> None:
    adversary = Adversary(Patches(), OBJECTIVES["non-saturating"], lr=1e-2)
    batch = TrainingBatch(torch.full((2, 3, 16, 16), -0.5), torch.full((2, 3, 16, 16), 0.5))
    losses = [sum(adversary.step(batch).values()) for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
    with torch.no_grad():
        real, fake = (adversary.discriminate(image, batch).scores[0] for image in (batch.target, batch.image))
    assert real.min() > fake.max()


@pytest.mark.parametrize("kind", [Patches, Scales])
def test_feature_matching_compares_what_the_discriminator_sees_on_the_way(
    kind: type[nn.Module], batch: TrainingBatch
) -> None:
    judge = kind()
    adversary = Adversary(judge, OBJECTIVES["hinge"])
    value = FeatureMatching(adversary).of_batch(batch)
    if isinstance(judge, Scales):
        made, wanted = (
            [x for scale in judge(image) for x in scale[:-1]] for image in (batch.image, batch.target)
        )
    else:
        assert captured_layers(judge) == ["model.0", "model.2", "score"]
        features = lambda x: [judge.model[:2](x), judge.model(x)]  # type: ignore[index, operator]  # noqa: E731
        made, wanted = features(batch.image), features(batch.target)
    parts = []
    for a, b in zip(made, wanted, strict=True):
        pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
        parts.append(sum(abs(x - y) for x, y in pairs) / a.numel())
    assert value.item() == pytest.approx(sum(parts) / len(parts), rel=1e-4)
    value.backward()
    assert batch.image.grad is not None
    assert batch.image.grad.any()
    assert all(not module._forward_hooks for module in adversary.module.modules())


def test_features_may_come_in_tuples(batch: TrainingBatch) -> None:
    class Block(nn.Conv2d):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), None

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.score = Block(3, 4, 3), nn.Conv2d(4, 1, 1)

        def forward(self, image: Tensor) -> Tensor:
            return self.score(self.block(image)[0])

    judge = Stacked()
    a, b = (judge.block(image)[0] for image in (batch.image, batch.target))
    assert torch.allclose(
        FeatureMatching(Adversary(judge, OBJECTIVES["hinge"])).of_batch(batch), (a - b).abs().mean()
    )


def test_feature_matching_is_finite_at_equal_images(batch: TrainingBatch) -> None:
    same = replace(batch, image=batch.target.clone().requires_grad_())
    value = FeatureMatching(Adversary(Patches(), OBJECTIVES["hinge"])).of_batch(same)
    value.backward()
    assert value == 0
    assert same.image.grad is not None
    assert torch.isfinite(same.image.grad).all()


def test_a_discriminator_without_features_cannot_be_matched(batch: TrainingBatch) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, image: Tensor) -> Tensor:
            return image.mean((2, 3)) @ self.weight

    with pytest.raises(TrainingError, match="needs features between image and score, got none from Flat"):
        FeatureMatching(Adversary(Flat(), OBJECTIVES["hinge"])).of_batch(batch)


def test_the_branch_is_judged_once_for_all_terms(batch: TrainingBatch) -> None:
    adversary = Adversary(Patches(), OBJECTIVES["hinge"])
    seen: list[int] = []
    adversary.module.register_forward_hook(lambda *_: seen.append(1))
    Adversarial(adversary).of_batch(batch)
    FeatureMatching(adversary).of_batch(batch)
    assert len(seen) == 2  # the branch's images, and the backbone's for feature matching
    Adversarial(adversary).of_batch(replace(batch))
    assert len(seen) == 3


def test_a_discriminator_that_asks_for_more_gets_the_generators_inputs(batch: TrainingBatch) -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.judge = nn.Conv2d(4, 1, 1)

        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            return self.judge(torch.cat([image, mask], 1))

    judge = Conditional()
    mask = torch.rand(2, 1, 16, 16)
    adversary = Adversary(judge, OBJECTIVES["hinge"])
    assert adversary.needs_inputs
    assert Adversarial(adversary).needs_inputs
    given = replace(batch, kwargs={"mask": mask})
    want = -judge(batch.image, mask).mean()
    assert torch.allclose(Adversarial(adversary).of_batch(given), want)
    adversary.step(replace(batch, args=(mask,)))
    assert not Adversary(Patches(), OBJECTIVES["hinge"]).needs_inputs


def test_a_discriminator_sees_images_in_the_range_it_was_made_for(batch: TrainingBatch) -> None:
    judge = Patches()
    adversary = Adversary(judge, OBJECTIVES["hinge"], image_range=(0.0, 255.0))
    want = -judge((batch.image + 1) * 127.5).mean()
    assert torch.allclose(Adversarial(adversary).of_batch(batch), want, rtol=1e-4)


@pytest.mark.parametrize("output", [{"score": torch.zeros(1)}, [], ["a"], None])
def test_an_output_that_is_no_verdict_is_refused(output: Any, batch: TrainingBatch) -> None:
    class Odd(Patches):
        def forward(self, image: Tensor) -> Any:
            return output

    with pytest.raises(
        TrainingError, match=f"list that ends with the score.* got a {type(output).__name__} from Odd"
    ):
        Adversarial(Adversary(Odd(), OBJECTIVES["hinge"])).of_batch(batch)


def test_a_spectrally_normalised_discriminator_that_has_run_can_be_copied(batch: TrainingBatch) -> None:
    judge = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 1, 1))
    judge(batch.target)
    adversary = Adversary(judge, OBJECTIVES["hinge"])
    before = [p.detach().clone() for p in judge.parameters()]
    adversary.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, judge.parameters(), strict=True))
    assert not torch.equal(adversary.module[0].weight_orig, judge[0].weight_orig)  # type: ignore[index, union-attr]


def test_an_adversary_goes_on_where_it_stopped(batch: TrainingBatch) -> None:
    judge = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 1, 1))
    whole, first = Adversary(judge, OBJECTIVES["hinge"]), Adversary(judge, OBJECTIVES["hinge"])
    parts = []
    for _ in range(4):
        parts.append(whole.step(batch))
    for _ in range(2):
        first.step(batch)
    state = {name: value.clone() for name, value in first.state().items()}
    second = Adversary(judge, OBJECTIVES["hinge"])
    second.load_state(state)
    assert second.steps == 2
    assert [second.step(batch) for _ in range(2)] == parts[2:]
    got, want = second.state(), whole.state()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert len({str(part) for part in parts}) == 4


def test_the_state_of_another_discriminator_is_refused(batch: TrainingBatch) -> None:
    adversary = Adversary(Patches(), OBJECTIVES["hinge"])
    with pytest.raises(CheckpointError, match="the state of the discriminator Patches, got another one"):
        adversary.load_state(Adversary(Scales(), OBJECTIVES["hinge"]).state())
    with pytest.raises(CheckpointError, match="Use another folder, or the discriminator"):
        adversary.load_state({})
    assert adversary.steps == 0


def test_a_discriminator_that_diverges_stops_with_its_step(batch: TrainingBatch) -> None:
    adversary = Adversary(Patches(), OBJECTIVES["hinge"], lr=0.25)
    adversary.step(batch)
    broken = replace(batch, target=batch.target * float("nan"))
    with pytest.raises(
        TrainingError, match="became nan at its step 1: .*real.*Lower discriminator_lr, now 0.25"
    ):
        adversary.step(broken)


def test_both_sides_are_finite_under_bfloat16(batch: TrainingBatch) -> None:
    adversary = Adversary(Patches(), OBJECTIVES["non-saturating"])
    with torch.autocast("cpu", torch.bfloat16):
        value = Adversarial(adversary).of_batch(batch)
        parts = adversary.step(batch)
    value.backward()
    assert batch.image.grad is not None
    assert torch.isfinite(batch.image.grad).all()
    assert all(math.isfinite(part) for part in parts.values())


def test_objectives_are_found_by_name_or_given() -> None:
    own = OBJECTIVES["non-saturating"]
    assert find_objective(own) is own
    assert isinstance(find_objective("hinge"), Objective)
    with pytest.raises(
        OptionError, match="adversarial must be 'hinge' or 'non-saturating', or an object .*got 'wasserstein'"
    ):
        find_objective("wasserstein")
    with pytest.raises(OptionError, match="of_discriminator, got 3"):
        find_objective(3)  # type: ignore[arg-type]
