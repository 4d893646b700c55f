"""Figures: valid SVG with the numbers; densities equal those of scipy."""

import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from scipy import stats

from retroexit.errors import MissingExtraError, OptionError
from retroexit.report import figures


def texts(svg):
    """All texts of an SVG, in order; fails if it is not well-formed."""
    root = ElementTree.fromstring(svg)
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


DRAWINGS = [figures.quality_per_exit, figures.quality_against_compute, figures.predictor_enforcement]
DRAWINGS += [figures.difficulty_against_distance, lambda e: figures.distribution_over_exits(e, [0.05, 0.1])]
SHAPES = [{}, {"samples": 1, "branches": 1}, {"samples": 30, "branches": 8}, {"samples": 4, "distance": np.ones(4)}]
LOSSLESS = {"samples": 4, "branches": 2, "loss": np.zeros((4, 2)), "predicted": np.zeros((4, 2))}


@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.parametrize("shape", [*SHAPES, LOSSLESS])
def test_every_figure_is_drawn_for_any_evaluation(make_evaluation, draw, shape):
    svg = draw(make_evaluation(**shape))
    assert svg == draw(make_evaluation(**shape))
    shown = texts(svg)
    assert any("LPIPS (alex)" in text for text in shown)
    assert not any("nan" in text for text in shown)


def test_the_distribution_names_thresholds_exits_and_units_and_has_a_bar_per_exit_taken(make_evaluation):
    shown = texts(figures.distribution_over_exits(make_evaluation(), [0.05, 0.1]))
    assert {"0.05", "0.1", "exit 1", "exit 2", "exit 3", "backbone", "samples (%)"} <= set(shown)
    assert "mean GMACs per sample" in shown
    assert "threshold, LPIPS (alex)" in shown
    e = make_evaluation(samples=3, branches=2, loss=np.full((3, 2), 0.2), predicted=np.full((3, 2), 0.2))
    heights = []
    root = ElementTree.fromstring(figures.distribution_over_exits(e, [0.1, 0.3]))
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        if "stroke: #ffffff" in path.get("style", "") and path.get("clip-path") and "z" in path.get("d"):
            ys = [float(number) for number in path.get("d").split() if number not in "MLz"][1::2]
            heights.append(max(ys) - min(ys))
    # Below every prediction all go to the backbone, above all to exit 1: the order is exit by exit.
    assert [round(height / max(heights), 3) for height in heights] == [0, 1, 0, 0, 1, 0]


def test_figures_need_their_numbers_and_matplotlib(make_evaluation, monkeypatch):
    usual, unpredicted = make_evaluation(), make_evaluation(predicted=None)
    assert "without guide" in texts(figures.quality_per_exit(usual, make_evaluation(seed=1)))
    with pytest.raises(OptionError, match="unguided needs 3 exits, got 2"):
        figures.quality_per_exit(usual, make_evaluation(branches=2))
    shown = texts(figures.quality_against_compute(unpredicted))
    assert "routed, perfect prediction" in shown and "routed" not in shown
    with pytest.raises(OptionError, match="there are no predicted losses"):
        figures.predictor_enforcement(unpredicted)
    with pytest.raises(OptionError, match="has no distances"):
        figures.difficulty_against_distance(make_evaluation(distance=None))
    svg = figures.difficulty_against_distance(unpredicted, 0.05)
    assert "exits taken at threshold 0.05" in texts(svg)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'retroexit\[report\]'"):
        figures.quality_per_exit(usual)


def test_a_density_equals_scipys_or_is_a_peak_of_area_one(make_evaluation):
    samples, grid = make_evaluation().loss[:, 0], np.linspace(-0.2, 0.6, 300)
    for bandwidth in (0.3, 0.5):
        expected = stats.gaussian_kde(samples, bw_method=bandwidth)(grid)
        assert figures.density(samples, grid, bandwidth) == pytest.approx(expected, abs=1e-9)
    grid = np.linspace(0, 1, 401)
    curve = figures.density(np.full(5, 0.5), grid)
    assert grid[curve.argmax()] == pytest.approx(0.5)
    assert np.trapezoid(curve, grid) == pytest.approx(1, abs=1e-6)


def test_metrics_are_named_for_readers():
    labels = {"lpips-vgg": "LPIPS (vgg)", "ms-ssim": "MS-SSIM loss", "my-own": "my-own"}
    assert {name: figures.metric_label({"name": name}) for name in labels} == labels
    assert figures.metric_label({}) == "loss"
