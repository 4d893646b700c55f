"""The losses of tiles, and the predictor that is fitted to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.errors import OptionError, RegionError, TrainingError
from retroexit.evaluation.quality import LPIPS, QualityMetric
from retroexit.regions.fitting import fit_regions, tile_losses
from retroexit.regions.pictures import exit_colour, exit_map_picture
from retroexit.regions.tiles import areas, edges_of, over_tiles


class Squares(QualityMetric):
    """Mean squared difference, with or without a map."""

    name = "squares"

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))


class SquareMaps(Squares):
    def maps(self, a: Tensor, b: Tensor) -> list[Tensor]:
        return [(a - b).square().mean(1, keepdim=True)]


class Patchy(nn.Module):
    """Where the latent's first channel is large, wave upon wave goes into the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stages = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)])
        self.rgb = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.stem(z)
        for i, stage in enumerate(self.stages):
            h = nn.functional.interpolate(h, scale_factor=2.0) if i == 1 else h
            h = torch.sin(3 * stage(h)) * nn.functional.interpolate(z[:, :1], size=h.shape[2:])
        return torch.tanh(self.rgb(h))


def _latents(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    z = torch.rand(count, 3, 8, 12, generator=generator)
    rough = torch.rand(count, 1, 2, 3, generator=generator).square()
    z[:, :1] = nn.functional.interpolate(rough, size=(8, 12)) * 2
    return z


@pytest.mark.parametrize("metric", [Squares(), SquareMaps()])
def test_losses_of_tiles_sum_to_the_loss_of_the_image(metric: QualityMetric) -> None:
    a, b = torch.rand(2, 3, 40, 56), torch.rand(2, 3, 40, 56)
    b[1, :, :16, :16] = a[1, :, :16, :16]
    edges = edges_of((40, 56), 16)
    found = tile_losses(metric, a, b, edges)
    assert torch.allclose((found * areas(edges)).sum((1, 2)), metric(a, b), atol=1e-6)
    assert found.shape == (2, 3, 4) and float(found[1, 0, 0]) == float(found[1].min())
    if hasattr(metric, "maps"):
        assert torch.allclose(
            found, over_tiles((a - b).square().mean(1, keepdim=True), edges)[:, 0], atol=1e-6
        )
        assert float(found[1, 0, 0]) == 0


def test_lpips_of_tiles_sums_to_lpips_of_the_image(shared: Path) -> None:
    metric = LPIPS("alex", shared / "data/weights/lpips_alex_v0.1.pth")
    a, b = torch.rand(2, 3, 64, 96) * 2 - 1, torch.rand(2, 3, 64, 96) * 2 - 1
    edges = edges_of((64, 96), 32)
    found = tile_losses(metric, a, b, edges)
    assert torch.allclose((found * areas(edges)).sum((1, 2)), metric(a, b), atol=1e-5)
    assert torch.allclose(metric(a, b), metric._network(a, b).flatten(), atol=1e-5)


def test_a_fitted_model_keeps_its_threshold_where_images_are_patchy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = Patchy().eval()
    model = retroexit.wrap(
        generator, [2], 0.25, min_channels=4, image_range=(-1.0, 1.0), example_inputs=(_latents(1),)
    )
    inputs, metric = _latents(60), SquareMaps()
    with pytest.raises(TrainingError, match="not fitted"):
        fit_regions(model, inputs, tmp_path, metric)
    retroexit.fit(model, inputs, tmp_path, metric=metric, progress=False, steps=30, predictor_steps=20)
    router = fit_regions(model, inputs, tmp_path, metric, tile=4, steps=300, progress=False)
    assert router is model.regions and min(router.about["rank_correlation"]) > 0.7
    test = _latents(70)[60:]
    wanted = model(test).detach()
    lost = float(metric(model(test, exit=1), wanted).mean().detach())
    image, where = model.routed(test, threshold=lost / 2, regions=True)
    layouts, canvas = router.plan(model, test, threshold=lost / 2)
    for layout, own in zip(layouts, where, strict=True):
        assert layout.macs <= canvas.prices.fixed(int(own.max()) - 1)  # as one exit for all of it would cost
    assert where.shape == (10, 4, 6)
    assert float(metric(image, wanted).mean()) < 0.6 * lost
    report = tmp_path / "report"
    retroexit.evaluate(model, test[:3], report, metric=metric, progress=False, repeats=0)
    text = (report / "report.html").read_text()
    assert text.count("exits inside the image (sample") == 2 and "of the compute" in text
    loaded = retroexit.load(tmp_path, generator, example_inputs=(_latents(1),))
    assert torch.equal(loaded.routed(test, threshold=lost / 2, regions=True)[1], where)


def test_regions_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    generator = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.InstanceNorm2d(8),
        nn.Conv2d(8, 3, 3, padding=1),
    )
    model = retroexit.wrap(generator.eval(), ["0"], 0.5, min_channels=2, example_inputs=(_latents(1),))
    model.about = {"fit": {}}
    with pytest.raises(RegionError, match=r"2 \(InstanceNorm2d\)"):
        fit_regions(model, _latents(4), tmp_path, SquareMaps())
    assert list(tmp_path.iterdir()) == [] and model.regions is None
    with pytest.raises(OptionError, match="tile=0"):
        fit_regions(model, _latents(4), tmp_path, SquareMaps(), tile=0)


def test_regions_of_anything_but_pictures_cannot_be_fitted(wrapped: Any, tmp_path: Path) -> None:
    model, _ = wrapped("one dimension")
    model.about = {"fit": {}}
    with pytest.raises(OptionError, match="anything but pictures"):
        fit_regions(model, torch.rand(3, 4, 40), tmp_path, SquareMaps())


def test_a_heat_map_shows_every_tile_in_the_colour_of_its_exit() -> None:
    edges = edges_of((8, 10), 4)
    exits = torch.tensor([[1, 2, 3], [3, 3, 1]])
    picture = exit_map_picture(torch.full((3, 8, 10), -1.0), exits, edges, 3, strength=1.0)
    assert picture.shape == (8, 10, 3)
    assert tuple(picture[0, 0]) == exit_colour(1, 3) and tuple(picture[3, 7]) == exit_colour(2, 3)
    assert tuple(picture[4, 0]) == exit_colour(3, 3) and tuple(picture[7, 9]) == exit_colour(1, 3)
    assert len({exit_colour(n, 6) for n in range(1, 7)}) == 6
