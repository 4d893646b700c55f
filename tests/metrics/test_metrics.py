"""Quality metrics: reference values, where weights come from, and what is refused."""

import hashlib
import pickle
import sys
import warnings
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from retroexit.errors import MissingExtraError, OptionError, WeightsError
from retroexit.metrics import LPIPS, MSSSIM
from retroexit.metrics import weights as weights_module


def random_backbone():
    """Random convolutions under torchvision's names."""
    names = weights_module.empty_lpips("squeeze").net.state_dict()
    return {f"features.{k.partition('.')[2]}": torch.randn(v.shape) * 0.1 for k, v in names.items()}


@pytest.fixture
def weight_file(tmp_path):
    path = tmp_path / "squeeze.pth"
    torch.save(random_backbone(), path)
    return path


@pytest.fixture
def metric(weight_file):
    return LPIPS("squeeze", weight_file)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub cache, and no network."""

    def no_network(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "hub" / "checkpoints"


class Trap:
    def __reduce__(self):
        return pytest.fail, ("code in a weight file has run",)


def name_hub_file(monkeypatch, name):
    monkeypatch.setattr(weights_module, "_hub_address", lambda net: f"https://example.org/{name}")


@pytest.mark.parametrize(("net", "expected"), [("alex", (0.72188, 0.13757)), ("squeeze", (0.71105, 0.14790))])
def test_lpips_gives_the_published_values(shared, net, expected):
    folder = shared / "data" / "weights"

    def load(name):
        pixels = np.array(Image.open(folder / "lpips_ref" / name))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1

    metric = LPIPS(net, folder / f"lpips_{net}_v0.1.pth")
    pairs = torch.cat([load("ex_p0.png"), load("ex_p1.png")])
    losses = metric(load("ex_ref.png").expand(2, -1, -1, -1), pairs)
    assert losses.tolist() == pytest.approx(expected, abs=1e-4)


def test_lpips_equals_the_lpips_package_on_the_same_weights(metric):
    a, b = torch.rand(2, 3, 40, 33) * 2 - 1, torch.rand(2, 3, 40, 33) * 2 - 1
    assert torch.allclose(metric(a, b), metric._network(a, b).flatten(), atol=1e-6)


def test_a_loss_is_zero_for_equal_images_and_independent_of_the_batch(metric):
    a, b = torch.rand(3, 3, 64, 64) * 2 - 1, torch.rand(3, 3, 64, 64) * 2 - 1
    assert torch.equal(metric(a[:, :1], b[:, :1]), metric(a[:, :1].expand_as(a), b[:, :1].expand_as(b)))
    for m in (metric, MSSSIM()):
        assert m(a, a).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
        together, alone = m(a, b), torch.cat([m(a[i : i + 1], b[i : i + 1]) for i in range(3)])
        assert together.shape == (3,)
        assert torch.allclose(together, alone, atol=1e-6)
        assert (together > 0.01).all()


def test_the_gradient_reaches_both_images_and_not_the_weights(metric):
    image, target = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
    metric(image, target)  # the target's features are cached now
    target.requires_grad_()
    metric(image, target).sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (image, target))
    assert not any(p.requires_grad or p.grad is not None for p in metric.parameters())


def test_gradients_are_finite_where_features_are_zero_or_images_opposite(tmp_path):
    torch.save({k: torch.zeros_like(v) for k, v in random_backbone().items()}, tmp_path / "dead.pth")
    image = (torch.rand(1, 3, 44, 44) * 2 - 1).requires_grad_()
    opposite = MSSSIM()(image, -image.detach())
    assert opposite.item() == pytest.approx(1, abs=0.05)
    (opposite + LPIPS("squeeze", tmp_path / "dead.pth")(image, torch.rand(1, 3, 44, 44))).sum().backward()
    assert image.grad is not None and image.grad.isfinite().all()


def test_a_metric_inside_a_training_module_stays_deterministic(metric):
    nn.ModuleList([metric]).train()
    a, b = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    assert not metric.training and torch.equal(metric(a, b), metric(a, b))


def test_features_of_a_shared_target_are_computed_once(metric):
    calls = []
    hook = metric._network.net.register_forward_hook(lambda *_: calls.append(1))
    target, images = torch.rand(2, 3, 32, 32), torch.rand(3, 2, 3, 32, 32)
    losses = [metric(image, target) for image in images]
    assert len(calls) == 4
    hook.remove()
    assert all(torch.equal(a, metric(i, target.clone())) for a, i in zip(losses, images, strict=True))
    target.mul_(0.5)  # other values in the same tensor are another target
    assert torch.equal(metric(images[0], target), metric(images[0], target.clone()))
    assert not torch.equal(metric(images[0], target), losses[0])
    copied = pickle.loads(pickle.dumps(metric))
    assert torch.equal(copied(images[0], target), metric(images[0], target))


def test_a_description_names_net_file_versions_and_the_numbers_in_use(weight_file, tmp_path):
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = LPIPS("squeeze", weight_file)
    assert torch.equal(state, torch.get_rng_state())  # building it draws no random numbers
    facts = plain.describe()
    assert (facts["name"], facts["net"], facts["file"]) == ("lpips-squeeze", "squeeze", "squeeze.pth")
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert set(facts["versions"]) == {"lpips", "torch", "torchvision"}
    # The hash depends on the numbers, not on the layout of the file.
    heads = {k: v for k, v in plain._network.state_dict().items() if k[:3] == "lin" and k[:4] != "lins"}
    for factor, is_equal in ((1, True), (2, False)):
        heads["lin0.model.1.weight"] = heads["lin0.model.1.weight"] * factor
        torch.save({"backbone": torch.load(weight_file), "lin": heads}, tmp_path / "both.pth")
        both = LPIPS("squeeze", tmp_path / "both.pth")
        assert (both.describe()["sha256"] == facts["sha256"]) is is_equal


def test_missing_weights_name_file_place_and_address(hub):
    with pytest.raises(WeightsError, match=r"alexnet-owt-7be5be79\.pth.*no route to host") as caught:
        LPIPS("alex")
    assert str(hub) in str(caught.value)
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in str(caught.value)


def test_a_cached_or_downloaded_file_is_used_only_if_its_hash_is_the_one_in_its_name(hub, weight_file, monkeypatch):
    content = weight_file.read_bytes()
    prefix = hashlib.sha256(content).hexdigest()[:8]

    def fetch(url, target, hash_prefix, progress):
        assert hash_prefix == prefix and not progress
        Path(target).write_bytes(content)

    name_hub_file(monkeypatch, f"random-{prefix}.pth")
    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file", fetch)
        assert LPIPS("squeeze").describe()["file"] == f"random-{prefix}.pth"
    assert LPIPS("squeeze").source == str(hub / f"random-{prefix}.pth")  # without another download
    (hub / "random-00000000.pth").write_bytes(content)
    name_hub_file(monkeypatch, "random-00000000.pth")
    with pytest.raises(WeightsError, match=rf"damaged: its sha256 must start with 00000000, got {prefix}"):
        LPIPS("squeeze")


@pytest.mark.parametrize(
    ("net", "content", "message"),
    [
        ("alex", None, r"no weight file at .*w\.pth"),
        ("alex", random_backbone(), r"weight must have shape \(64, 3, 11, 11\), got \(64, 3, 3, 3\)"),
        ("squeeze", {"features.0.weight": torch.zeros(64, 3, 3, 3)}, r"\.bias must have .* got nothing"),
        ("squeeze", b"not a weight file", "must be a file of tensors and plain values only"),
        ("squeeze", [torch.zeros(1)], "must hold a state dict, got list"),
        ("squeeze", {"backbone": Trap()}, "tensors and plain values only"),  # code in a file never runs
    ],
)
def test_wrong_weight_files_are_refused(tmp_path, net, content, message):
    if isinstance(content, bytes):
        (tmp_path / "w.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        LPIPS(net, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 40), r"\(1, 3, 32, 32\) and \(1, 3, 32, 40\)"),
        (torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32), r"\(N, 1, H, W\), got \(1, 4, 32, 32\)"),
        (torch.zeros(3, 32, 32), torch.zeros(3, 32, 32), r"got \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32).byte(), torch.zeros(1, 3, 32, 32).byte(), "got torch.uint8"),
        (torch.zeros(1, 3, 16, 64), torch.zeros(1, 3, 16, 64), "at least 17x17 pixels, got 16x64"),
        (torch.zeros(1, 3, 9, 9, device="meta"), torch.zeros(1, 3, 9, 9), "cpu, got meta and cpu"),
    ],
)
def test_images_that_cannot_be_compared_are_refused(metric, a, b, message):
    with pytest.raises(OptionError, match=message):
        metric(a, b)


def test_ms_ssim_equals_torchmetrics_at_five_scales_and_takes_smaller_images():
    a = torch.rand(2, 3, 176, 180) * 2 - 1
    b = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)
    reference = partial(multiscale_structural_similarity_index_measure, data_range=1.0, reduction="none")
    similarity = reference((a + 1) / 2, (b + 1) / 2)
    assert torch.allclose(MSSSIM()(a, b), 1 - similarity, atol=1e-6)
    for side in (11, 21, 22, 44, 88):
        assert 0 < MSSSIM()(a[..., :side, :side], b[..., :side, :side]).min() < 1
    with pytest.raises(OptionError, match="at least 11x11 pixels, got 10x64"):
        MSSSIM()(torch.zeros(1, 3, 10, 64), torch.zeros(1, 3, 10, 64))


def test_a_missing_package_is_answered_with_the_pip_line(monkeypatch):
    for package in ("torchmetrics", "torchmetrics.functional", "torchmetrics.functional.image"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'retroexit\[metrics\]'"):
        MSSSIM()
    with pytest.raises(OptionError, match="no LPIPS network 'resnet'"):
        LPIPS("resnet")
