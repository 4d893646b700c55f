"""The index on a PostgreSQL server: one table for all, whole or absent, and messages that say what to do."""

import logging
import os
import pickle
import signal
import sys

import pytest
import torch
from retroexit_pgvector import ADDRESS, PgvectorRetriever, retriever

from retroexit.errors import MissingExtraError, OptionError, RetrieverError
from retroexit.guidance import build_bank
from retroexit.guidance.bank import GuidanceBank
from retroexit.retrieval import ExactRetriever


def tables(address):
    rows = run(address, "SELECT tablename FROM pg_tables WHERE tablename LIKE 'retroexit%'")
    return {name for (name,) in rows.fetchall()}


def run(address, statement):
    with retriever.connection(address) as server:
        return server.execute(statement)


@pytest.mark.parametrize("index", ["hnsw", "exact"])
def test_wide_keys_are_found_and_another_machine_finds_the_table_again(
    index, postgres_server, tmp_path, monkeypatch, caplog
):
    keys, queries = (
        torch.randn(150, 900 if index == "hnsw" else 2100),
        torch.randn(40, 900 if index == "hnsw" else 2100),
    )
    queries = keys[:40] + queries
    expected = ExactRetriever().build(keys).search(queries, 2)
    built = PgvectorRetriever(index=index, address=postgres_server).build(keys)
    assert torch.equal(built.search(queries, 2).ids, expected.ids)
    built.save(tmp_path / "index")
    text = b"".join(path.read_bytes() for path in (tmp_path / "index").iterdir() if path.suffix != ".npy").decode()
    assert built.table in text and postgres_server not in text and "postgres" not in text
    with monkeypatch.context() as patched:
        patched.setattr(PgvectorRetriever, "_build", lambda *_: pytest.fail("built again"))
        loaded = PgvectorRetriever.load(tmp_path / "index")
    assert loaded.table == built.table and loaded.options["index"] == index
    assert torch.equal(pickle.loads(pickle.dumps(loaded)).search(queries, 2).ids, expected.ids)
    # A server without the table gets it from the folder.
    run(postgres_server, f"DROP TABLE {built.table}")
    with pytest.raises(RetrieverError, match=r"no table retroexit_.* any more.*Load the bank again"):
        built.search(queries)
    with caplog.at_level(logging.WARNING, logger="retroexit"):
        again = PgvectorRetriever.load(tmp_path / "index")
    assert "building the index again from the keys" in caplog.text and again.table == built.table
    assert torch.equal(again.search(queries, 2).ids, expected.ids)


def build_slowly(keys):
    """Build in a forked process; it says "filled" inside the transaction, and goes on after a byte."""
    (said, say), (asked, ask) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        fill = retriever._fill

        def wait(*arguments):
            fill(*arguments)
            os.write(say, b"filled")
            os.read(asked, 1)

        retriever._fill = wait
        PgvectorRetriever().build(keys)
        os._exit(0)
    return child, lambda: os.read(said, 6), lambda: os.write(ask, b"!")


def test_a_killed_build_leaves_no_table_and_two_builds_make_one(postgres_server):
    keys = torch.randn(200, 16)
    before = tables(postgres_server)
    first, heard, _ = build_slowly(keys)
    assert heard() == b"filled" and tables(postgres_server) == before
    second, heard, go_on = build_slowly(keys)  # waits for the first
    os.kill(first, signal.SIGKILL)
    assert heard() == b"filled"  # found nothing, and began anew
    go_on()
    assert [os.waitpid(child, 0)[1] for child in (first, second)] == [signal.SIGKILL, 0]
    (table,) = tables(postgres_server) - before
    # The options of the search do not change the table, those of the graph do.
    assert [PgvectorRetriever(**more).build(keys).table == table for more in ({}, {"ef": 9}, {"M": 8})] == [1, 1, 0]


def test_a_bank_is_saved_and_loaded_with_it(postgres_server, tmp_path):
    features = torch.randn(20, 4, 2, 2)
    stream = ((features[i : i + 5], list(range(i, i + 5))) for i in range(0, 20, 5))
    bank = build_bank(stream, lambda rows: features[rows], size=50, retriever=PgvectorRetriever())
    bank.save(tmp_path / "bank")
    loaded = GuidanceBank.load(tmp_path / "bank", retriever_class=PgvectorRetriever)
    assert torch.equal(loaded.guide(features), bank.guide(features))


@pytest.mark.parametrize(
    ("options", "width", "message"),
    [
        ({"index": "ivf"}, 8, "index must be one of auto, hnsw, exact, got 'ivf'"),
        ({"M": 1}, 8, "M must be 2 to 100, got 1"),
        ({"ef_construction": 20}, 8, "ef_construction must be 32 to 1000, got 20"),
        ({"ef": 2000}, 8, "ef must be 1 to 1000, got 2000"),
        (
            {"index": "hnsw"},
            2001,
            "at most 2,000 numbers for the index 'hnsw' of pgvector, got 2,001. Pass index=exact",
        ),
        ({}, 16_001, "at most 16,000 numbers .* got 16,001. Use another retriever, or cut smaller patches"),
    ],
)
def test_wrong_options_are_refused_before_the_server_is_asked(options, width, message):
    with pytest.raises(OptionError, match=message):
        PgvectorRetriever(**options, address="host=/nowhere").build(torch.randn(3, width))


def test_a_server_that_is_absent_or_lacks_something_is_told_what_to_do(postgres_server, monkeypatch):
    keys = torch.randn(5, 3)
    monkeypatch.setenv(ADDRESS, "host=/nowhere")
    with pytest.raises(RetrieverError, match=rf"cannot be reached: .*Start the server, or set {ADDRESS} to its"):
        PgvectorRetriever().build(keys)
    run(postgres_server, "CREATE ROLE guest LOGIN")
    with pytest.raises(RetrieverError, match=r"permission denied.*administrator run: .* GRANT"):
        PgvectorRetriever(address=postgres_server.replace("user=postgres", "user=guest")).build(keys)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'retroexit\[pgvector\]'"):
        PgvectorRetriever().build(torch.randn(5, 3))
