"""Cutting maps into patches and gluing patches into maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retroexit.errors import OptionError
from retroexit.guidance import cut, glue


def uncut(rows: Tensor, channels: int, patch: tuple[int, ...]) -> Tensor:
    """Bring rows of `cut` into the channels-last layout that `glue` takes."""
    grid = rows.shape[:-1]
    return rows.reshape(*grid, channels, *patch).movedim(len(grid), -1)


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((2, 3, 4, 6), (1, 1)),
        ((2, 3, 4, 6), (2, 3)),
        ((1, 5, 4, 6), (4, 6)),
        ((2, 3, 12), (4,)),
        ((2, 3, 4, 2, 6), (2, 1, 3)),
    ],
)
def test_cut_patches_are_glued_to_the_same_map(shape, patch) -> None:
    x = torch.randn(shape)
    rows = cut(x, patch)
    assert torch.equal(glue(uncut(rows, shape[1], patch)), x)


def test_cut_equals_a_loop_over_patches() -> None:
    x = torch.randn(2, 3, 4, 6).contiguous(memory_format=torch.channels_last)
    rows = cut(x, (2, 3))
    assert rows.shape == (2, 2, 2, 18)
    for n in range(2):
        for i in range(2):
            for j in range(2):
                patch = x[n, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
                assert torch.equal(rows[n, i, j], patch.flatten())


@pytest.mark.parametrize(
    ("shape", "patch", "message"),
    [
        ((1, 2, 4, 6), (3, 2), r"patches of \(3, 2\) do not divide a map of \(4, 6\)"),
        ((1, 2, 4, 6), (2,), r"a feature \(1, 2, 4, 6\), got \(2,\)"),
        ((1, 2, 4, 6), (0, 2), r"got \(0, 2\)"),
        ((1, 2), (), r"a feature \(1, 2\), got \(\)"),
    ],
)
def test_patches_that_do_not_fit_are_refused(shape, patch, message) -> None:
    with pytest.raises(OptionError, match=message):
        cut(torch.zeros(shape), patch)


def test_values_without_a_grid_are_refused() -> None:
    with pytest.raises(OptionError, match=r"must have shape \(N, \*grid, \*patch, C\), got \(2, 3, 4\)"):
        glue(torch.zeros(2, 3, 4))
