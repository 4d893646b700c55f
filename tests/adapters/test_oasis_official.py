"""The OASIS adapter against the official code, where a checkout is at hand; nothing of it is kept here."""

from types import SimpleNamespace

import pytest
import retroexit_oasis
import torch
from small import official as checkout

import retroexit

DATASETS = retroexit_oasis.DATASETS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def official():
    names = ("generator", "discriminator", "losses", "models")
    with checkout("OASIS", *(f"models.{name}" for name in names)) as modules:
        yield SimpleNamespace(**dict(zip(names, modules, strict=True)))


def options(name, width=4, noise=True, norm="syncbatch"):
    dataset = DATASETS[name]
    sizes = {"crop_size": dataset.crop[1], "aspect_ratio": dataset.crop[1] / dataset.crop[0], "z_dim": 64}
    networks = {"gpu_ids": "-1", "no_spectral_norm": False, "param_free_norm": norm, "spade_ks": 3}
    losses = {"no_balancing_inloss": False, "contain_dontcare_label": True, "no_labelmix": False}
    labels = {"semantic_nc": dataset.num_labels, "no_3dnoise": not noise}
    return SimpleNamespace(channels_G=width, num_res_blocks=6, **labels, **sizes, **networks, **losses)


def with_statistics(network):
    with torch.no_grad():
        for module in network.modules():
            for hook in module._forward_pre_hooks.values():
                for _ in range(5):
                    hook(module, None)  # one step of the power iteration, in train mode
        for name, value in network.state_dict().items():
            if name.endswith("running_mean") or name.endswith("bias"):
                value.normal_(std=0.3)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2)
    return network.eval()


def labels(name, batch=1):
    dataset = DATASETS[name]
    numbers = torch.randint(dataset.num_labels, (batch, 8, 8)).repeat_interleave(dataset.crop[0] // 8, 1)
    numbers = numbers.repeat_interleave(dataset.crop[1] // 8, 2)
    return retroexit_oasis.one_hot(numbers, dataset.num_labels)


@pytest.mark.parametrize("name", list(DATASETS))
@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
def test_an_official_ema_file_loads_strictly_and_draws_the_same_images(official, name, noise, tmp_path):
    theirs = with_statistics(official.generator.OASIS_Generator(options(name, noise=noise)))
    torch.save(theirs.state_dict(), tmp_path / "best_EMA.pth")
    dataset = DATASETS[name]
    ours = retroexit_oasis.OASISGenerator(dataset.num_labels, 64, 4, dataset.crop, use_noise3d=noise).eval()
    ours.load_state_dict(torch.load(tmp_path / "best_EMA.pth", weights_only=True), strict=True)
    label = labels(name)
    with torch.no_grad():
        torch.manual_seed(5)
        expected = theirs(label)
        torch.manual_seed(5)
        assert torch.equal(ours(label), expected)
    assert expected.std() > 0.05


@pytest.mark.parametrize("name", list(DATASETS))
def test_an_official_discriminator_loads_strictly_and_gives_the_same_scores(official, name, tmp_path):
    theirs = with_statistics(official.discriminator.OASIS_Discriminator(options(name)))
    torch.save(theirs.state_dict(), tmp_path / "best_D.pth")
    ours = retroexit_oasis.OASISDiscriminator.for_dataset(name).eval()
    ours.load_state_dict(torch.load(tmp_path / "best_D.pth", weights_only=True), strict=True)
    image = torch.rand(1, 3, 64, 128) * 2 - 1
    with torch.no_grad():
        scores = theirs(image)
        assert torch.equal(ours(image), scores)
    assert scores.isfinite().all() and scores.std() > 0.01


def test_both_sides_of_the_objective_are_the_official_ones(official):
    from retroexit.plugins.training_types import TrainingBatch
    from retroexit.training.losses.terms import Adversarial, Adversary

    computer = official.losses.losses_computer(options("cityscapes"))
    theirs = with_statistics(official.discriminator.OASIS_Discriminator(options("cityscapes")))
    label = retroexit_oasis.one_hot(torch.randint(3, (2, 64, 64)) * 9, 35)
    image, target = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    adversary = Adversary(theirs, retroexit_oasis.OASISObjective())
    adversary.module.eval()  # so that spectral norms stay in what follows
    batch = TrainingBatch(image.requires_grad_(), target, (label,))
    expected = computer.loss(theirs(image), label.clone(), for_real=True)
    torch.testing.assert_close(Adversarial(adversary).of_batch(batch), expected)
    torch.manual_seed(4)
    parts = adversary.step(batch)
    torch.manual_seed(4)
    mask = retroexit_oasis.labelmix_mask(label)
    real, fake, mixed = (theirs(x) for x in (target, image, mask * target + (1 - mask) * image))
    for name, scores in (("real", real), ("fake", fake)):
        loss = computer.loss(scores, label.clone(), name == "real").detach()
        assert parts[f"discriminator-{name}"] == pytest.approx(float(loss))
    consistency = computer.loss_labelmix(mask, mixed, fake, real)
    assert parts["discriminator-labelmix"] == pytest.approx(10 * float(consistency.detach()), rel=1e-4)


def test_an_official_generator_is_wrapped_with_blocks_of_its_own_class(official):
    chosen = options("cityscapes")
    chosen.semantic_nc, chosen.z_dim, chosen.crop_size = 5, 4, 64
    generator = with_statistics(official.generator.OASIS_Generator(chosen))
    adapter = retroexit_oasis.retroexit_describe(generator)
    model = retroexit.wrap(generator, [1, 4], 1 / 4, min_channels=4, init="scratch", adapter=adapter)
    label = retroexit_oasis.one_hot(torch.randint(5, (2, 32, 64)), 5)
    torch.manual_seed(1)
    expected = generator(label)
    torch.manual_seed(1)
    assert torch.equal(model(label), expected)
    for branch, k in zip(model.branches, (1, 4), strict=True):
        blocks = list(branch.tail.body.children())
        assert {type(block) for block in blocks} == {type(generator.body[0])}
        assert blocks[0].conv_0.in_channels == generator.channels[k]
        assert branch.tail.conv_img.in_channels == 4
