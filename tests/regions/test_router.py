"""Images whose parts leave at different exits, against the images of whole exits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import retroexit
from retroexit.errors import CheckpointError, OptionError, RegionError, TrainingError
from retroexit.model import EarlyExitGenerator
from retroexit.regions.predictor import TilePredictor
from retroexit.regions.router import RegionRouter
from retroexit.retrieval.storage import self_digest
from retroexit.routing.predictor import Predictor
from retroexit.training.predictor import train_predictor

# Hard tiles in the middle of the first image, at the right of the second; the third is easy, the fourth hard.
HARD = torch.zeros(4, 5, 7, dtype=torch.bool)
HARD[0, 1:3, 2:4], HARD[1, :, 5:], HARD[3] = True, True, True


class _Two(nn.Module):
    """A decoder that returns more than its image, and counts how often its last stage runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.calls = nn.Conv2d(4, 12, 1), 0
        self.stages = nn.ModuleList([nn.Conv2d(12, 12, 3, padding=1) for _ in range(4)])
        self.style, self.rgb = nn.Linear(5, 12), nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, z: Tensor, w: Tensor) -> dict[str, Tensor]:
        h = self.stem(z)
        for i, stage in enumerate(self.stages):
            h = nn.functional.interpolate(h, scale_factor=2.0) if i in (1, 3) else h
            h = torch.relu(stage(h)) * (1 + self.style(w)[:, :, None, None])
        return {"image": torch.tanh(self.rgb(h)), "style": w * 2}


@pytest.fixture
def model() -> EarlyExitGenerator:
    """Exits after two stages; images of 36 x 52 in tiles of 8, the last ones of 4."""
    torch.manual_seed(0)
    return retroexit.wrap(
        _Two().eval(),
        ["stages.0", "stages.2"],
        0.5,
        min_channels=4,
        init="scratch",
        image="image",
        example_inputs=(torch.rand(4, 4, 9, 13), torch.rand(4, 5)),
    )


def _losses(easy: tuple[float, float] = (0.0, 0.0), hard: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    return torch.stack([torch.where(HARD, h, e) for e, h in zip(easy, hard, strict=True)], 1).float()


def _inputs(rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(rows, 4, 9, 13, generator=generator), torch.rand(rows, 5, generator=generator)


@pytest.mark.parametrize("goal", [True, "tiles"])
@pytest.mark.parametrize(("easy", "hard"), [((0.0, 0.0), (1.0, 1.0)), ((0.0, 0.0), (1.0, 0.0))])
def test_every_tile_is_that_of_the_exit_that_made_it(
    model: EarlyExitGenerator, told: Any, goal: Any, easy: Any, hard: Any
) -> None:
    model.regions = told(_losses(easy, hard), 8)
    args = _inputs()
    exits = [out["image"] for out in model.all_exits(*args)]
    output, where = model.routed(*args, threshold=0.01, regions=goal)
    assert output["image"].shape == (4, 3, 36, 52) and where.shape == (4, 5, 7)
    assert torch.equal(output["style"], args[1] * 2)
    for row, rows, columns in ((r, i, j) for r in range(4) for i in range(5) for j in range(7)):
        place = (row, slice(None), slice(8 * rows, 8 * rows + 8), slice(8 * columns, 8 * columns + 8))
        assert torch.allclose(output["image"][place], exits[where[row, rows, columns] - 1][place], atol=1e-5)
    assert bool((where[2] == 1).all()) and len(where[3].unique()) == 1
    assert int(where[0].min()) == 1 and bool((where[0][HARD[0]] > 1).all())
    assert len(where.unique()) > 1


def test_a_batch_with_regions_equals_its_samples_alone(model: EarlyExitGenerator, told: Any) -> None:
    args, losses = _inputs(), _losses((0.0, 0.0), (1.0, 0.3))
    model.regions = told(losses, 8)
    together, where = model.routed(*args, threshold=0.02, regions=True)
    for row in range(4):
        model.regions = told(losses[row : row + 1], 8)
        alone, own = model.routed(*(arg[row : row + 1] for arg in args), threshold=0.02, regions=True)
        assert torch.equal(own[0], where[row])
        assert torch.allclose(alone["image"][0], together["image"][row], atol=1e-5)


def test_what_a_call_costs_is_what_was_planned(model: EarlyExitGenerator, told: Any) -> None:
    model.regions = told(_losses((0.0, 0.0), (1.0, 0.5)), 8)
    args = _inputs()
    layouts, _ = model.regions.plan(model, *args, threshold=0.02)
    model(*args, threshold=0.02, regions=True)
    with FlopCounterMode(display=False) as counter:
        model(*args, threshold=0.02, regions=True)
    assert sum(bool(layout.parts) for layout in layouts) >= 2
    # The style's own layer stands in no relation to the windows; it is not a hundredth of the rest.
    assert sum(layout.macs for layout in layouts) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def test_inputs_of_another_size_are_planned_anew(model: EarlyExitGenerator, told: Any) -> None:
    args = (torch.rand(1, 4, 12, 8), torch.rand(1, 5))
    losses = torch.zeros(1, 2, 6, 4)
    losses[0, :, :2, :2] = 1
    model.regions = told(losses, 8)
    exits = [out["image"] for out in model.all_exits(*args)]
    image = model(*args, threshold=0.0, regions=True)["image"]
    assert torch.allclose(image[..., :16, :16], exits[-1][..., :16, :16], atol=1e-5)
    assert image.shape == (1, 3, 48, 32)


def test_a_threshold_of_zero_on_hard_images_is_the_backbone(model: EarlyExitGenerator, told: Any) -> None:
    model.regions = told(torch.ones(4, 2, 5, 7), 8)
    args = _inputs()
    output, where = model.routed(*args, threshold=0.0, regions=True)
    assert torch.allclose(output["image"], model(*args)["image"], atol=1e-6)
    assert bool((where == 3).all())


def test_rendering_with_regions_leaves_no_trace_on_the_generator(
    model: EarlyExitGenerator, told: Any, untouched: Any
) -> None:
    model.regions = told(_losses(), 8)
    with untouched(model.generator):
        model(*_inputs(), threshold=0.01, regions=True)


def test_calls_that_cannot_be_answered_say_why(model: EarlyExitGenerator, told: Any) -> None:
    with pytest.raises(TrainingError, match="no tile predictor. Fit with retroexit.fit"):
        model(*_inputs(), threshold=0.1, regions=True)
    model.regions = told(_losses(), 8)
    with pytest.raises(OptionError, match="regions=True; found no threshold"):
        model(*_inputs(), regions=True)
    with pytest.raises(OptionError, match="regions='most'"):
        model(*_inputs(), threshold=0.1, regions="most")
    with pytest.raises(OptionError, match="regions=True.*exit=1"):
        model(*_inputs(), exit=1, threshold=None, regions=True)


def test_a_decoder_with_a_norm_over_space_is_refused_at_the_call(told: Any) -> None:
    generator = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 3, 3, padding=1),
    )
    args = (torch.rand(1, 4, 8, 8),)
    model = retroexit.wrap(generator.eval(), ["0"], 0.5, min_channels=2, example_inputs=args)
    model.regions = told(torch.ones(1, 1, 2, 2), 8)
    with pytest.raises(RegionError, match=r"2 \(GroupNorm\).* sees the whole map at once"):
        model(*args, threshold=0.1, regions=True)


def test_the_tile_predictor_is_saved_with_the_model(model: EarlyExitGenerator, tmp_path: Path) -> None:
    predictor = TilePredictor(12, 2, tile=8)
    predictor.calibrate_scales(torch.rand(3, 12, 9, 13), torch.rand(3, 2, 5, 7))
    model.regions = RegionRouter(predictor)
    model.regions.about = {"tile_error": [0.1, 0.2]}
    args, folder = _inputs(), model.save(tmp_path / "model")
    image, where = model.routed(*args, threshold=0.4, regions=True)
    again = retroexit.load(folder, copy.deepcopy(model.generator))
    loaded, exits = again.routed(*args, threshold=0.4, regions=True)
    assert torch.equal(where, exits) and torch.equal(image["image"], loaded["image"])
    assert again.regions is not None and again.regions.about == {"tile_error": [0.1, 0.2]}
    manifest = json.loads((folder / "model.json").read_text())
    manifest["regions"]["width"] = 25
    (folder / "model.json").write_text(json.dumps(manifest | {"digest": self_digest(manifest)}))
    with pytest.raises(CheckpointError, match="a predictor that does not fit"):
        retroexit.load(folder, copy.deepcopy(model.generator))


class _Named(nn.Module):
    """A decoder whose output holds its image and a word."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)])
        self.rgb = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, z: Tensor) -> dict[str, Any]:
        h = torch.relu(self.stages[0](z))
        h = torch.relu(self.stages[1](nn.functional.interpolate(h, scale_factor=2.0)))
        return {"image": torch.tanh(self.rgb(h)), "kind": "street"}


def test_an_output_made_of_parts_keeps_what_is_no_tensor(told: Any) -> None:
    torch.manual_seed(0)
    args = (torch.rand(1, 4, 24, 40),)
    model = retroexit.wrap(_Named().eval(), ["stages.0"], 0.5, min_channels=4, example_inputs=args)
    losses = torch.full((1, 1, 6, 10), 0.1)
    losses[..., 5:] = 1.0
    model.regions = told(losses, 8)
    output, where = model.routed(*args, threshold=0.2, regions=True)
    assert output["kind"] == "street" and len(where.unique()) == 2
    backbone = model(*args)["image"]
    deep = (where[0] == 2).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.allclose(output["image"][0][:, deep], backbone[0][:, deep], atol=1e-5)
    assert not torch.allclose(output["image"], backbone, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3])
def test_an_image_may_be_put_together_of_parts_alone(wrapped: Any, told: Any, rows: int) -> None:
    model, _ = wrapped("nearest")
    generator = torch.Generator().manual_seed(1)
    args = (torch.rand(rows, 4, 24, 40, generator=generator),)
    losses = torch.full((rows, 2, 6, 10), 0.1)
    losses[0, :, :, 4:] = 1.0  # the first image is hard at the right, the others are easy all over
    model.regions = told(losses, 8)
    layouts, _ = model.regions.plan(model, *args, threshold=0.2)
    assert layouts[0].base is None and len(layouts[0].parts) == 2
    assert all(layout.base is not None and not layout.parts for layout in layouts[1:])
    exits = model.all_exits(*args)
    image, where = model.routed(*args, threshold=0.2, regions=True)
    assert image.shape == exits[-1].shape and len(where[0].unique()) == 2
    for row, i, j in ((r, i, j) for r in range(rows) for i in range(6) for j in range(10)):
        place = (row, slice(None), slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8))
        assert torch.allclose(image[place], exits[where[row, i, j] - 1][place], atol=1e-5)


@torch.no_grad()
def test_inputs_unlike_the_fitting_set_go_to_the_backbone_as_a_whole(
    model: EarlyExitGenerator, told: Any
) -> None:
    draw = torch.Generator().manual_seed(1)
    seen = (torch.rand(40, 4, 9, 13, generator=draw), torch.rand(40, 5, generator=draw))
    feature = model.split.crossing(model.split.begin(seen, {})[0], 0)[0]
    model.predictor = Predictor(feature.shape[1], exits=2)
    train_predictor(model.predictor, feature, torch.rand(40, 2) + 0.1, held_out=[], steps=2, progress=False)
    model.regions = told(_losses(), 8)
    maps, styles = _inputs()
    maps[1] *= -20
    image, where = model.routed(maps, styles, threshold=0.3, regions="tiles")
    assert bool((where[1] == 3).all()) and bool((where[0] < 3).any())
    torch.testing.assert_close(image["image"][1], model(maps, styles)["image"][1])
    assert (model.drift.seen, model.drift.count) == (4, 1)
    model.drift.enabled = False
    assert bool((model.routed(maps, styles, threshold=0.3, regions="tiles")[1][1] < 3).any())
