"""The discriminator of OASIS and its loss: layout, N + 1 classes, LabelMix, each against a loop."""

import math
from dataclasses import replace

import pytest
import retroexit_oasis as oasis
import torch
from torch import nn

from retroexit.errors import TrainingError
from retroexit.plugins.training_types import TrainingBatch
from retroexit.training.losses.terms import Adversarial, Adversary

LABELS = 6


@pytest.fixture
def numbers():
    """Label numbers of two images; 0 is the unknown label, 5 does not occur."""
    return torch.randint(LABELS - 1, (2, 4, 8))


@pytest.fixture
def label(numbers):
    return oasis.one_hot(numbers, LABELS)


def test_one_hot_marks_the_label_of_every_pixel(numbers):
    label = oasis.one_hot(numbers[:, None], LABELS)
    assert label.dtype == torch.float32
    assert torch.equal(label.argmax(1), numbers)
    assert torch.equal(label.sum(1), torch.ones(2, 4, 8))
    assert torch.equal(oasis.one_hot(numbers.to(torch.uint8), LABELS), label)


@pytest.mark.parametrize(
    ("name", "labels", "crop", "condition"),
    [("cityscapes", 35, (256, 512), 99), ("ade20k", 151, (256, 256), 215), ("coco-stuff", 183, (256, 256), 247)],
)
def test_networks_are_made_for_a_data_set_by_name(name, labels, crop, condition):
    with torch.device("meta"):
        generator = oasis.OASISGenerator.for_dataset(name)
        silent = oasis.OASISGenerator.for_dataset(name, use_noise3d=False)
        discriminator = oasis.OASISDiscriminator.for_dataset(name)
        image = torch.zeros(1, 3, *crop)
    assert generator.crop == crop
    assert generator.fc.in_channels == condition
    assert silent.fc.in_channels == labels
    assert discriminator(image).shape == (1, labels + 1, *crop)


def test_the_discriminator_has_the_names_and_shapes_of_the_official_checkpoints():
    with torch.device("meta"):
        state = oasis.OASISDiscriminator().state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["body_down.0.conv1.0.weight_orig"] == (128, 3, 3, 3)
    assert shapes["body_down.2.conv1.1.weight_orig"] == (256, 128, 3, 3)
    assert shapes["body_down.2.conv_s.bias"] == (256,)
    assert shapes["body_up.1.conv1.2.weight_orig"] == (256, 1024, 3, 3)
    assert shapes["body_up.1.conv2.1.weight_orig"] == (256, 256, 3, 3)
    assert shapes["body_up.5.conv_s.weight_orig"] == (64, 256, 1, 1)
    assert shapes["layer_up_last.weight"] == (36, 64, 1, 1)
    shortcuts = {*(f"body_down.{i}.conv_s" for i in (0, 2, 4)), *(f"body_up.{i}.conv_s" for i in range(1, 6))}
    assert {name.rpartition(".")[0] for name in shapes if "conv_s" in name} == shortcuts


@pytest.mark.parametrize("unknown", [0, None])
def test_class_weights_give_every_known_label_the_same_share(numbers, label, unknown):
    counts = [int((numbers == c).sum()) for c in range(LABELS)]
    known = [c for c in range(LABELS) if counts[c] and c != unknown]
    expected = [numbers.numel() / (len(known) * counts[c]) if c in known else 0.0 for c in range(LABELS)]
    assert oasis.class_weights(label, unknown=unknown).tolist() == pytest.approx(expected)


def test_class_weights_are_zero_where_all_labels_are_unknown():
    nothing = oasis.one_hot(torch.zeros(1, 2, 2, dtype=torch.long), LABELS)
    assert not oasis.class_weights(nothing).any()
    assert oasis.real_loss(torch.randn(1, LABELS + 1, 2, 2), nothing) == 0


def test_the_losses_are_cross_entropies_over_the_labels_and_a_fake_class(numbers, label):
    scores, weights = torch.randn(2, LABELS + 1, 4, 8), oasis.class_weights(label)
    chances = scores.exp() / scores.exp().sum(1, keepdim=True)
    entropy = -chances.gather(1, numbers[:, None] + 1)[:, 0].log()
    assert float(oasis.real_loss(scores, label)) == pytest.approx(float((weights[numbers] * entropy).mean()))
    assert float(oasis.fake_loss(scores)) == pytest.approx(float(-chances[:, 0].log().mean()))


def test_a_labelmix_mask_is_constant_on_every_label_of_an_image_and_fair(label):
    masks = [oasis.labelmix_mask(label) for _ in range(200)]
    for mask in masks[:20]:
        assert mask.shape == (2, 1, 4, 8)
        marked, sizes = (mask * label).sum((2, 3)), label.sum((2, 3))  # of each label in each image
        assert ((marked == 0) | (marked == sizes)).all()
    share = torch.stack(masks).mean((0, 2, 3, 4))
    assert ((share - 0.5).abs() < 0.1).all()
    assert any(not torch.equal(mask[0, 0, 0, :1], mask[1, 0, 0, :1]) for mask in masks)


def test_labelmix_compares_the_scores_of_a_mix_with_the_mixed_scores(label):
    mixed, real, fake = torch.randn(3, 2, LABELS + 1, 4, 8)
    mask = oasis.labelmix_mask(label)
    loss = oasis.labelmix_loss(mixed, real, fake, mask)
    assert float(loss) == pytest.approx(float((mixed - torch.where(mask == 1, real, fake)).square().mean()))


@pytest.fixture
def batch(label):
    image = (torch.rand(2, 3, 4, 8) * 2 - 1).requires_grad_()
    return TrainingBatch(image, torch.rand(2, 3, 4, 8) * 2 - 1, (label,))


def test_the_objective_puts_the_parts_together(batch, label):
    judge = nn.Conv2d(3, LABELS + 1, 3, padding=1)
    adversary = Adversary(judge, oasis.OASISObjective(labelmix=3.0))
    assert adversary.needs_inputs
    assert not adversary.is_conditional
    value = Adversarial(adversary).of_batch(batch)
    assert torch.allclose(value, oasis.real_loss(judge(batch.image), label))
    torch.manual_seed(7)
    parts = adversary.step(batch)
    torch.manual_seed(7)
    mask = oasis.labelmix_mask(label)
    with torch.no_grad():
        real, fake = judge(batch.target), judge(batch.image)
        mixed = judge(oasis.mix(batch.target, batch.image, mask))
        consistency = oasis.labelmix_loss(mixed, real, fake, mask)
        expected = [oasis.real_loss(real, label), oasis.fake_loss(fake), 3 * consistency]
    names = [f"discriminator-{part}" for part in ("real", "fake", "labelmix")]
    assert list(parts) == names and list(parts.values()) == pytest.approx(list(map(float, expected)), rel=1e-5)
    assert consistency > 0
    without = Adversary(judge, oasis.OASISObjective(labelmix=0.0))
    assert list(without.step(batch)) == ["discriminator-real", "discriminator-fake"]


def test_the_objective_is_finite_under_bfloat16_and_at_equal_images(batch):
    adversary = Adversary(nn.Conv2d(3, LABELS + 1, 3, padding=1), oasis.OASISObjective())
    for image in (batch.image, batch.target.clone().requires_grad_()):
        with torch.autocast("cpu", torch.bfloat16):
            value = Adversarial(adversary).of_batch(replace(batch, image=image))
            parts = adversary.step(replace(batch, image=image))
        value.backward()
        assert image.grad.isfinite().all()
        assert all(math.isfinite(part) for part in parts.values())


def test_the_objective_needs_a_label_map_and_logits(batch, label):
    term = Adversarial(Adversary(nn.Conv2d(3, LABELS + 1, 1), oasis.OASISObjective()))
    assert term.of_batch(replace(batch, args=(), kwargs={"label": label})) > 0
    for args, got in (((), "NoneType"), ((label[:, 0],), r"\(2, 4, 8\)"), ((label[..., :4],), r"6, 4, 4\)")):
        with pytest.raises(TrainingError, match=f"first input must be a one-hot label map.*{got}"):
            term.of_batch(replace(batch, args=args))

    class Lists(nn.Conv2d):
        def forward(self, x):
            return [super().forward(x)]

    with pytest.raises(TrainingError, match="must return logits .* got a list"):
        Adversarial(Adversary(Lists(3, 1, 1), oasis.OASISObjective())).of_batch(batch)
