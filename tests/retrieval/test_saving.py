"""Saving and loading retrievers; damaged indices are rebuilt or refused."""

import logging
import os
from pathlib import Path

import pytest
import torch

from retroexit.core.files import write_manifest
from retroexit.errors import CheckpointError
from retroexit.retrieval import ExactRetriever, FaissRetriever, HnswlibRetriever

MADE = [ExactRetriever, lambda: FaissRetriever(index="IVF4,Flat", nprobe=3), lambda: HnswlibRetriever(ef=33, threads=2)]
every_backend = pytest.mark.parametrize("make", MADE, ids=["exact", "faiss", "hnswlib"])


@pytest.fixture
def keys():
    keys = torch.randn(120, 8)
    keys[40] = keys[3]
    return keys


def flip(path, at=-20):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def same(one, other, keys):
    queries = keys[:30] + 0.3
    first, second = one.search(queries, 4), other.search(queries, 4)
    return torch.equal(first.ids, second.ids) and torch.equal(first.distances, second.distances)


@every_backend
def test_a_round_trip_gives_the_same_answers_options_and_threads(make, keys, tmp_path, monkeypatch):
    retriever = make().build(keys)
    retriever.save(tmp_path / "index")
    if not isinstance(retriever, ExactRetriever):
        monkeypatch.setattr(type(retriever), "_build", lambda *_: pytest.fail("built again"))
    loaded = type(retriever).load(tmp_path / "index")
    assert same(retriever, loaded, keys)
    assert not isinstance(loaded, HnswlibRetriever) or loaded._native.ef == 33
    assert (loaded.options, loaded.threads) == (retriever.options, retriever.threads)
    assert (len(loaded), loaded.width) == (120, 8)


@pytest.mark.parametrize("make", MADE[1:], ids=["faiss", "hnswlib"])
@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_a_damaged_index_is_built_again_from_the_keys(make, harm, keys, tmp_path, caplog, monkeypatch):
    retriever = make().build(keys)
    retriever.save(tmp_path / "index")
    harm(tmp_path / "index" / "index.bin")
    monkeypatch.setattr(type(retriever), "_restore", lambda *_: pytest.fail("a damaged index was parsed"))
    with caplog.at_level(logging.WARNING, logger="retroexit"):
        loaded = type(retriever).load(tmp_path / "index")
    assert "index.bin is missing or damaged; building the index again" in caplog.text
    assert same(retriever, loaded, keys)


def test_saving_replaces_an_earlier_version_and_leaves_nothing_beside_it(keys, tmp_path):
    HnswlibRetriever().build(keys).save(tmp_path / "index")
    loaded = ExactRetriever.load(tmp_path / "index")  # keys of one back-end serve another
    assert loaded.options == {"device": "cpu", "precision": "auto"}
    assert same(ExactRetriever().build(keys), loaded, keys)
    ExactRetriever().build(keys[:7]).save(tmp_path / "index")
    assert len(ExactRetriever.load(tmp_path / "index")) == 7
    assert sorted(os.listdir(tmp_path / "index")) == ["keys.npy", "meta.json"]
    assert os.listdir(tmp_path) == ["index"]


def test_a_folder_with_other_files_is_refused_and_left_alone(keys, tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(CheckpointError, match="holds 'thesis.tex'"):
        ExactRetriever().build(keys).save(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_failed_save_leaves_the_earlier_version(step, keys, tmp_path, monkeypatch):
    ExactRetriever().build(keys).save(tmp_path / "index")
    rename = os.rename

    def fail(*paths):
        if step == "write" or Path(paths[0]).name == "new":
            raise OSError("disk full")
        rename(*paths)

    with monkeypatch.context() as patched:
        if step == "write":
            patched.setattr(ExactRetriever, "_dump", fail)
        else:
            patched.setattr("retroexit.core.files._exchanged", lambda *_: False)
            patched.setattr("retroexit.core.files.os.rename", fail)
        with pytest.raises(OSError, match="disk full"):
            ExactRetriever().build(keys[:5]).save(tmp_path / "index")
    assert len(ExactRetriever.load(tmp_path / "index")) == 120
    assert os.listdir(tmp_path) == ["index"] or step == "rename"


def test_an_absent_folder_another_kind_and_another_schema_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no retriever in .*absent"):
        ExactRetriever.load(tmp_path / "absent")
    write_manifest(tmp_path, {"kind": "guidance bank", "schema": 1}, ())
    with pytest.raises(CheckpointError, match="must hold a 'retriever', got a 'guidance bank'"):
        ExactRetriever.load(tmp_path)
    write_manifest(tmp_path, {"kind": "retriever", "schema": 9}, ())
    with pytest.raises(CheckpointError, match="schema 9"):
        ExactRetriever.load(tmp_path)


def test_damaged_files_are_refused_or_the_index_is_built_again(any_backend, damage, tmp_path, caplog):
    keys, queries = torch.randn(120, 16), torch.randn(20, 16)
    retriever = any_backend().build(keys)
    retriever.save(tmp_path / "index")
    sound = retriever.search(queries, 2)

    def read():
        caplog.clear()
        loaded = type(retriever).load(tmp_path / "index").search(queries, 2)
        alike = torch.equal(loaded.ids, sound.ids) and torch.equal(loaded.distances, sound.distances)
        return "rebuilt" if alike and "building the index again from the keys" in caplog.text else "wrong"

    outcomes = damage.outcomes(tmp_path / "index", 60, read)
    expected = {("keys.npy", "refused"), ("meta.json", "refused")}
    has_index = (tmp_path / "index" / "index.bin").exists()
    assert outcomes == expected | ({("index.bin", "rebuilt")} if has_index else set())
