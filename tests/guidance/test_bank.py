"""Guidance banks: search, gluing, exclusion, saving and loading."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from retroexit.errors import BankError, CheckpointError, OptionError, RetrieverError
from retroexit.guidance import GuidanceBank, build_bank, cut, glue
from retroexit.retrieval import ExactRetriever, FaissRetriever, HnswlibRetriever

INPUTS = 12
FEATURES = torch.randn(INPUTS, 6, 4, 8, generator=torch.Generator().manual_seed(1))
VALUES = torch.randn(INPUTS, 3, 8, 16, generator=torch.Generator().manual_seed(2)).half().float()


def stream(batch=5):
    for start in range(0, INPUTS, batch):
        ids = torch.arange(start, min(start + batch, INPUTS))
        yield FEATURES[ids], ids


def values_of(ids):
    return VALUES[ids]


def make(**changes):
    options = {"patch": (2, 2), "thin": "none", "retriever": ExactRetriever()}
    return build_bank(stream(), values_of, **{**options, **changes})


def by_table(feature, foreign_to=None):
    """Compare every patch with every other: the guide, and the input that each patch comes from."""

    def patches(x, side):  # (N, C, H, W) -> (N, h, w, C, side, side)
        return x.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)

    queries, keys = patches(feature, 2).reshape(-1, 24), patches(FEATURES, 2).reshape(-1, 24)
    distances = torch.cdist(queries.double(), keys.double()).view(len(feature), 8, INPUTS, 8)
    for n, m in enumerate(foreign_to or ()):
        distances[n, :, m] = torch.inf
    nearest = distances.flatten(2).argmin(2)
    values = patches(VALUES, 4).flatten(0, 2)[nearest].view(-1, 2, 4, 3, 4, 4)
    return values.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 8, 16), (nearest // 8).view(-1, 2, 4)


@pytest.mark.parametrize("excluded", [None, [4, 0, 11]])
def test_a_guide_equals_a_search_among_all_patches_without_the_excluded_input(excluded):
    feature = FEATURES[[4, 0, 11]] + 0.01 * torch.randn(3, 6, 4, 8)
    bank = make()
    guide, sources = by_table(feature, excluded)
    exclude = None if excluded is None else torch.tensor(excluded)
    result = bank.search(feature, exclude)
    assert torch.equal(bank.source[result.ids], sources)
    assert torch.equal(bank.glue(result.ids), guide) and torch.equal(bank.guide(feature, exclude), guide)
    keys = torch.from_numpy(bank.retriever.keys.copy())[result.ids]
    queries = feature.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)
    torch.testing.assert_close(result.distances, (queries - keys).square().sum(-1))


def test_excluding_works_where_all_near_keys_are_those_of_the_input():
    # Ten inputs, 32 keys each, far from one another: the first foreign key is the 33rd.
    features = 0.1 * torch.randn(10, 2, 4, 8) + 100 * torch.arange(10.0).view(10, 1, 1, 1)
    bank = build_bank([(features, torch.arange(10))], lambda ids: VALUES[ids], thin="none", retriever=ExactRetriever())
    sources = bank.source[bank.search(features, exclude=torch.arange(10)).ids]
    assert ((sources - torch.arange(10).view(10, 1, 1)).abs() == 1).all()
    nothing = bank.search(features, exclude=torch.full((10,), -1))
    assert torch.equal(bank.source[nothing.ids][:, 0, 0], torch.arange(10))
    alone = build_bank([(FEATURES[:1], [7])], lambda ids: VALUES[:1], retriever=ExactRetriever())
    nearest = alone.search(FEATURES[:1], exclude=torch.tensor([7]))  # there is no other input
    assert torch.equal(nearest.ids, alone.search(FEATURES[:1]).ids)


@pytest.mark.parametrize("how", ["fps", "random"])
def test_thinning_keeps_few_keys_and_computes_only_their_values(how):
    computed = []

    def watched(ids):
        computed.extend(ids)
        return VALUES[ids]

    bank = build_bank(stream(), watched, patch=(2, 2), size=5, thin=how, retriever=ExactRetriever())
    assert len(bank) == 5
    assert sorted(computed) == sorted(set(bank.source.tolist()))
    facts = bank.meta["thinning"]
    assert (facts["how"], facts["size"], facts["seen"], facts["candidates"]) == (how, 5, 96, 96)
    everything = torch.from_numpy(make().retriever.keys.copy())
    gaps = torch.cdist(everything, torch.from_numpy(bank.retriever.keys.copy())).amin(1)
    assert (facts["radius"], facts["mean"]) == pytest.approx((float(gaps.max()), float(gaps.mean())), rel=1e-4)
    full = make()
    for key, value in zip(bank.retriever.keys, bank.values, strict=True):
        row = int(np.flatnonzero((full.retriever.keys == key).all(1))[0])
        assert np.array_equal(full.values[row], value)  # key and value belong to one place


def test_facts_of_a_bank_are_recorded():
    bank = make(meta={"fingerprint": "abc", "key_tap": "body.1", "value_tap": "body.3"})
    assert (bank.patch, bank.value_patch, bank.value_channels, len(bank)) == ((2, 2), (4, 4), 3, 96)
    assert bank.values.dtype == np.float16 and bank.values.shape == (96, 4, 4, 3)
    assert bank.meta["key_tap"] == "body.1"
    assert bank.macs_per_search(128) == 128 * 96 * 24
    assert repr(bank).startswith("GuidanceBank(ExactRetriever(96 keys x 24")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_guide_has_the_dtype_of_the_feature_and_no_gradient(dtype):
    feature = FEATURES.to(dtype).requires_grad_()
    guide = make().guide(feature)
    assert guide.dtype == dtype and not guide.requires_grad
    assert torch.equal(guide, VALUES.to(dtype))


def test_an_input_of_an_unthinned_bank_is_guided_by_its_value_at_any_size_and_in_empty_batches():
    bank = make()
    guide = bank.guide(FEATURES)
    assert torch.equal(guide, VALUES) and guide.is_contiguous(memory_format=torch.channels_last)
    wide, expected = (torch.cat([x[:2], x[2:4]], dim=3) for x in (FEATURES, VALUES))
    assert torch.equal(bank.guide(wide), expected)
    assert bank.guide(FEATURES[:0], exclude=torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 8, 16)


def test_a_key_for_the_whole_input_retrieves_the_whole_value():
    poses = torch.randn(INPUTS, 7, 1, 1)
    bank = build_bank([(poses, range(INPUTS))], values_of, retriever=ExactRetriever())
    assert bank.value_patch == (8, 16)
    assert torch.equal(bank.guide(poses[[3, 9]]), VALUES[[3, 9]])


@pytest.mark.parametrize(
    ("features", "values", "message"),
    [
        ([], VALUES, "the stream was empty"),
        ([(FEATURES[:2], [0])], VALUES, "2 key features came with 1 input indices"),
        ([(FEATURES[:1], [0]), (FEATURES[:1, :, :2], [1])], VALUES, r"got \(6, 2, 8\) after \(6, 4, 8\)"),
        ([(FEATURES, range(INPUTS))], VALUES[:, :, :7], r"\(8, 3, 7, 16\) do not fit 8 inputs with \(4, 8\)"),
        ([(FEATURES, range(INPUTS))], VALUES[..., 0], r"\(8, 3, 8\) do not fit"),
        ([(FEATURES, range(INPUTS))], VALUES * 1e6, "finite in float16, but the value feature reaches"),
        ([(FEATURES / 0, range(INPUTS))], VALUES, "keys must be finite .*of 384 rows"),
    ],
)
def test_features_and_values_that_do_not_fit_are_refused(features, values, message):
    with pytest.raises((BankError, RetrieverError), match=message):
        build_bank(iter(features), lambda ids: values[ids], retriever=ExactRetriever())


def rebuilt(bank, values):
    return GuidanceBank(retriever=bank.retriever, values=values, source=bank.source.numpy(), meta=bank.meta)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: b.guide(FEATURES[:, :5]), RetrieverError, "24 numbers like the keys, got 20"),
        (lambda b: b.guide(FEATURES / 0), RetrieverError, "queries must be finite .*96 of 96 rows"),
        (lambda b: b.guide(FEATURES[:, :, :3]), OptionError, r"\(2, 2\) do not divide a map of \(3, 8\)"),
        (lambda b: b.search(FEATURES, torch.arange(3)), BankError, r"must be \(12,\), got \(3,\)"),
        (lambda b: b.glue(torch.tensor([[[96]]])), BankError, r"lie in 0..95, got \(1, 1, 1\) from 96 to 96"),
        (lambda b: rebuilt(b, b.values[1:]), BankError, "got 96 keys, 95 values, 96 sources"),
        (lambda b: rebuilt(b, b.values.astype(np.float32)), BankError, r"got float32 \(96, 4, 4, 3\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_wrong_calls_are_refused_with_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call(make())


@pytest.mark.parametrize("retriever", [ExactRetriever(), FaissRetriever(index="HNSW8"), HnswlibRetriever(ef=40)])
def test_a_saved_bank_gives_the_same_guides(retriever, tmp_path):
    bank = make(retriever=retriever, meta={"fingerprint": "abc"})
    bank.save(tmp_path / "bank")
    loaded = GuidanceBank.load(tmp_path / "bank", fingerprint="abc")
    assert type(loaded.retriever) is type(retriever) and loaded.meta == bank.meta
    assert isinstance(loaded.values, np.memmap)
    feature, exclude = torch.randn(2, 6, 4, 8), torch.tensor([1, 2])
    assert torch.equal(loaded.guide(feature, exclude=exclude), bank.guide(feature, exclude=exclude))
    loaded.save(tmp_path / "bank")  # over the very file that is mapped
    assert torch.equal(loaded.guide(feature), GuidanceBank.load(tmp_path / "bank").guide(feature))


def test_another_back_end_can_take_over_a_saved_bank(tmp_path):
    class Mine(ExactRetriever):
        name = "mine"

    make(retriever=Mine()).save(tmp_path / "bank")
    with pytest.raises(BankError, match="uses the retriever 'mine'.*Pass its class"):
        GuidanceBank.load(tmp_path / "bank")
    for kind in (Mine, FaissRetriever):
        bank = GuidanceBank.load(tmp_path / "bank", retriever_class=kind)
        assert torch.equal(bank.guide(FEATURES), VALUES) and type(bank.retriever) is kind


def test_meta_must_be_plain_data_and_a_bank_of_another_backbone_is_refused(tmp_path):
    with pytest.raises(OptionError, match="meta of a bank must be plain data"):
        make(meta={"tap": object()}).save(tmp_path / "bank")
    assert os.listdir(tmp_path) == []
    for meta, backbone in (({"fingerprint": "abc"}, "'abc'"), ({}, "None")):
        make(meta=meta).save(tmp_path / "bank")
        with pytest.raises(BankError, match=f"built with backbone {backbone}, this backbone is 'xyz'"):
            GuidanceBank.load(tmp_path / "bank", fingerprint="xyz")


@pytest.mark.parametrize("name", ["values.npy", "source.npy", "meta.json", "keys/keys.npy", "keys/meta.json"])
def test_a_bank_with_a_missing_file_is_refused(name, tmp_path):
    make().save(tmp_path / "bank")
    (tmp_path / "bank" / name).unlink()
    with pytest.raises(CheckpointError, match=Path(name).name):
        GuidanceBank.load(tmp_path / "bank")


def test_damaged_files_are_never_used(damage, tmp_path):
    bank = make(retriever=HnswlibRetriever(ef=40))  # with a native index among its files
    bank.save(tmp_path / "bank")
    feature = torch.randn(2, 6, 4, 8)
    sound = bank.guide(feature)

    def read():
        loaded = GuidanceBank.load(tmp_path / "bank")
        return "rebuilt" if torch.equal(loaded.guide(feature), sound) else "wrong"

    outcomes = damage.outcomes(tmp_path / "bank", 60, read)
    assert {outcome for outcome in outcomes if outcome[1] != "refused"} == {("index.bin", "rebuilt")}


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        *(((2, 3, 4, 6), patch) for patch in ((1, 1), (2, 3), (4, 6))),
        *(((2, 3, 9), (3,)), ((2, 3, 4, 2, 6), (2, 1, 3))),
    ],
)
def test_patches_of_maps_of_any_dimension_are_glued_to_the_same_map(shape, patch):
    x = torch.randn(shape)
    rows = cut(x, patch)  # (N, *grid, C * patch)
    assert torch.equal(rows[(0,) * (len(shape) - 1)], x[(0, slice(None), *map(slice, patch))].flatten())
    grid = rows.shape[:-1]
    assert torch.equal(glue(rows.reshape(*grid, shape[1], *patch).movedim(len(grid), -1)), x)
    values = x.half().float()
    options = {"patch": patch, "thin": "none", "retriever": ExactRetriever()}
    bank = build_bank([(x, range(len(x)))], lambda ids: values[ids], **options)
    assert torch.equal(bank.guide(x), values)


@pytest.mark.parametrize(
    ("shape", "patch", "message"),
    [
        ((1, 2, 4, 6), (3, 2), r"patches of \(3, 2\) do not divide a map of \(4, 6\)"),
        ((1, 2, 4, 6), (2,), r"a feature \(1, 2, 4, 6\), got \(2,\)"),
        ((1, 2, 4, 6), (0, 2), r"got \(0, 2\)"),
        ((1, 2), (), r"a feature \(1, 2\), got \(\)"),
    ],
)
def test_patches_that_do_not_fit_are_refused(shape, patch, message):
    with pytest.raises(OptionError, match=message):
        cut(torch.zeros(shape), patch)
    with pytest.raises(OptionError, match=r"must have shape \(N, \*grid, \*patch, C\), got \(2, 3, 4\)"):
        glue(torch.zeros(2, 3, 4))
