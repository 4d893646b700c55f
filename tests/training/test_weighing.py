"""Equalised weights: lengths of gradients by hand, batch sizes, resuming."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retroexit.errors import CheckpointError
from retroexit.plugins.training_types import TrainingBatch
from retroexit.training.losses import L1, TrainingLoss
from retroexit.training.losses.plan import _value
from retroexit.training.losses.terms import Equaliser


def strong(a: Tensor, b: Tensor) -> Tensor:
    return 40 * (a - b).square().mean((1, 2, 3))


def blind(a: Tensor, b: Tensor) -> Tensor:
    return b.mean((1, 2, 3))


def make(steps: int = 3) -> TrainingLoss:
    terms = {"l1": (1.0, L1()), "strong": (2.0, strong), "blind": (1.0, blind)}
    return TrainingLoss(terms, equaliser=Equaliser(list(terms), steps))


def batches(count: int, size: int = 2) -> list[TrainingBatch]:
    source = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(size, 3, 4, 4, generator=source) * 2 - 1  # noqa: E731
    return [TrainingBatch(draw().requires_grad_(), draw()) for _ in range(count)]


def test_gradients_of_all_terms_are_as_long_as_their_weights_say() -> None:
    loss, (batch,) = make(), batches(1)
    pixels, images = batch.image[0].numel(), len(batch.image)
    loss(batch)
    lengths = {
        # of the gradient at each image of the mean over images, times their number
        "l1": [pixels * (1 / pixels) ** 2] * images,
        "strong": [
            float((80 * (a - b) / pixels).square().sum())
            for a, b in zip(batch.image.detach(), batch.target, strict=True)
        ],
    }
    norms = {name: (sum(squares) / images) ** 0.5 for name, squares in lengths.items()}
    mean = (norms["l1"] * norms["strong"]) ** 0.5
    for name, norm in norms.items():
        assert loss.equaliser.factor(name) == pytest.approx(mean / norm, rel=1e-5)
    assert loss.equaliser.factor("blind") == 1

    total, parts = loss(batch)
    factors = {name: loss.equaliser.factor(name) for name in parts}
    expected = sum(weight * factors[name] * parts[name] for name, (weight, _) in loss.terms.items())
    assert total.item() == pytest.approx(expected, rel=1e-5)
    gradients = {}
    for name in norms:
        (gradients[name],) = torch.autograd.grad(
            factors[name] * _value(name, loss.terms[name][1], batch), batch.image
        )
    assert gradients["l1"].norm() == pytest.approx(float(gradients["strong"].norm()), rel=1e-4)


def test_factors_are_fixed_after_the_first_steps() -> None:
    loss = make(steps=2)
    seen = []
    for batch in batches(4):
        loss(batch)
        seen.append(loss.equaliser.factor("strong"))
    assert seen[0] != seen[1] == seen[2] == seen[3]


def test_nothing_is_measured_without_gradient() -> None:
    loss = make()
    with torch.no_grad():
        loss(batches(1)[0])
    (batch,) = batches(1)
    loss(TrainingBatch(batch.image.detach(), batch.target))
    assert int(loss.equaliser.state()["count"]) == 0
    assert [loss.equaliser.factor(name) for name in loss.terms] == [1, 1, 1]


def test_factors_do_not_depend_on_the_batch_size() -> None:
    together, apart = make(10), make(10)
    (batch,) = batches(1, size=6)
    together(batch)
    for i in range(0, 6, 2):
        apart(
            TrainingBatch(batch.image.detach()[i : i + 2].clone().requires_grad_(), batch.target[i : i + 2])
        )
    for name in together.terms:
        assert together.equaliser.factor(name) == pytest.approx(apart.equaliser.factor(name), rel=1e-5)


def test_an_interrupted_measurement_goes_on_to_the_same_weights() -> None:
    whole, first, second = make(), make(), make()
    expected = [whole(batch)[0].item() for batch in batches(5)]
    for batch in batches(5)[:2]:
        first(batch)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    assert [second(batch)[0].item() for batch in batches(5)[2:]] == expected[2:]
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())
    with pytest.raises(CheckpointError, match="equalised weights of l1, strong, blind, got none"):
        second.load_state({})
    with pytest.raises(CheckpointError, match="got 1 terms"):
        make().load_state({"equaliser.squares": torch.zeros(1), "equaliser.count": torch.tensor(1)})


def test_the_factor_of_a_term_with_tiny_gradients_is_bounded() -> None:
    faint = {"l1": (1.0, L1()), "faint": (1.0, lambda a, b: 1e-20 * (a - b).square().mean())}
    loss = TrainingLoss(faint, equaliser=Equaliser(list(faint), 2))
    loss(batches(1)[0])
    assert loss.equaliser.factor("faint") == 1e4
