"""Banks of order 1: values with slopes with respect to the key."""

import numpy as np
import pytest
import torch

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import BankError, OptionError
from retroexit.guidance import GuidanceBank, build_bank, cut, with_slopes
from retroexit.retrieval import ExactRetriever
from retroexit.training.stream_bank import stream_bank


def _maps(count=12, seed=0):
    """Key features, and value features twice their size that depend on them in a straight line."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, 5, 6, 8, generator=draw)
    mix = torch.randn(5, 3 * 2 * 2, generator=torch.Generator().manual_seed(9))
    values = torch.nn.functional.pixel_shuffle(torch.einsum("nchw,cd->ndhw", keys, mix) + 0.5, 2)
    return keys, values


def _bank(keys, values, size=10, patch=(1, 1)):
    options = {"patch": patch, "size": size, "thin": "random", "retriever": ExactRetriever()}
    return build_bank([(keys, range(len(keys)))], lambda rows: values[rows], **options)


def _followed(keys, values, **settings):
    bank = _bank(keys, values, **settings)
    return with_slopes(bank, zip(keys.split(5), values.split(5), strict=True), keys[:, 0].numel())


@pytest.mark.parametrize("patch", [(1, 1), (2, 2)])
def test_values_that_are_linear_in_the_key_are_guided_without_error(patch):
    keys, values = _maps()
    bank = _followed(keys, values, patch=patch)
    fresh, expected = _maps(3, seed=1)
    guide = bank.guide(fresh)
    plain = _bank(keys, values, patch=patch).guide(fresh)
    assert guide.shape == expected.shape and bank.value_channels == 3
    spread = float(expected.std())
    assert float((guide - expected).abs().mean()) < (0.03 if patch == (1, 1) else 0.15) * spread
    assert float((plain - expected).abs().mean()) > 0.3 * spread


def test_slopes_are_those_of_a_plain_ridge_regression():
    keys, values = _maps()
    values = values.square()  # no straight line
    bank = _followed(keys, values)
    rows = cut(keys).reshape(-1, 5).double().numpy()
    targets = cut(values, (2, 2)).reshape(-1, 3, 4).transpose(1, 2).flatten(1).double().numpy()
    near = -(-20 * 5 * 10 // len(rows))
    anchors = bank.retriever.keys.astype(float)
    order = ((rows[:, None] - anchors[None]) ** 2).sum(-1).argsort(1)[:, :near]
    for pair in (0, 7):
        mine = (order == pair).any(1)
        x, y = rows[mine] - anchors[pair], targets[mine]
        mx, my = x.mean(0), y.mean(0)
        covariance = (x - mx).T @ (x - mx) / len(x)
        ridge = 0.01 * (1 + 5 / len(x)) * covariance.diagonal().mean()
        slope = np.linalg.solve(covariance + ridge * np.eye(5), (x - mx).T @ (y - my) / len(x))
        expected = np.concatenate([(my - mx @ slope)[None], slope])  # (1 + D, 4 * 3)
        stored = bank.values[pair].reshape(12, 6).T
        np.testing.assert_allclose(stored, expected, rtol=5e-3, atol=5e-3)


def test_a_bank_with_slopes_is_saved_and_read(tmp_path):
    keys, values = _maps()
    bank = _followed(keys, values)
    bank.save(tmp_path / "bank")
    read = GuidanceBank.load(tmp_path / "bank")
    assert read.order == 1
    # 48 queries: 10 keys of 5 numbers, then 5 numbers for each of 2 x 2 x 3 values.
    assert _bank(keys, values).macs_per_search(48) == 48 * 10 * 5
    assert read.macs_per_search(48) == 48 * 10 * 5 + 48 * 5 * 12
    assert torch.equal(read.guide(keys), bank.guide(keys))
    ids = read.search(keys).ids
    assert torch.equal(read.glue(ids, feature=keys), bank.guide(keys))


def test_wrong_calls_of_a_bank_with_slopes_are_refused():
    keys, values = _maps()
    plain, bank = _bank(keys, values), _followed(keys, values)
    with pytest.raises(BankError, match="bank of order 1 needs the searched feature"):
        bank.glue(bank.search(keys).ids)
    with pytest.raises(BankError, match="has slopes already"):
        with_slopes(bank, [], 1)
    with pytest.raises(BankError, match="do not fit the bank's values"):
        with_slopes(plain, [(keys, values[:, :2])], keys[:, 0].numel())
    big = _bank(torch.randn(4, 512, 4, 4), torch.randn(4, 512, 32, 32), size=64)
    with pytest.raises(OptionError, match=r"64 pairs of 512 numbers .* Use a smaller bank"):
        with_slopes(big, [], 64)


def test_a_fit_fills_a_bank_with_slopes_and_its_model_comes_back(posed, metric, tmp_path):
    inputs = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"guidance": retroexit.Guidance(order=1, size=40), "example_inputs": (inputs[:1],), "adapter": False}

    def wrapped():
        return retroexit.wrap(posed, [2], 0.5, min_channels=2, **options)

    model = wrapped()
    retroexit.fit(model, inputs, tmp_path, metric=metric, steps=2, predictor_steps=1, progress=False)
    bank = model.bank
    assert bank is not None and (bank.order, bank.value_channels, len(bank)) == (1, 3, 40)
    loaded = retroexit.load(tmp_path, posed, (inputs[:1],), adapter=False)
    assert loaded.options.guidance == model.options.guidance
    assert torch.equal(loaded(inputs, exit=1), model(inputs, exit=1))
    streamed = stream_bank(wrapped(), Samples(inputs), ExactRetriever(), progress=False)
    assert np.array_equal(streamed.retriever.keys, bank.retriever.keys)
    np.testing.assert_allclose(streamed.values, bank.values, rtol=5e-3, atol=5e-3)
