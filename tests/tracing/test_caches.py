"""Forwards that keep what they made for a size, or return maps under keys that they compute."""

import functools

import pytest
import torch
from torch import nn

import retroexit

WIDTHS = (32, 24, 16)
SHAPES = ((1, 8, 4, 4), (2, 8, 6, 4))


class _Coordinates(nn.Module):
    """Joins a grid of coordinates, which it keeps in some way, to the feature of every block."""

    def __init__(self, kept):
        super().__init__()
        self.kept, self.grids, self.grid = kept, {}, None
        self.register_buffer("slot", None, persistent=False)
        self.blocks = nn.ModuleList(
            nn.Conv2d(i + 2, o, 3, padding=1) for i, o in zip((8, *WIDTHS), WIDTHS, strict=False)
        )
        self.head = nn.Conv2d(WIDTHS[-1], 3, 1)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def small(self, h, w):
        return _grid(h, w)

    def look_up(self, x):
        h, w = x.shape[-2:]
        if self.kept == "dict":
            if (h, w) not in self.grids:
                self.grids[h, w] = _grid(h, w)
            return self.grids[h, w]
        if self.kept == "numbered buffer":
            name = f"grid_{h}x{w}"
            if not hasattr(self, name):
                self.register_buffer(name, _grid(h, w), persistent=False)
            return getattr(self, name)
        if self.kept == "lru_cache":
            return torch.stack(torch.broadcast_tensors(_line(h)[:, None], _line(w)))[None]
        if self.kept == "lru_cache of a method":
            return self.small(h, w)
        name = {"buffer": "slot", "attribute": "grid"}[self.kept]
        if getattr(self, name) is None or getattr(self, name).shape[-2:] != x.shape[-2:]:
            setattr(self, name, _grid(h, w))
        return getattr(self, name)

    def forward(self, x):
        for block in self.blocks:
            x = nn.functional.interpolate(x, scale_factor=2)
            x = torch.relu(block(torch.cat([x, self.look_up(x).expand(x.shape[0], -1, -1, -1)], 1)))
        return self.head(x)


@functools.cache
def _line(n):
    return torch.linspace(-1, 1, n)


def _grid(h, w):
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return torch.stack([rows, columns])[None]


@pytest.mark.parametrize("is_warm", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "kept", ["dict", "buffer", "numbered buffer", "attribute", "lru_cache", "lru_cache of a method"]
)
def test_a_grid_kept_by_size_is_made_anew_at_other_sizes(kept, is_warm, tmp_path):
    torch.manual_seed(0)
    generator, z, other = _Coordinates(kept).eval(), torch.randn(1, 8, 4, 4), torch.randn(2, 8, 6, 4)
    if is_warm:
        generator(z)
    model = retroexit.wrap(generator, [1, 2], 1.0, example_inputs=(z,))
    with torch.no_grad():
        expected = generator(other)
        assert all(map(torch.equal, model.all_exits(other), [expected] * 3))
        model.save(tmp_path / "model")
        loaded = retroexit.load(tmp_path / "model", generator, (z,))
        assert torch.equal(loaded(other, exit=1), expected)


@functools.lru_cache
def _waves(channels, h, w):
    return torch.arange(1.0, channels + 1)[:, None, None] * _line(h)[:, None] * _line(w)


class _Waves(nn.Module):
    """Adds positions that depend on the width inside of a stage."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv(nn.functional.interpolate(x, scale_factor=2))
        return torch.relu(x + _waves(*x.shape[1:]).sin())


@pytest.mark.parametrize("settings", [{"scale": 1.0}, {"scale": 1 / 4, "min_channels": 4}, {}])
def test_positions_under_lru_cache_fit_other_sizes_and_widths(settings):
    torch.manual_seed(0)
    layers = [_Waves(i, o) for i, o in zip((8, *WIDTHS), WIDTHS, strict=False)]
    generator, z, other = nn.Sequential(*layers, nn.Conv2d(WIDTHS[-1], 3, 1)).eval(), *map(torch.randn, SHAPES)
    model = retroexit.wrap(generator, [1, 2], example_inputs=(z,), **settings)
    with torch.no_grad():
        quick, middle, expected = model.all_exits(other)
        assert torch.equal(expected, generator(other))
        assert quick.shape == middle.shape == expected.shape
        torch.testing.assert_close(model(other[1:], exit=1), quick[1:])
    if "scale" in settings:
        assert model.exits[0].widths == ((24, 16, 3) if settings["scale"] == 1 else (6, 4, 3))


class _Named(nn.Module):
    """A side branch returns maps under their sizes."""

    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, o, 3, padding=1) for o in WIDTHS)

        def forward(self, x):
            maps = [conv(nn.functional.avg_pool2d(x, 2**i)) for conv, i in zip(self.convs, (2, 1, 0), strict=True)]
            return {str(tuple(m.shape)): m for m in maps}

    def __init__(self):
        super().__init__()
        self.side = self.Side()
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2), nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1)
            )
            for i, o in zip((8, *WIDTHS), WIDTHS, strict=False)
        )
        self.head = nn.Conv2d(WIDTHS[-1], 3, 1)

    def forward(self, z, image):
        maps = self.side(image)
        for up in self.up:
            z = up(z)
            z = z + maps[str(tuple(z.shape))]
        return self.head(z)


@pytest.mark.parametrize("scale", [1.0, 1 / 4])
def test_maps_under_computed_keys_are_found_at_other_sizes_and_widths(scale):
    torch.manual_seed(0)
    generator = _Named().eval()
    model = retroexit.wrap(
        generator, [1], scale, min_channels=4, example_inputs=(torch.randn(1, 8, 4, 4), torch.randn(1, 3, 32, 32))
    )
    other = (torch.randn(2, 8, 4, 6), torch.randn(2, 3, 32, 48))
    with torch.no_grad():
        expected, outputs = generator(*other), model.all_exits(*other)
    assert torch.equal(outputs[1], expected)
    assert outputs[0].shape == expected.shape
    assert scale < 1 or torch.equal(outputs[0], expected)
