"""Banks grow, shrink and merge into what building them so at once would give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retroexit.errors import BankError, RetrieverError
from retroexit.guidance import GuidanceBank, add_pairs, merge_banks, remove_pairs
from retroexit.retrieval import ExactRetriever, FaissRetriever

FEATURES = torch.randn(6, 4, 2, 4, generator=torch.Generator().manual_seed(1))
VALUES = torch.randn(6, 3, 4, 8, generator=torch.Generator().manual_seed(2)).half().float()
META = {"fingerprint": "abc", "key_tap": "a", "value_tap": "b"}


def bank_of(inputs: list[int], **changes) -> GuidanceBank:
    options = {"thin": "none", "retriever": ExactRetriever(), "meta": META}
    return GuidanceBank.build([(FEATURES[inputs], inputs)], lambda ids: VALUES[ids], **{**options, **changes})


def same(one: GuidanceBank, other: GuidanceBank) -> bool:
    return (
        np.array_equal(one.retriever.keys, other.retriever.keys)
        and np.array_equal(one.values, other.values)
        and torch.equal(one.source, other.source)
    )


def test_adding_pairs_gives_the_bank_of_all_and_leaves_the_old_one() -> None:
    small, large = bank_of([0, 1]), bank_of([0, 1, 2])
    grown = add_pairs(small, large.retriever.keys, large.values, large.source)  # two thirds are known already
    assert same(grown, large) and len(small) == 16
    assert torch.equal(grown.guide(FEATURES[:3]), VALUES[:3])
    assert "thinning" not in grown.meta and grown.meta["fingerprint"] == "abc"


def test_removing_inputs_and_rows_leaves_the_others() -> None:
    whole = bank_of([0, 1, 2])
    assert same(remove_pairs(whole, source=[1]), bank_of([0, 2]))
    left = remove_pairs(whole, rows=[0, 23])
    assert np.array_equal(left.retriever.keys, whole.retriever.keys[1:23])
    assert len(remove_pairs(whole, rows=[0], source=torch.tensor([2]))) == 15


def test_merging_equals_building_from_all_inputs() -> None:
    parts = [bank_of([0, 1]), bank_of([1, 2]), bank_of([5])]
    assert same(merge_banks(parts, same_inputs=True), bank_of([0, 1, 2, 5]))
    apart = merge_banks(parts)
    assert apart.source.unique().tolist() == [0, 1, 4, 10] and apart.meta["merged"] == [0, 2, 5]
    assert torch.equal(apart.guide(FEATURES[[0, 2]]), VALUES[[0, 2]])


def test_the_retriever_keeps_its_kind_and_options() -> None:
    bank = bank_of([0, 1], retriever=FaissRetriever(index="HNSW8"))
    merged = merge_banks([bank, bank_of([2])])
    assert type(merged.retriever) is FaissRetriever and merged.retriever.options["index"] == "HNSW8"


def test_a_changed_bank_is_saved_and_loaded(tmp_path) -> None:
    bank_of([0, 1, 2]).save(tmp_path / "bank")
    less = remove_pairs(GuidanceBank.load(tmp_path / "bank"), source=[0])
    less.save(tmp_path / "bank")  # over the very file that its values were mapped from
    assert same(GuidanceBank.load(tmp_path / "bank", fingerprint="abc"), bank_of([1, 2]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"meta": {**META, "fingerprint": "xyz"}}, "bank 1 has fingerprint 'xyz', bank 0 'abc'"),
        ({"meta": {**META, "key_tap": "c"}}, "bank 1 has key_tap 'c', bank 0 'a'"),
        ({"meta": {**META, "value_tap": "c"}}, "bank 1 has value_tap 'c', bank 0 'b'"),
        ({"patch": (1, 2)}, r"bank 1 has patch \[1, 2\], bank 0 \[1, 1\]"),
    ],
)
def test_banks_of_another_backbone_or_geometry_are_not_merged(other, message) -> None:
    with pytest.raises(BankError, match=message):
        merge_banks([bank_of([0]), bank_of([1], **other)])


def test_wrong_changes_are_refused_with_what_was_found() -> None:
    bank = bank_of([0, 1])
    with pytest.raises(BankError, match="found none"):
        merge_banks([])
    with pytest.raises(BankError, match="asked to remove row 16; found none.* bank of 16 pairs"):
        remove_pairs(bank, rows=[16])
    with pytest.raises(BankError, match="asked to remove input 4; .* inputs 0 to 1"):
        remove_pairs(bank, source=[4])
    with pytest.raises(BankError, match="asked to remove every pair"):
        remove_pairs(bank, source=[0, 1])
    key, value = torch.randn(1, 4), torch.randn(1, 2, 2, 3)
    with pytest.raises(BankError, match=r"keys \(1, 5\).*needs keys \(1, 4\)"):
        add_pairs(bank, torch.randn(1, 5), value, [3])
    with pytest.raises(BankError, match=r"sources \(2,\)"):
        add_pairs(bank, key, value, [3, 4])
    with pytest.raises(BankError, match="not finite in float16"):
        add_pairs(bank, key, value * 1e9, [3])
    with pytest.raises(RetrieverError, match="not finite"):
        add_pairs(bank, key / 0, value, [3])
