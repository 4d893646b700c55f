"""Both sides of equation 1: losses, gradients, kinds of discriminators, resuming."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from retroexit.errors import CheckpointError, OptionError, TrainingError
from retroexit.plugins.training_types import Objective, TrainingBatch
from retroexit.training.losses import terms
from retroexit.training.losses.terms import OBJECTIVES, Adversarial, Adversary, FeatureMatching, find_objective

HINGE = OBJECTIVES["hinge"]


class Patches(nn.Module):
    """Scores of patches, from a sequence with activations in place."""

    def __init__(self):
        super().__init__()
        act = nn.LeakyReLU(0.2, inplace=True)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), act, nn.Conv2d(4, 5, 3, 2, 1), act)
        self.score = nn.Conv2d(5, 1, 1)

    def forward(self, image):
        return self.score(self.model(image))


class Scales(nn.Module):
    """Features and score at two scales, as lists in a list."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = Patches(), Patches()

    def forward(self, image):
        outputs = []
        for part in (self.fine, self.coarse):
            first = torch.relu(part.model[0](image))
            second = torch.relu(part.model[2](first))
            outputs.append([first, second, part.score(second)])
            image = nn.functional.avg_pool2d(image, 2)
        return outputs


@pytest.fixture
def batch():
    image = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    return TrainingBatch(image, torch.rand(2, 3, 16, 16) * 2 - 1)


def log_loss(score):
    return -math.log(1 / (1 + math.exp(-score)))


FORMS = {"hinge": (lambda s: -s, lambda s: max(0.0, 1 - s), lambda s: max(0.0, 1 + s))}
FORMS["non-saturating"] = (log_loss, log_loss, lambda s: log_loss(-s))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", [Patches, Scales])
def test_both_sides_minimise_equation_1(name, kind, batch):
    judge, (branch, real, fake) = kind(), FORMS[name]

    def mean(image, form):
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


def test_a_branch_gets_gradient_and_the_discriminator_learns_from_its_own_step_alone(batch, untouched):
    judge = Patches().eval()
    judge.score = nn.utils.spectral_norm(judge.score)
    judge(batch.target)  # from here on its weight has a history, which copies must not share
    with untouched(judge):
        adversary = Adversary(judge, OBJECTIVES["non-saturating"])
        Adversarial(adversary).of_batch(batch).backward()
        assert batch.image.grad is not None and batch.image.grad.any()
        assert [n for n, p in adversary.module.named_parameters() if p.grad is not None] == []
        before = [p.detach().clone() for p in adversary.parameters()]
        batch.image.grad = None
        adversary.step(batch)
    assert batch.image.grad is None
    assert not any(torch.equal(a, b) for a, b in zip(before, adversary.parameters(), strict=True))
    assert all(p.grad is None for p in adversary.parameters())


@pytest.mark.parametrize("kind", [Patches, Scales])
def test_feature_matching_compares_the_features_of_the_discriminator(kind, batch):
    judge = kind()
    adversary = Adversary(judge, HINGE)
    value = FeatureMatching(adversary).of_batch(batch)
    if isinstance(judge, Scales):
        fake, real = ([x for scale in judge(image) for x in scale[:-1]] for image in (batch.image, batch.target))
    else:
        assert terms.captured_layers(judge) == ["model.0", "model.2", "score"]
        features = lambda x: [judge.model[:2](x), judge.model(x)]  # noqa: E731
        fake, real = features(batch.image), features(batch.target)
    parts = []
    for a, b in zip(fake, real, strict=True):
        pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
        parts.append(sum(abs(x - y) for x, y in pairs) / a.numel())
    assert value.item() == pytest.approx(sum(parts) / len(parts), rel=1e-4)
    value.backward()
    assert batch.image.grad is not None and batch.image.grad.any()
    assert all(not module._forward_hooks for module in adversary.module.modules())


def test_features_may_come_in_tuples_and_equal_images_have_finite_gradients(batch):
    class Block(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), None

    class Stacked(nn.Sequential):
        def forward(self, image):
            return self[1](self[0](image)[0])

    judge = Stacked(Block(3, 4, 3), nn.Conv2d(4, 1, 1))
    a, b = (judge[0](image)[0] for image in (batch.image, batch.target))
    term = FeatureMatching(Adversary(judge, HINGE))
    assert torch.allclose(term.of_batch(batch), (a - b).abs().mean())
    equal = replace(batch, image=batch.target.clone().requires_grad_())
    value = term.of_batch(equal)
    value.backward()
    assert value == 0 and equal.image.grad is not None and equal.image.grad.isfinite().all()


def test_all_terms_share_one_run_of_the_discriminator(batch):
    adversary = Adversary(Patches(), HINGE)
    seen = []
    adversary.module.register_forward_hook(lambda *_: seen.append(1))
    Adversarial(adversary).of_batch(batch)
    FeatureMatching(adversary).of_batch(batch)
    assert len(seen) == 2  # the branch's images, and the backbone's for feature matching
    Adversarial(adversary).of_batch(replace(batch))
    assert len(seen) == 3


def test_a_conditional_discriminator_gets_the_generators_inputs(batch):
    class Conditional(nn.Conv2d):
        def forward(self, image, mask):
            return super().forward(torch.cat([image, mask], 1))

    judge = Conditional(4, 1, 1)
    mask = torch.rand(2, 1, 16, 16)
    adversary = Adversary(judge, HINGE)
    assert adversary.needs_inputs and Adversarial(adversary).needs_inputs
    conditioned = replace(batch, kwargs={"mask": mask})
    expected = -judge(batch.image, mask).mean()
    assert torch.allclose(Adversarial(adversary).of_batch(conditioned), expected)
    adversary.step(replace(batch, args=(mask,)))
    assert not Adversary(Patches(), HINGE).needs_inputs


def test_a_discriminator_sees_images_in_its_own_range(batch):
    judge = Patches()
    adversary = Adversary(judge, HINGE, image_range=(0.0, 255.0))
    expected = -judge((batch.image + 1) * 127.5).mean()
    assert torch.allclose(Adversarial(adversary).of_batch(batch), expected, rtol=1e-4)


def test_a_discriminator_without_layers_has_no_features_to_match(batch):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, image):
            return self.scale * image.mean((1, 2, 3))

    with pytest.raises(TrainingError, match="needs features between image and score, got none from Flat"):
        FeatureMatching(Adversary(Flat(), HINGE)).of_batch(batch)


@pytest.mark.parametrize("output", [{"score": torch.zeros(1)}, [], ["a"], None])
def test_an_output_without_scores_is_refused(output, batch):
    class Odd(Patches):
        def forward(self, image):
            return output

    with pytest.raises(TrainingError, match=f"list that ends with the score.* got a {type(output).__name__} from Odd"):
        Adversarial(Adversary(Odd(), HINGE)).of_batch(batch)


def test_the_state_of_another_discriminator_is_refused():
    adversary = Adversary(Patches(), HINGE)
    with pytest.raises(CheckpointError, match="the state of the discriminator Patches, got another one"):
        adversary.load_state(Adversary(Scales(), HINGE).state())
    with pytest.raises(CheckpointError, match="Use another folder, or the discriminator"):
        adversary.load_state({})
    assert adversary.steps == 0


def test_a_discriminator_that_diverges_stops_with_its_step(batch):
    adversary = Adversary(Patches(), HINGE, lr=0.25)
    adversary.step(batch)
    with pytest.raises(TrainingError, match="became nan at its step 1: .*real.*Lower discriminator_lr, now 0.25"):
        adversary.step(replace(batch, target=batch.target * float("nan")))


def test_objectives_are_named_or_objects():
    assert find_objective(HINGE) is find_objective("hinge") is HINGE
    assert isinstance(HINGE, Objective)
    message = "adversarial must be 'hinge' or 'non-saturating', or an object .*got 'wasserstein'"
    with pytest.raises(OptionError, match=message):
        find_objective("wasserstein")
    with pytest.raises(OptionError, match="of_discriminator, got 3"):
        find_objective(3)
