"""What stays wide says why, so that a user gets on: an entry of the output, a live value, a line of code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.branch.widths.plan import Pin


class Recurrent(nn.Module):
    """A decoder that returns its state besides the image, as one that runs on frames does."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.as_dict = as_dict
        self.stem = nn.Conv2d(4, 32, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
        self.state = nn.Conv2d(32, 32, 3, padding=1)
        self.rgb = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        state = self.state(self.body(self.stem(x)).tanh())
        image = self.rgb(state.relu())
        return {"image": image, "state": state} if self.as_dict else (image, [state])


def pins(generator: nn.Module, place: str, **options: Any) -> tuple[Pin, ...]:
    x = torch.randn(1, 4, 8, 8)
    model = retroexit.wrap(generator.eval(), [place], 1 / 4, min_channels=8, example_inputs=(x,), **options)
    with torch.no_grad():
        model(x, exit=1)
    return model.branches[0].pins


@pytest.mark.parametrize(
    ("as_dict", "image", "entry"), [(True, "image", r"\['state'\]"), (False, 0, r"\[1\]\[0\]")]
)
def test_a_returned_state_is_named_and_how_to_drop_it(as_dict: bool, image: Any, entry: str) -> None:
    found = pins(Recurrent(as_dict), "stem", image=image)
    assert {pin.parameter for pin in found} == {"state.weight", "state.bias", "rgb.weight"}
    for pin in found:
        with pytest.raises(AssertionError, match=rf"output's entry {entry}, .*returns the image alone"):
            raise AssertionError(str(pin))


class ImageAlone(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)["image"]


def test_a_module_that_returns_the_image_alone_lets_the_state_shrink() -> None:
    assert pins(ImageAlone(Recurrent(True)), "inner.stem") == ()


class Skipping(nn.Module):
    """Adds a skip of full width, made in front of the cut, to a trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 32, 3, padding=1)
        self.skip = nn.Conv2d(4, 32, 1)
        self.body = nn.Conv2d(32, 32, 3, padding=1)
        self.rgb = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        side = self.skip(x)
        x = self.stem(x)
        return self.rgb(self.body(x.relu()) + side)


def test_a_live_value_is_named_as_inspect_names_it() -> None:
    found = pins(Skipping(), "stem")
    assert found and all(pin.is_live for pin in found)
    assert {pin.reason.partition(",")[0] for pin in found} == {"the live value 'skip'"}


class InThirds(nn.Module):
    """Folds 32 channels into 8 by a number that its code has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 32, 3, padding=1)
        self.body = nn.Conv2d(32, 32, 3, padding=1)
        self.rgb = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.stem(x).relu())
        y = y.view(y.shape[0], 4, 8, *y.shape[2:]).flip(1)
        return self.rgb(y.flatten(1, 2))


def test_a_number_in_the_code_is_named_by_its_line() -> None:
    found = pins(InThirds(), "stem")
    assert {pin.parameter for pin in found} == {"body.weight", "body.bias", "rgb.weight"}
    assert all(f"{__file__}:" in pin.reason for pin in found)
    assert any("y.view(y.shape[0], 4, 8" in pin.reason for pin in found)


class Gated(nn.Module):
    """Half of the channels gates the other half; the half is computed as ``int(c / 2)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 32, 1)
        self.body = nn.Conv2d(32, 64, 3, padding=1)
        self.rgb = nn.Conv2d(32, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.stem(x))
        half = int(y.size(1) / 2)
        return self.rgb(y[:, :half] * torch.sigmoid(y[:, half:]))


def test_a_slice_that_ends_at_a_converted_width_is_named_by_its_line() -> None:
    found = pins(Gated(), "stem")
    assert {pin.parameter for pin in found} == {"body.weight", "body.bias", "rgb.weight"}
    assert all("y[:, :half] * torch.sigmoid" in pin.reason for pin in found)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 32, 3, padding=1)
        self.gate = torch.jit.script(nn.Sequential(nn.Conv2d(32, 32, 1), nn.Sigmoid()))
        self.rgb = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.rgb(self.gate(x.relu()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_a_scripted_module_keeps_its_widths_and_is_named() -> None:
    found = pins(Scripted(), "stem")
    assert "gate.0.weight" in {pin.parameter for pin in found}
    assert any("the scripted module gate (Sequential)" in pin.reason for pin in found)
