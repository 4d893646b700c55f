"""Samples of all kinds put together to batches."""

import pytest
import torch

from retroexit.core.samples import Samples, drawing_from
from retroexit.errors import OptionError


def test_tensors_tuples_and_dicts_become_batches():
    x, y = torch.rand(5, 3), torch.rand(5, 2, 2)
    args, kwargs = Samples(x).gather([4, 0])
    assert torch.equal(args[0], x[[4, 0]]) and kwargs == {}
    args, kwargs = Samples([(a, [b, 3]) for a, b in zip(x, y, strict=True)]).gather([1, 2])
    assert torch.equal(args[0], x[1:3]) and torch.equal(args[1][0], y[1:3]) and args[1][1] == 3
    args, kwargs = Samples([{"x": a, "gain": 0.5} for a in x]).gather([3])
    assert args == () and torch.equal(kwargs["x"], x[3:4]) and kwargs["gain"] == 0.5
    a, b = torch.zeros(2), torch.ones(2)
    _, kwargs = Samples([{"a": a, "b": b}, {"b": b, "a": a}]).gather([0, 1])  # the order of keys may differ
    assert torch.equal(kwargs["a"], torch.zeros(2, 2))


def test_batches_cover_every_sample_from_any_place():
    samples = Samples(torch.arange(7.0)[:, None])
    assert [rows for rows, _, _ in samples.batches(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [args[0][:, 0].tolist() for _, args, _ in samples.batches(3, first=3)] == [[3, 4, 5], [6]]


@pytest.mark.parametrize("items", [[], torch.zeros(0, 3), 5, iter([1]), {"x": torch.zeros(2, 3)}, torch.tensor(1.0)])
def test_other_values_than_sequences_of_samples_are_refused(items):
    with pytest.raises(OptionError, match=f"non-empty sequence of samples, got {type(items).__name__}"):
        Samples(items)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["text"], "a sample must be .* got str"),
        ([torch.zeros(2), torch.zeros(3)], r"one shape, got \[\(2,\), \(3,\)\]"),
        ([{"x": torch.zeros(2)}, {"y": torch.zeros(2)}], "sample 1 differs from 0"),
        ([{"x": torch.zeros(2), "gain": 1}, {"x": torch.zeros(2), "gain": 2}], "'gain' = 1 in one and another value"),
    ],
)
def test_samples_that_make_no_batch_are_refused(items, message):
    with pytest.raises(OptionError, match=message):
        Samples(items).gather([0, 1])


def test_a_digest_tells_inputs_apart():
    x = torch.rand(4, 3)
    others = (x, x + 1, x.double(), x[:3], x.reshape(4, 3, 1), [(row,) for row in x], [{"x": row} for row in x])
    digests = {Samples(items).digest() for items in others}
    assert len(digests) == 6  # a tensor and a tuple of it are the same input
    assert Samples(x).digest() == Samples(list(x)).digest()


def test_drawing_from_a_seed_puts_the_state_back():
    torch.manual_seed(7)
    expected = torch.rand(3), torch.rand(3)
    torch.manual_seed(7)
    first = torch.rand(3)
    with pytest.raises(KeyError), drawing_from(1):
        inside = torch.rand(3)
        raise KeyError
    assert torch.equal(first, expected[0]) and torch.equal(torch.rand(3), expected[1])
    torch.manual_seed(1)
    assert torch.equal(inside, torch.rand(3))
