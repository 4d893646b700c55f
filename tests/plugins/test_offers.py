"""Factories that make something else than what they are offered as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from retroexit.errors import PluginError
from retroexit.metrics import QualityMetric
from retroexit.plugins import Host, hookimpl


class Nothing(QualityMetric):
    name = "nothing"

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        return a.new_zeros(len(a))


def broken() -> object:
    raise RuntimeError("no table")


@pytest.mark.parametrize(
    ("kind", "factory", "options", "message"),
    [
        ("metric", lambda: 3, {}, "metric 'zero' of plug-in 'mine' made 3; derive it from .*QualityMetric"),
        (
            "metric",
            Nothing,
            {},
            "metric 'zero' of plug-in 'mine' has name = 'nothing'; use one name for both",
        ),
        ("metric", broken, {}, "making the metric 'zero' of plug-in 'mine' raised RuntimeError: no table"),
        (
            "metric",
            Nothing,
            {"weights": "w.pth"},
            "metric 'zero' .* with weights raised TypeError: .*weights",
        ),
        ("loss", lambda: 3, {}, "loss 'zero' of plug-in 'mine' made 3; make something that compares"),
        ("loss", broken, {}, "making the loss 'zero' of plug-in 'mine' raised RuntimeError: no table"),
    ],
)
def test_a_factory_that_makes_the_wrong_thing_is_named(
    empty: Host, kind: str, factory: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    class Offers:
        @hookimpl
        def retroexit_metrics(self) -> dict[str, object]:
            return {"zero": factory}

        @hookimpl
        def retroexit_losses(self) -> dict[str, object]:
            return {"zero": factory}

    empty.register(Offers(), "mine")
    with pytest.raises(PluginError, match=message):
        getattr(empty, kind)("zero", **options)
