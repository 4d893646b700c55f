"""Terms that need no adversary: each against a loop, another library, or by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from retroexit.errors import CheckpointError, OptionError, TrainingError, WeightsError
from retroexit.metrics import LPIPS, MSSSIM
from retroexit.plugins import host
from retroexit.plugins.training_types import TrainingBatch
from retroexit.training.losses import L1, MSE, PERCEPTUAL, Gaze, Perceptual, TrainingLoss
from retroexit.training.losses.terms import Equaliser


@pytest.fixture
def pair():
    """Two different batches of images in [-1, 1]."""
    return torch.rand(2, 3, 32, 40) * 2 - 1, torch.rand(2, 3, 32, 40) * 2 - 1


@pytest.fixture
def vgg_file(tmp_path):
    """A made-up file with the layout of torchvision's VGG19, classifier left out."""
    from torchvision import models

    with torch.device("meta"):
        empty = models.vgg19(weights=None)
    source = torch.Generator().manual_seed(1)
    state = {}
    for name, value in empty.state_dict().items():
        if name.startswith("features."):
            spread = (2 / max(1, value[0].numel())) ** 0.5
            state[name] = torch.randn(value.shape, generator=source) * (spread if value.dim() > 1 else 0.1)
    torch.save(state, tmp_path / "vgg19.pth")
    return tmp_path / "vgg19.pth"


def by_hand(state, image, taps):
    """VGG19 written out: 3x3 convolutions with ReLU, halved before the 3rd, 5th, 9th and 13th."""
    x = torch.empty_like(image)
    for c, (mean, deviation) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        x[:, c] = ((image[:, c] + 1) / 2 - mean) / deviation
    features, number = [], 0
    for block in (2, 2, 4, 4, 4):
        for _ in range(block):
            weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
            x = nn.functional.conv2d(x, weight, bias, padding=1).clamp(min=0)
            number += 2
            if number - 1 in taps:
                features.append(x)
        x = nn.functional.max_pool2d(x, 2)
        number += 1
    return features


def test_vgg_is_the_weighted_difference_of_five_layers_of_vgg19(vgg_file, pair):
    taps = {1: 1 / 32, 6: 1 / 16, 11: 1 / 8, 20: 1 / 4, 29: 1.0}
    state = torch.load(vgg_file, weights_only=True)
    a, b = (by_hand(state, image, taps) for image in pair)
    expected = []
    for n in range(2):
        parts = zip(taps.values(), a, b, strict=True)
        expected.append(sum(w * float((x[n] - y[n]).abs().sum()) / x[n].numel() for w, x, y in parts))
    assert Perceptual("vgg", vgg_file)(*pair).tolist() == pytest.approx(expected, rel=1e-4)


def test_squeeze_features_are_those_that_lpips_compares(shared, pair):
    file = shared / "data" / "weights" / "lpips_squeeze_v0.1.pth"
    term, metric = Perceptual("features-squeeze", file), LPIPS("squeeze", file)
    network = metric._network
    features = [network.net(network.scaling_layer(image)) for image in pair]
    expected = [sum(float((x[n] - y[n]).abs().mean()) for x, y in zip(*features, strict=True)) / 7 for n in (0, 1)]
    # LPIPS rounds the mean and deviation of ImageNet to three digits in [-1, 1].
    assert term(*pair).tolist() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda file: Perceptual("features-alex", file), r"'features-alex' \(alexnet\): features.0.w"),
        (lambda _: host().loss("vgg", weights="nowhere.pth"), "no weight file at nowhere.pth"),
        (lambda _: Perceptual("vgg13"), "no perceptual loss 'vgg13'; closest: 'vgg"),
        (lambda file: Perceptual("features-random", file), "must be None for 'features-random', got"),
        (lambda _: host().loss("l1", weights="x"), "loss 'l1' of .* takes no weights. Leave it out"),
        (lambda _: Perceptual("features-random")(*torch.zeros(2, 1, 3, 9, 7)), r"8x8 pixels, got \(1, 3, 9, 7\)"),
    ],
)
def test_wrong_files_names_and_sizes_are_refused(call, message, vgg_file):
    with pytest.raises((OptionError, WeightsError), match=message):
        call(vgg_file)


def test_random_features_are_the_same_every_time_and_draw_nothing(pair):
    before = torch.get_rng_state()
    one, other = Perceptual("features-random"), Perceptual("features-random")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one(*pair), other(*pair))
    assert one.describe() == other.describe()
    grey = [image[:, :1] for image in pair]
    assert torch.equal(one(*grey), one(*(image.expand(-1, 3, -1, -1) for image in grey)))
    assert not any(p.requires_grad for p in one.parameters())


def test_features_of_a_shared_target_are_computed_once_while_it_stays(pair):
    term, fresh = Perceptual("features-random"), Perceptual("features-random")
    (image, target), seen = pair, []
    term.trunk[0].register_forward_hook(lambda *_: seen.append(1))
    first = term(image, target)
    assert torch.equal(term(0.5 * image, target), fresh(0.5 * image, target.clone()))
    assert len(seen) == 3
    target.mul_(0.5)
    assert torch.equal(term(image, target), fresh(image, target.clone()))
    assert not torch.equal(term(image, target), first)
    assert torch.equal(copy.deepcopy(term)(image, target), term(image, target))


@pytest.mark.parametrize("name", PERCEPTUAL)
def test_the_smallest_image_is_where_every_tap_still_has_a_value(name):
    from torchvision import models

    network = PERCEPTUAL[name]
    with torch.device("meta"):
        trunk = getattr(models, network.builder)(weights=None).features[: max(network.taps) + 1]
        assert trunk(torch.zeros(1, 3, network.smallest, network.smallest)).numel() > 0
        with pytest.raises(RuntimeError):
            trunk(torch.zeros(1, 3, network.smallest - 1, network.smallest - 1))


def terms():
    class Network(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))[:, :2] / (x.mean((2, 3)).norm(dim=1, keepdim=True) + 1e-6)

    features = Perceptual("features-random")
    return {"l1": L1(), "mse": MSE(), "ms-ssim": MSSSIM(), "features-random": features, "gaze": Gaze(Network())}


@pytest.mark.parametrize("name", ["l1", "mse", "ms-ssim", "features-random", "gaze"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_term_is_finite_at_equal_images_and_at_opposite_ones(name, bfloat16):
    term = terms()[name]
    target = torch.rand(2, 3, 32, 32) * 2 - 1
    for pixels in (target.clone(), -target, torch.zeros_like(target), 0.5 * target):
        image = pixels.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = term(image, target).mean()
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(image.grad).all()
        if torch.equal(pixels, target):
            assert float(value.detach()) == pytest.approx(0, abs=1e-4)
        else:
            assert value > 0
    assert image.grad.any()


def test_mse_is_what_psnr_is_made_of(pair):
    value, (image, target) = float(host().loss("mse")(*pair)), pair
    squares = [(float(a) - float(b)) ** 2 for a, b in zip(image.flatten(), target.flatten(), strict=True)]
    assert value == pytest.approx(sum(squares) / len(squares), rel=1e-4)
    psnr = peak_signal_noise_ratio((image + 1) / 2, (target + 1) / 2, data_range=1.0)
    assert value == pytest.approx(4 * 10 ** (-float(psnr) / 10), rel=1e-4)


def test_ms_ssim_keeps_its_value_under_bfloat16(pair):
    metric, near = MSSSIM(), (pair[0] + 0.1 * pair[1]).clamp(-1, 1)
    expected = metric(near, pair[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metric(near, pair[0]), expected)


def test_gaze_compares_the_outputs_of_the_network_and_does_not_change_it(untouched, pair):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)
            self.drop = nn.Dropout(0.9)

        def forward(self, x):
            angles = self.last(self.drop(x.mean((2, 3))))
            return {"angles": angles, "closed": angles[:, :1] > 0, "blink": 2 * angles[:, 0]}

    network = Network().train()
    with untouched(network):
        term = Gaze(network)
        image = pair[0].clone().requires_grad_()
        value = term(image, pair[1])
        value.backward()
    angles = [network.last(x.mean((2, 3))).tolist() for x in pair]
    difference = [abs(angles[0][n][k] - angles[1][n][k]) for n in (0, 1) for k in (0, 1)]
    blink = [2 * abs(angles[0][n][0] - angles[1][n][0]) for n in (0, 1)]
    assert value.item() == pytest.approx((sum(difference) / 4 + sum(blink) / 2) / 2, rel=1e-5)
    assert image.grad.any()


def test_a_gaze_network_that_stops_the_gradient_is_refused(pair):
    class Detached(nn.Module):
        def forward(self, x):
            return x.detach().mean((2, 3))

    class Textual(nn.Module):
        def forward(self, x):
            return "left"

    image = pair[0].clone().requires_grad_()
    with pytest.raises(TrainingError, match="outputs without gradient from Detached"):
        Gaze(Detached())(image, pair[1])
    with pytest.raises(TrainingError, match="no floating point output from Textual"):
        Gaze(Textual())(image, pair[1])


def test_a_loss_adds_its_terms_by_weight_and_returns_each_of_them(pair):
    image, target = pair[0].clone().requires_grad_(), pair[1]
    per_image = lambda a, b: (a - b).square().mean((1, 2, 3)).sqrt()  # noqa: E731
    loss = TrainingLoss({"l1": (3.0, L1()), "distance": (0.5, per_image)})
    total, parts = loss(TrainingBatch(image, target))
    differences = (pair[0] - target).flatten(1).tolist()
    l1 = sum(abs(x) for row in differences for x in row) / pair[0].numel()
    distance = sum(math.sqrt(sum(x * x for x in row) / len(row)) for row in differences) / 2
    assert parts == {"l1": pytest.approx(l1, rel=1e-4), "distance": pytest.approx(distance, rel=1e-4)}
    assert total.item() == pytest.approx(3 * l1 + 0.5 * distance, rel=1e-4)
    total.backward()
    assert image.grad is not None
    assert not loss.needs_inputs
    assert loss.state() == {}


@pytest.mark.parametrize(("value", "got"), [(torch.zeros(3), r"\(3,\)"), (1.5, "1.5")])
def test_a_term_that_returns_something_else_is_named(value, got, pair):
    loss = TrainingLoss({"odd": (1.0, lambda a, b: value)})
    message = f"the loss 'odd' must return a scalar or one number per image, got {got} for images"
    with pytest.raises(TrainingError, match=message):
        loss(TrainingBatch(*pair))


def test_a_term_may_read_the_inputs_of_the_generator(pair):
    class Masked:
        needs_inputs = True

        def of_batch(self, batch):
            return ((batch.image - batch.target).abs() * batch.args[0]).mean((1, 2, 3))

    loss = TrainingLoss({"masked": (2.0, Masked())})
    mask = (torch.rand(2, 1, 32, 40) > 0.5).float()
    total, parts = loss(TrainingBatch(*pair, args=(mask,)))
    expected = float(((pair[0] - pair[1]).abs() * mask).mean())
    assert loss.needs_inputs
    assert total.item() == pytest.approx(2 * expected, rel=1e-5)
    assert parts == {"masked": pytest.approx(expected, rel=1e-5)}


# Equalised weights.


def strong(a, b):
    return 40 * (a - b).square().mean((1, 2, 3))


def blind(a, b):
    return b.mean((1, 2, 3))


def make(steps=3):
    terms = {"l1": (1.0, L1()), "strong": (2.0, strong), "blind": (1.0, blind)}
    return TrainingLoss(terms, equaliser=Equaliser(list(terms), steps))


def batches(count, size=2):
    source = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(size, 3, 4, 4, generator=source) * 2 - 1  # noqa: E731
    return [TrainingBatch(draw().requires_grad_(), draw()) for _ in range(count)]


def test_gradients_of_all_terms_are_as_long_as_their_weights_say():
    loss, (batch,) = make(), batches(1)
    pixels, images = batch.image[0].numel(), len(batch.image)
    loss(batch)
    apart = (80 * (batch.image.detach() - batch.target) / pixels).square()
    # Squared lengths of the gradient at each image of the mean over images, times their number.
    lengths = {"l1": [pixels * (1 / pixels) ** 2] * images, "strong": apart.flatten(1).sum(1).tolist()}
    norms = {name: (sum(squares) / images) ** 0.5 for name, squares in lengths.items()}
    mean = (norms["l1"] * norms["strong"]) ** 0.5
    for name, norm in norms.items():
        assert loss.equaliser.factor(name) == pytest.approx(mean / norm, rel=1e-5)
    assert loss.equaliser.factor("blind") == 1

    total, parts = loss(batch)
    factors = {name: loss.equaliser.factor(name) for name in parts}
    expected = sum(weight * factors[name] * parts[name] for name, (weight, _) in loss.terms.items())
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_factors_are_fixed_after_the_first_steps():
    loss = make(steps=2)
    seen = []
    for batch in batches(4):
        loss(batch)
        seen.append(loss.equaliser.factor("strong"))
    assert seen[0] != seen[1] == seen[2] == seen[3]


def test_nothing_is_measured_without_gradient():
    loss = make()
    with torch.no_grad():
        loss(batches(1)[0])
    (batch,) = batches(1)
    loss(TrainingBatch(batch.image.detach(), batch.target))
    assert int(loss.equaliser.state()["count"]) == 0
    assert [loss.equaliser.factor(name) for name in loss.terms] == [1, 1, 1]


def test_factors_do_not_depend_on_the_batch_size():
    together, apart = make(10), make(10)
    (batch,) = batches(1, size=6)
    together(batch)
    for i in range(0, 6, 2):
        apart(TrainingBatch(batch.image.detach()[i : i + 2].clone().requires_grad_(), batch.target[i : i + 2]))
    for name in together.terms:
        assert together.equaliser.factor(name) == pytest.approx(apart.equaliser.factor(name), rel=1e-5)


def test_a_state_of_other_terms_is_refused():
    with pytest.raises(CheckpointError, match="equalised weights of l1, strong, blind, got none"):
        make().load_state({})
    with pytest.raises(CheckpointError, match="got 1 terms"):
        make().load_state({"equaliser.squares": torch.zeros(1), "equaliser.count": torch.tensor(1)})


def test_the_factor_of_a_term_with_tiny_gradients_is_bounded():
    faint = {"l1": (1.0, L1()), "faint": (1.0, lambda a, b: 1e-20 * (a - b).square().mean())}
    loss = TrainingLoss(faint, equaliser=Equaliser(list(faint), 2))
    loss(batches(1)[0])
    assert loss.equaliser.factor("faint") == 1e4
