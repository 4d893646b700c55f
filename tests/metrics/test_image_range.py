"""The value range of images."""

import pytest
import torch

from retroexit.core.samples import ImageRange, measure_range
from retroexit.errors import OptionError, OutputError


@pytest.mark.parametrize(
    ("low", "high", "expected"),
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
def test_the_range_is_measured_on_an_image(low, high, expected):
    image = torch.linspace(low, high, 3 * 32 * 32).reshape(1, 3, 32, 32)
    image[0, 0, 0, :2] = torch.tensor([low - 0.5 * (high - low), 1.6 * high])  # two outliers do not decide
    image_range = measure_range(image)
    assert (image_range.low, image_range.high) == expected


def test_bytes_are_recognised_by_their_type():
    assert measure_range(torch.zeros(2, 2, dtype=torch.uint8)) == ImageRange(0.0, 255.0)


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
def test_an_unclear_range_is_an_error_that_shows_the_extremes(low, high, message):
    with pytest.raises(OutputError, match=message):
        measure_range(torch.linspace(low, high, 3072))


def test_ranges_map_to_minus_one_and_one_and_back():
    for low, high in ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), (-2.0, 5.0)):
        x = torch.tensor([low, (low + high) / 2, high, high + (high - low) / 2])
        signed = ImageRange(low, high).to_signed(x)
        assert signed.tolist() == pytest.approx([-1, 0, 1, 2], abs=1e-6)
        assert ImageRange(low, high).from_signed(signed).tolist() == pytest.approx(x.tolist(), abs=1e-4)
    with pytest.raises(OptionError, match=r"low < high, got \(1, 0\)"):
        ImageRange(1, 0)
