"""What a description refuses."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from retroexit.errors import OptionError
from retroexit.plugins import Description


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "needs a name, got ''"),
        ({"stages": ("a",)}, r"at least two different module paths, got \('a',\)"),
        ({"stages": ("a", "a")}, r"got \('a', 'a'\)"),
        ({"stages": ("a", 2)}, r"module paths, got \('a', 2\)"),
        ({"stages": "blocks"}, "module paths, got 'blocks'"),
        ({"image_range": (1.0, -1.0)}, r"\(smallest, largest\), got \(1.0, -1.0\)"),
        ({"image_range": (0.0, float("inf"))}, r"\(smallest, largest\), got \(0.0, inf\)"),
        ({"image_range": 255}, r"\(smallest, largest\), got 255"),
        ({"key_after": 0}, "key_after of g must be a stage's number from 1 or its path, got 0"),
        ({"key_after": True}, "got True"),
        ({"value_after": ""}, "value_after of g must be .*, got ''"),
        ({"value_after": 2.0}, "got 2.0"),
        ({"key": "angles"}, "key of g must be a function, got str"),
        ({"predictor_inputs": 3}, "predictor_inputs of g must be a function, got int"),
        ({"example_inputs": ((1,), {})}, "example_inputs of g must be a function, got tuple"),
        ({"build_stage": nn.ReLU()}, "build_stage of g must be a function, got ReLU"),
        (
            {"discriminator": nn.ReLU()},
            "discriminator of g must be a function, got ReLU; the class Description",
        ),
        (
            {"adversarial": 3},
            "adversarial of g must be the name of an objective or an object with name, need",
        ),
    ],
)
def test_a_description_outside_its_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Description(**{"name": "g", **options})


def test_a_description_may_leave_everything_but_the_name_to_us() -> None:
    known = Description(
        name="g", key_after=1, value_after="body.3", discriminator=lambda generator: nn.ReLU()
    )
    assert known.stages is known.example_inputs is known.image is known.key is None


def test_stages_may_be_given_as_a_list() -> None:
    assert Description(name="g", stages=["a", "b"]).stages == ("a", "b")  # type: ignore[arg-type]
