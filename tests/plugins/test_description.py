"""Validation of descriptions."""

import pytest
from torch import nn

from retroexit.errors import OptionError
from retroexit.plugins import Description


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "must be a string that is not empty, got ''"),
        ({"stages": ("a",)}, r"at least two different module paths .*, got \('a',\)"),
        ({"stages": ("a", "a")}, r"got \('a', 'a'\)"),
        ({"stages": ("a", 2)}, r"module paths .*, got \('a', 2\)"),
        ({"stages": "blocks"}, "module paths .*, got 'blocks'"),
        ({"image_range": (1.0, -1.0)}, r"\(smallest, largest\), got \(1.0, -1.0\)"),
        ({"image_range": (0.0, float("inf"))}, r"\(smallest, largest\), got \(0.0, inf\)"),
        ({"image_range": 255}, r"\(smallest, largest\), got 255"),
        ({"key_after": 0}, "key_after of g must be a stage's number from 1 or its path, got 0"),
        ({"key_after": True}, "got True"),
        ({"value_after": ""}, "value_after of g must be .*, got ''"),
        ({"value_after": 2.0}, "got 2.0"),
        ({"key": "angles"}, "key of g must be a function, got 'angles'"),
        ({"predictor_inputs": 3}, "predictor_inputs of g must be a function, got 3"),
        ({"example_inputs": ((1,), {})}, r"example_inputs of g must be a function, got \(\(1"),
        ({"build_stage": nn.ReLU()}, "build_stage of g must be a function, got ReLU"),
        ({"discriminator": nn.ReLU()}, "discriminator of g must be a function, got ReLU"),
        ({"adversarial": 3}, "adversarial of g must be an objective or its name, got 3"),
    ],
)
def test_a_description_outside_its_range_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Description(**{"name": "g", **options})


def test_everything_but_the_name_is_optional():
    described = Description(name="g", key_after=1, value_after="body.3", discriminator=lambda g: nn.ReLU())
    assert described.stages is described.example_inputs is described.image is described.key is None
    assert Description(name="g", stages=["a", "b"]).stages == ("a", "b")
