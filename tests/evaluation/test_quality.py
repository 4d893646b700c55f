"""Quality metrics: reference values, where weights come from, ranges, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
import sys
import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from retroexit.core.images import ImageRange, measure_range
from retroexit.errors import MissingExtraError, OptionError, OutputError, WeightsError
from retroexit.metrics import weights as weights_module
from retroexit.metrics.base import LPIPS, MSSSIM, QualityMetric


def random_backbone(net: str = "squeeze") -> dict[str, Tensor]:
    """Made-up convolutions under torchvision's names."""
    names = weights_module.empty_lpips(net).net.state_dict()
    return {f"features.{k.partition('.')[2]}": torch.randn(v.shape) * 0.1 for k, v in names.items()}


@pytest.fixture
def weight_file(tmp_path: Path) -> Path:
    path = tmp_path / "squeeze.pth"
    torch.save(random_backbone(), path)
    return path


@pytest.fixture
def metric(weight_file: Path) -> LPIPS:
    return LPIPS("squeeze", weight_file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, and no network."""

    def no_network(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(("net", "want"), [("alex", (0.72188, 0.13757)), ("squeeze", (0.71105, 0.14790))])
def test_lpips_gives_the_published_values(shared: Path, net: str, want: tuple[float, float]) -> None:
    folder = shared / "data" / "weights"

    def load(name: str) -> Tensor:
        pixels = np.array(Image.open(folder / "lpips_ref" / name))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1

    metric = LPIPS(net, folder / f"lpips_{net}_v0.1.pth")
    reference = load("ex_ref.png")
    pairs = torch.cat([load("ex_p0.png"), load("ex_p1.png")])
    got = metric(reference.expand(2, -1, -1, -1), pairs)
    assert got.tolist() == pytest.approx(want, abs=1e-4)


def test_lpips_equals_the_lpips_package_on_the_same_weights(metric: LPIPS) -> None:
    a, b = torch.rand(2, 3, 40, 33) * 2 - 1, torch.rand(2, 3, 40, 33) * 2 - 1
    assert torch.allclose(metric(a, b), metric._network(a, b).flatten(), atol=1e-6)


def test_a_loss_is_zero_for_equal_images_and_one_number_per_sample(metric: LPIPS) -> None:
    a, b = torch.rand(3, 3, 64, 64) * 2 - 1, torch.rand(3, 3, 64, 64) * 2 - 1
    for m in (metric, MSSSIM()):
        assert m(a, a).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
        together, alone = m(a, b), torch.cat([m(a[i : i + 1], b[i : i + 1]) for i in range(3)])
        assert together.shape == (3,)
        assert torch.allclose(together, alone, atol=1e-6)
        assert (together > 0.01).all()


def test_one_channel_counts_as_grey(metric: LPIPS) -> None:
    a, b = torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32)
    assert torch.equal(metric(a, b), metric(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_the_gradient_reaches_the_images_and_not_the_weights(metric: LPIPS) -> None:
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    metric(image, torch.rand(1, 3, 32, 32)).sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in metric.parameters())


def test_the_gradient_is_finite_where_every_feature_is_zero(tmp_path: Path) -> None:
    dead = {k: torch.zeros_like(v) for k, v in random_backbone().items()}
    torch.save(dead, tmp_path / "dead.pth")
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    LPIPS("squeeze", tmp_path / "dead.pth")(image, torch.rand(1, 3, 32, 32)).sum().backward()
    assert image.grad is not None and image.grad.isfinite().all()


def test_a_metric_inside_a_training_module_stays_deterministic(metric: LPIPS) -> None:
    nn.ModuleList([metric]).train()
    a, b = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    assert not metric.training and torch.equal(metric(a, b), metric(a, b))


def test_building_lpips_is_silent_and_draws_no_random_numbers(
    weight_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LPIPS("squeeze", weight_file)
    assert torch.equal(state, torch.get_rng_state())
    assert capsys.readouterr() == ("", "")


def test_both_file_layouts_give_the_same_metric_and_hash(weight_file: Path, tmp_path: Path) -> None:
    plain = LPIPS("squeeze", weight_file)
    heads = {k: v for k, v in plain._network.state_dict().items() if k[:3] == "lin" and k[:4] != "lins"}
    torch.save({"backbone": torch.load(weight_file), "lin": heads}, tmp_path / "both.pth")
    both = LPIPS("squeeze", tmp_path / "both.pth")
    assert both.describe()["sha256"] == plain.describe()["sha256"]
    heads["lin0.model.1.weight"] = heads["lin0.model.1.weight"] * 2
    torch.save({"backbone": torch.load(weight_file), "lin": heads}, tmp_path / "other.pth")
    assert LPIPS("squeeze", tmp_path / "other.pth").describe()["sha256"] != plain.describe()["sha256"]


def test_describe_names_the_net_and_the_versions(metric: LPIPS) -> None:
    facts = metric.describe()
    assert (facts["name"], facts["net"], facts["file"]) == ("lpips-squeeze", "squeeze", "squeeze.pth")
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert set(facts["versions"]) == {"lpips", "torch", "torchvision"}


def test_missing_weights_name_file_place_and_address(hub: Path) -> None:
    with pytest.raises(WeightsError, match=r"alexnet-owt-7be5be79\.pth.*no route to host") as caught:
        LPIPS("alex")
    assert str(hub) in str(caught.value)
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in str(caught.value)


def test_a_cached_file_is_used_only_if_its_hash_is_the_one_in_its_name(
    hub: Path, weight_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hashlib.sha256(weight_file.read_bytes()).hexdigest()[:8]
    hub.mkdir(parents=True)
    for name in (f"made-up-{found}.pth", "made-up-00000000.pth"):
        (hub / name).write_bytes(weight_file.read_bytes())
    monkeypatch.setattr(
        weights_module, "_hub_address", lambda net: f"https://example.org/made-up-{found}.pth"
    )
    assert LPIPS("squeeze").describe() == {
        **LPIPS("squeeze", weight_file).describe(),
        "file": f"made-up-{found}.pth",
    }
    monkeypatch.setattr(
        weights_module, "_hub_address", lambda net: "https://example.org/made-up-00000000.pth"
    )
    with pytest.raises(
        WeightsError, match=rf"damaged: its sha256 starts with {found}, its name says 00000000"
    ):
        LPIPS("squeeze")


def test_a_download_is_checked_and_then_used(
    hub: Path, weight_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hashlib.sha256(weight_file.read_bytes()).hexdigest()[:8]

    def fetch(url: str, target: str, hash_prefix: str, progress: bool) -> None:
        assert hash_prefix == found and not progress
        Path(target).write_bytes(weight_file.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr(
        weights_module, "_hub_address", lambda net: f"https://example.org/made-up-{found}.pth"
    )
    assert LPIPS("squeeze").describe()["file"] == f"made-up-{found}.pth"
    assert (hub / f"made-up-{found}.pth").is_file()


def test_wrong_explicit_files_are_refused(weight_file: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weight file at .*absent\.pth"):
        LPIPS("alex", tmp_path / "absent.pth")
    with pytest.raises(
        WeightsError, match=r"features\.0\.weight should be \(64, 3, 11, 11\), found \(64, 3, 3, 3\)"
    ):
        LPIPS("alex", weight_file)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"features\.0\.bias should be \(64,\), found nothing"):
        LPIPS("squeeze", tmp_path / "part.pth")
    (tmp_path / "noise.pth").write_bytes(b"not a weight file")
    with pytest.raises(WeightsError, match="no weight file that torch can read"):
        LPIPS("squeeze", tmp_path / "noise.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list"):
        LPIPS("squeeze", tmp_path / "list.pth")


def test_code_in_a_weight_file_does_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    torch.save({"backbone": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(WeightsError, match="read safely"):
        LPIPS("squeeze", tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 40), r"\(1, 3, 32, 32\) and \(1, 3, 32, 40\)"),
        (torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32), r"\(N, 1, H, W\), found \(1, 4, 32, 32\)"),
        (torch.zeros(3, 32, 32), torch.zeros(3, 32, 32), r"found \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32).byte(), torch.zeros(1, 3, 32, 32).byte(), "found torch.uint8"),
        (torch.zeros(1, 3, 16, 64), torch.zeros(1, 3, 16, 64), "at least 17x17 pixels, found 16x64"),
        (
            torch.zeros(1, 3, 32, 32, device="meta"),
            torch.zeros(1, 3, 32, 32),
            "meta and cpu, lpips-squeeze on cpu",
        ),
    ],
)
def test_images_it_cannot_compare_are_refused(metric: LPIPS, a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        metric(a, b)


@pytest.mark.parametrize(("net", "smallest"), [("alex", 31), ("squeeze", 17), ("vgg", 16)])
def test_the_smallest_size_is_where_the_network_still_works(net: str, smallest: int) -> None:
    trunk = weights_module.empty_lpips(net).net  # shapes are enough: everything stays on the meta device
    trunk(torch.zeros(1, 3, smallest, 40, device="meta"))
    with pytest.raises(RuntimeError):
        trunk(torch.zeros(1, 3, smallest - 1, 40, device="meta"))


def test_ms_ssim_equals_torchmetrics_at_five_scales() -> None:
    a = torch.rand(2, 3, 176, 180) * 2 - 1
    b = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)
    want = multiscale_structural_similarity_index_measure(
        (a + 1) / 2, (b + 1) / 2, data_range=1.0, reduction="none"
    )
    assert torch.allclose(MSSSIM()(a, b), 1 - want, atol=1e-6)


@pytest.mark.parametrize(
    ("side", "scales"), [(11, 1), (21, 1), (22, 2), (44, 3), (88, 4), (176, 5), (512, 5)]
)
def test_ms_ssim_uses_as_many_scales_as_fit_and_says_so(side: int, scales: int) -> None:
    facts = MSSSIM().describe((side, 600))
    assert facts["scales"] == scales
    assert sum(facts["weights"]) == pytest.approx(1, abs=1e-3)
    if side <= 176:
        assert MSSSIM()(torch.rand(1, 3, side, side), torch.rand(1, 3, side, side)).isfinite().all()


def test_ms_ssim_has_a_finite_gradient_for_opposite_images() -> None:
    image = (torch.rand(1, 3, 44, 44) * 2 - 1).requires_grad_()
    loss = MSSSIM()(image, -image.detach())
    loss.sum().backward()
    assert loss.item() == pytest.approx(1, abs=0.05)
    assert image.grad is not None and image.grad.isfinite().all()


def test_ms_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(OptionError, match="at least 11x11 pixels, found 10x64"):
        MSSSIM()(torch.zeros(1, 3, 10, 64), torch.zeros(1, 3, 10, 64))


@pytest.mark.parametrize("metric_type", [MSSSIM, lambda: LPIPS("squeeze", "unused.pth")])
def test_an_absent_package_is_answered_with_the_pip_line(
    metric_type: type[QualityMetric], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("torchmetrics", "torchmetrics.functional", "torchmetrics.functional.image", "lpips"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install ('retroexit\[metrics\]'|lpips)"):
        metric_type()


def test_an_unknown_lpips_network_is_refused() -> None:
    with pytest.raises(OptionError, match="no LPIPS network 'resnet'"):
        LPIPS("resnet")


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0.0, 1.0, (0, 1)),
        (-0.08, 1.07, (0, 1)),
        (0.2, 0.6, (0, 1)),
        (-1.0, 1.0, (-1, 1)),
        (-1.05, 1.02, (-1, 1)),
        (-0.9, 0.1, (-1, 1)),
        (-1.2, 1.25, (-1, 1)),
        (0.0, 255.0, (0, 255)),
        (-3.0, 262.0, (0, 255)),
    ],
)
def test_the_range_is_told_from_a_real_image(low: float, high: float, want: tuple[float, float]) -> None:
    image = torch.linspace(low, high, 3 * 32 * 32).reshape(1, 3, 32, 32)
    found = measure_range(image)
    assert (found.low, found.high) == want


def test_a_few_wild_pixels_do_not_decide_the_range() -> None:
    image = torch.linspace(0, 1, 30_000)
    image[:10] = 1.6
    assert measure_range(image) == ImageRange(0.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (-0.05, 0.05, r"minimum -0\.05 and maximum 0\.05.*image_range=\(low, high\)"),
        (-0.3, 1.2, r"minimum -0\.3 and maximum 1\.2"),
        (0.0, 5.0, "maximum 5"),
        (-3.0, 3.0, "minimum -3"),
        (0.5, 0.5, "minimum 0.5"),
        (0.0, float("nan"), "NaN"),
        (0.0, 1000.0, "maximum 1000"),
    ],
)
def test_an_unclear_range_is_an_error_that_shows_the_extremes(low: float, high: float, message: str) -> None:
    with pytest.raises(OutputError, match=message):
        measure_range(torch.linspace(low, high, 3072))


def test_bytes_are_recognised_by_their_type() -> None:
    assert measure_range(torch.zeros(2, 2, dtype=torch.uint8)) == ImageRange(0.0, 255.0)


def test_to_signed_maps_the_ends_to_minus_one_and_one() -> None:
    for low, high in ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), (-2.0, 5.0)):
        x = torch.tensor([low, (low + high) / 2, high, high + (high - low) / 2])
        assert ImageRange(low, high).to_signed(x).tolist() == pytest.approx([-1, 0, 1, 2], abs=1e-6)


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(OptionError, match=r"low < high, got \(1, 0\)"):
        ImageRange(1, 0)


def test_a_target_compared_in_turn_is_looked_at_once(metric: LPIPS) -> None:
    calls: list[int] = []
    hook = metric._network.net.register_forward_hook(lambda *_: calls.append(1))
    target, images = torch.rand(2, 3, 32, 32), torch.rand(3, 2, 3, 32, 32)
    found = [metric(image, target) for image in images]
    assert len(calls) == 4
    hook.remove()
    assert all(torch.equal(a, metric(image, target.clone())) for a, image in zip(found, images, strict=True))
    target.mul_(0.5)  # other values in the same tensor are another target
    assert torch.equal(metric(images[0], target), metric(images[0], target.clone()))
    assert not torch.equal(metric(images[0], target), found[0])
    copied = pickle.loads(pickle.dumps(metric))
    assert torch.equal(copied(images[0], target), metric(images[0], target))


def test_gradients_reach_both_images_though_a_target_is_remembered(metric: LPIPS) -> None:
    image, target = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    metric(image, target)
    target.requires_grad_()
    metric(image, target).sum().backward()
    assert target.grad is not None and bool(target.grad.any())
