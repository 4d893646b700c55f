"""Windows of images against parts of whole images; reach against gradients, costs against a counter."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from retroexit.model import EarlyExitGenerator
from retroexit.regions.locality import find_locality
from retroexit.regions.windows import Extents, Route, measure_extents

_spec = importlib.util.spec_from_file_location("region_decoders", Path(__file__).with_name("conftest.py"))
assert _spec is not None and _spec.loader is not None
decoders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(decoders)


def _states(model: EarlyExitGenerator, args: tuple[Tensor, ...]) -> list[dict[Any, Tensor]]:
    with torch.no_grad():
        values, _ = model.split.begin(args, {})
        states = []
        for index, cut in enumerate(model.split.cuts):
            values = model.split.advance(values, index) if index else values
            states.append({node: values[node].clone() for node in cut.crossing})
    return states


def _windows(size: tuple[int, ...], count: int = 5) -> list[list[tuple[int, int]]]:
    chance = random.Random(1)
    corners = [[(0, (n + 1) // 2) for n in size], [(n // 2, n) for n in size], [(0, n) for n in size]]
    for _ in range(count):
        corners.append([(a := chance.randrange(n - 1), chance.randint(a + 1, n)) for n in size])
    return corners


def _whole(model: EarlyExitGenerator, args: tuple[Tensor, ...], target: int) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.all_exits(*args)[target]
    return found


def _run(route: Route, spans: Any, state: dict[Any, Tensor]) -> Tensor:
    return route.run(spans, {key: value.clone() for key, value in route.enter(spans, state).items()})


@pytest.mark.parametrize("name", decoders.LOCAL)
def test_a_window_of_any_exit_equals_the_same_part_of_its_image(wrapped: Any, name: str) -> None:
    model, args = wrapped(name, attach_at=(1,) if name == "three dimensions" else (1, 2))
    locality = find_locality(model.split, model.branches)
    count = len(model.branches)
    assert sorted(locality.routes) == [(s, t) for s in range(count) for t in range(s, count + 1)]
    states, extents = _states(model, args), Extents({}, {})
    measure_extents(locality.routes[0, count], states[0], extents)
    for index in range(count):
        measure_extents(locality.routes[index, index], states[index], extents)
    for (source, target), route in locality.routes.items():
        whole = _whole(model, args, target)
        for window in _windows(tuple(whole.shape[2:])):
            spans = [route.span(k, lines, extents) for k, lines in enumerate(window)]
            part = whole[(slice(None), slice(None), *(slice(*lines) for lines in window))]
            assert torch.allclose(_run(route, spans, states[source]), part, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["nearest", "transposed", "label maps", "down and up", "bilinear"])
def test_what_enters_a_window_is_what_gradients_reach(wrapped: Any, name: str) -> None:
    model, args = wrapped(name, attach_at=(1,))
    route = find_locality(model.split, model.branches).routes[0, 1]
    (state,), extents = _states(model, args), Extents({}, {})
    measure_extents(route, state, extents)
    tail = model.split.tail(0, share=True)
    size = _whole(model, args, 1).shape[2:]
    for window in _windows(tuple(size), 3):
        spans = [route.span(k, lines, extents) for k, lines in enumerate(window)]
        leaves = [state[node].clone().requires_grad_() for node in model.split.cuts[0].crossing]
        out = tail(*leaves)
        out[
            (slice(None), slice(None), *(slice(*lines) for lines in window))
        ].double().square().sum().backward()
        for node, leaf in zip(model.split.cuts[0].crossing, leaves, strict=True):
            assert leaf.grad is not None
            for k, span in enumerate(spans):
                lines = leaf.grad.transpose(0, 2 + k).flatten(1).abs().sum(1).nonzero()[:, 0]
                first, end = span.enters[node]
                assert first <= int(lines.min()) and int(lines.max()) < end
                if (
                    name == "nearest"
                ):  # no step of it sees more than it needs but by the rounding of its stages
                    assert int(lines.min()) - first <= 1 and end - 1 - int(lines.max()) <= 1


@pytest.mark.parametrize("name", ["nearest", "style vectors", "label maps", "down and up", "one dimension"])
def test_the_cost_of_a_window_is_what_pytorch_counts(wrapped: Any, name: str) -> None:
    model, args = wrapped(name)
    locality = find_locality(model.split, model.branches)
    args = tuple(arg[:1] for arg in args)
    states, extents = _states(model, args), Extents({}, {})
    measure_extents(locality.routes[0, 2], states[0], extents)
    measure_extents(locality.routes[1, 1], states[1], extents)
    for key in ((0, 2), (1, 2), (0, 1)):
        route = locality.routes[key]
        for window in _windows(tuple(_whole(model, args, 2).shape[2:])):
            spans = [route.span(k, lines, extents) for k, lines in enumerate(window)]
            entered = {key: value.clone() for key, value in route.enter(spans, states[key[0]]).items()}
            with FlopCounterMode(display=False) as counter:
                route.run(spans, entered)
            counted = counter.get_total_flops() // 2
            # A stage that also turns a style into weights costs a little beside its map.
            assert route.macs(spans, extents) == pytest.approx(counted, rel=0.02 if "style" in name else 1e-9)


def _norm(norm: nn.Module) -> nn.Module:
    return decoders.Staged([decoders.up(), nn.Sequential(decoders.conv(), norm), decoders.conv()])


class _Squeeze(nn.Module):
    """Squeeze and excitation: every pixel is scaled by a mean over all."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(self.pool(x)))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(8, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, 2)
        mixed = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + mixed.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.GroupNorm(2, 8), r"stages.2.1 \(GroupNorm\).* sees the whole map"),
        (nn.InstanceNorm2d(8, affine=True), r"stages.2.1 \(InstanceNorm2d\).* sees the whole map"),
        (
            _Squeeze(),
            r"stages.2.1.pool \(AdaptiveAvgPool2d\) at .*test_windows.py:\d+: return x \* torch.sigmoid",
        ),
        (
            _Attention(),
            r"flatten in stages.2 at .*test_windows.py:\d+: q, k, v .* lays the axes of the image",
        ),
        (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), r"stages.2.1 \(Upsample\)"),
        (nn.Upsample(size=(24, 40)), r"stages.2.1 \(Upsample\) takes all of its map together"),
        (nn.LayerNorm([8, 24, 40]), r"stages.2.1 \(LayerNorm\) at .* does not take a part of a map"),
        (nn.ZeroPad2d((1, 0, 1, 0)), None),
        (nn.CircularPad2d(1), r"stages.2.1 \(CircularPad2d\)"),
    ],
)
def test_layers_that_see_the_whole_map_are_refused_by_name(
    wrapped: Any, layer: nn.Module, message: str | None
) -> None:
    model, _ = wrapped(_norm(layer), torch.rand(2, 4, 12, 20), attach_at=(1,))
    locality = find_locality(model.split, model.branches)
    if message is None:
        locality.check()
        return
    assert locality.routes == {}
    with pytest.raises(Exception, match=message) as caught:
        locality.check()
    assert type(caught.value).__name__ == "RegionError"


def test_exits_behind_the_last_norm_over_space_can_be_run_in_parts(wrapped: Any) -> None:
    model, _ = wrapped(_norm(nn.GroupNorm(2, 8)), torch.rand(2, 4, 12, 20), attach_at=(1, 4))
    locality = find_locality(model.split, model.branches)
    assert sorted(locality.routes) == [(1, 1), (1, 2)]
    assert "GroupNorm" in str(locality.reasons[0, 2])
