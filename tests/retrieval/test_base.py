"""The base class of retrievers: what it adds to a back-end, and how it reports its errors."""

import numpy as np
import pytest
import torch

from retroexit.errors import OptionError, RetrieverError
from retroexit.retrieval import ExactRetriever, Retriever


class Loop(Retriever):
    """A minimal back-end; a test may change its ids in ``answer``."""

    name = "loop"

    def _build(self, keys):
        self.seen = keys

    def _search(self, queries, k):
        return self.answer(np.array([np.argsort(((self.seen - query) ** 2).sum(1))[:k] for query in queries]))

    def answer(self, ids):
        return ids


def test_two_hooks_are_a_back_end(tmp_path):
    keys, queries = torch.randn(40, 6), torch.randn(9, 6)
    expected = ExactRetriever().build(keys).search(queries, 3)
    retriever = Loop(flavour="plain").build(keys)
    retriever.save(tmp_path / "loop")
    for one in (retriever, Loop.load(tmp_path / "loop")):
        result = one.search(queries, 3)
        assert torch.equal(result.ids, expected.ids)
        assert torch.equal(result.distances, expected.distances)
        assert one.options == {"flavour": "plain"}


def test_the_back_end_sees_distinct_centred_contiguous_float32_rows():
    assert Loop().build(torch.tensor([[0.0, 1.0], [-0.0, 1.0]])).distinct == 1
    keys = torch.randn(30, 5, dtype=torch.float64) + 50
    retriever = Loop().build(torch.cat([keys[:4], keys]).T.contiguous().T)
    assert retriever.seen.shape == (30, 5) and retriever.seen.dtype == np.float32
    assert retriever.seen.flags.c_contiguous and retriever.seen.flags.owndata
    assert abs(retriever.seen).max() < 10
    assert (len(retriever), retriever.distinct, retriever.width) == (34, 30, 5)
    # Centring by any vector keeps differences.
    np.testing.assert_allclose(retriever.seen - retriever.seen[0], (keys - keys[0]).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids + 10, r"'loop' returned the id 19, .* only 10 distinct keys"),
        (lambda ids: ids - 2, r"'loop' returned the id -2, .* only 10 distinct keys"),
        (lambda ids: ids[:, :1], r"must return integers \(10, 2\), got int64 \(10, 1\)"),
        (lambda ids: ids.astype(float), r"must return integers \(10, 2\), got float64"),
        (lambda ids: (ids, np.zeros((10, 2))), r"must return a floor of shape \(10,\), got \(10, 2\)"),
    ],
)
def test_invalid_answers_of_a_back_end_are_refused(change, message):
    class Changed(Loop):
        def answer(self, ids):
            return change(ids)

    keys = torch.arange(20.0).view(10, 2)
    with pytest.raises(RetrieverError, match=message):
        Changed().build(keys).search(keys, 2)


class Forgetful(Loop):
    """Returns -1, or a repeated id, for some neighbours."""

    def __init__(self, gap):
        super().__init__()
        self.gap = gap

    def answer(self, ids):
        ids[::2, 1] = ids[::2, 0] if self.gap is None else self.gap
        return ids


class Guessing(Loop):
    """Returns the farthest keys for some queries, with a floor that says so."""

    def _search(self, queries, k):
        ids = super()._search(queries, len(self.seen))
        ids[::2] = ids[::2, ::-1]
        return ids[:, :k], np.where(np.arange(len(queries)) % 2, np.inf, 0).astype(np.float32)


@pytest.mark.parametrize("make", [lambda: Forgetful(-1), lambda: Forgetful(None), Guessing])
def test_queries_that_a_back_end_leaves_open_are_searched_exactly(make):
    keys, queries = torch.randn(50, 4), torch.randn(8, 4)
    expected = ExactRetriever().build(keys).search(queries, 3)
    assert torch.equal(make().build(keys).search(queries, 3).ids, expected.ids)


def test_rows_come_sorted_by_distance_and_equal_distances_by_id():
    class Shuffled(Loop):
        def answer(self, ids):
            return ids[:, ::-1]

    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [3.0, 3.0]])
    result = Shuffled().build(keys).search(torch.zeros(1, 2), 4)
    assert result.ids.tolist() == [[0, 1, 2, 3]]
    assert result.distances.tolist() == [[1, 1, 1, 18]]


def test_options_must_be_plain_data_and_an_empty_index_is_not_saved():
    with pytest.raises(OptionError, match="options of Loop must be plain data"):
        Loop(metric=object())
    with pytest.raises(RetrieverError, match="is empty. Call build"):
        Loop().save("empty")


@pytest.mark.parametrize("rows", [np.array([["a"]]), torch.zeros(2, 2, dtype=torch.complex64), 1j * np.ones((2, 2))])
def test_complex_numbers_and_text_are_refused(rows):
    with pytest.raises(RetrieverError, match="real numbers"):
        Loop().build(rows)
