"""Nearest neighbours in PostgreSQL, all queries of a call in one statement. The only module that imports psycopg."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from retroexit.errors import MissingExtraError, OptionError, RetrieverError
from retroexit.retrieval import Retriever

ADDRESS = "RETROEXIT_PGVECTOR"
"""Environment variable with the server's address, a URL or libpq's ``key=value`` words."""

Index = Literal["auto", "hnsw", "exact"]
_GRAPH_WIDTH, _WIDEST = 2_000, 16_000  # numbers per key that pgvector takes into a graph, and into a column
_MOST = 1_000  # largest hnsw.ef_search
_BUILDING = 0x7265_7472  # the advisory lock of CREATE EXTENSION, which is not safe in two sessions at once


class PgvectorRetriever(Retriever):
    """Search in a table of a PostgreSQL server, which all processes with the same keys share.

    Several processes can build and search at once. A table appears when it is complete, or not at all. The search
    graph works in single precision; the distances that are returned are exact.

    Args:
        index: ``"hnsw"``, a graph over keys of up to 2,000 numbers; ``"exact"``, every key is compared; ``"auto"``, the
            graph where it can be had.
        M: Links per key, 2 to 100.
        ef_construction: Candidates held while a key is inserted, ``2 * M`` to 1,000.
        ef: Candidates held while searching, 1 to 1,000.
        address: Of the server; by default that in ``RETROEXIT_PGVECTOR``, else libpq's own variables, such as
            ``PGHOST``. It is not saved.
        threads: Recorded only: the server decides.

    Raises:
        OptionError: If an option is out of range; on `build`, if keys are too wide for the index.
        MissingExtraError: If psycopg or pgvector is not installed.
        RetrieverError: On `build`, `search` and `load`, if the server cannot be reached, has no pgvector, or lacks the
            rights; on `search`, if the table was removed.
    """

    name = "pgvector"

    def __init__(
        self,
        *,
        index: Index = "auto",
        M: int = 16,
        ef_construction: int = 200,
        ef: int = 64,
        address: str | None = None,
        threads: int = 1,
    ) -> None:
        super().__init__(threads=threads, index=index, M=M, ef_construction=ef_construction, ef=ef)
        if index not in get_args(Index):
            raise OptionError(f"index must be one of {', '.join(get_args(Index))}, got {index!r}")
        ranges = (("M", M, 2, 100), ("ef_construction", ef_construction, 2 * M, 1000), ("ef", ef, 1, _MOST))
        for option, value, least, most in ranges:
            if not least <= value <= most:
                raise OptionError(f"{option} must be {least} to {most}, got {value}")
        self._address = address
        self._table = ""

    @property
    def table(self) -> str:
        """Name of the table, after `build` or `load`: ``retroexit_`` and a hash of keys and index."""
        return self._table

    def _build(self, keys: np.ndarray) -> None:
        graph = self._has_graph(keys.shape[1])
        links = {name: self.options[name] for name in ("M", "ef_construction")} if graph else {}
        digest = hashlib.sha256(json.dumps([keys.shape, links]).encode())
        digest.update(np.ascontiguousarray(keys).data)
        table = f"retroexit_{digest.hexdigest()[:32]}"
        with self._server() as server, server.transaction():
            # Who waits here finds the table complete; who dies leaves none.
            server.execute("SELECT pg_advisory_xact_lock(%s)", [int.from_bytes(digest.digest()[:7])])
            if not _exists(server, table):
                _fill(server, table, keys)
                if graph:
                    with_links = f"m = {links['M']}, ef_construction = {links['ef_construction']}"
                    server.execute(f"CREATE INDEX ON {table} USING hnsw (key vector_l2_ops) WITH ({with_links})")
        self._table = table

    def _search(self, queries: np.ndarray, k: int) -> np.ndarray:
        ids = np.full((len(queries), k), -1)
        found = np.zeros(len(queries), np.int64)
        with self._server() as server, server.transaction():
            if self._has_graph(queries.shape[1]):
                server.execute(f"SET LOCAL hnsw.ef_search = {min(_MOST, max(self.options['ef'], k))}")
                server.execute("SET LOCAL enable_seqscan = off")
            rows = server.execute(
                f"SELECT q.row, n.id FROM unnest(%b::vector[]) WITH ORDINALITY q(key, row), LATERAL "
                f"(SELECT id FROM {self._table} ORDER BY key <-> q.key LIMIT %s) n",
                [list(queries), k],
                binary=True,
            )
            for row, number in rows:
                ids[row - 1, found[row - 1]] = number
                found[row - 1] += 1
        return ids

    def _has_graph(self, width: int) -> bool:
        index = self.options["index"]
        most = _GRAPH_WIDTH if index == "hnsw" else _WIDEST
        if width > most:
            raise OptionError(
                f"keys must have at most {most:,} numbers for the index {index!r} of pgvector, got {width:,}. "
                f"{'Pass index=exact' if width <= _WIDEST else 'Use another retriever'}, or cut smaller patches."
            )
        return index != "exact" and width <= _GRAPH_WIDTH

    def _dump(self, path: Path) -> None:
        path.write_text(self._table)

    def _restore(self, path: Path) -> None:
        table = path.read_text()
        with self._server() as server:
            if not _exists(server, table):
                raise RetrieverError(f"the server has no table {table}")
        self._table = table

    @contextmanager
    def _server(self) -> Iterator[Any]:
        """Use a connection; errors of the server become ours."""
        psycopg = _psycopg()
        try:
            with connection(self._address or os.environ.get(ADDRESS, "")) as server:
                yield server
        except psycopg.errors.UndefinedTable as error:
            raise RetrieverError(
                f"the server has no table {self._table} any more: it was removed, or the server is another one. Load "
                "the bank again, which makes the table."
            ) from error
        except psycopg.errors.InsufficientPrivilege as error:
            raise RetrieverError(
                f"the server refused: {_reason(error)}. Have its administrator run: CREATE EXTENSION vector; and GRANT "
                "CREATE, USAGE ON SCHEMA public TO the user."
            ) from error
        except (psycopg.errors.FeatureNotSupported, psycopg.errors.UndefinedFile) as error:
            raise RetrieverError(
                f"the server must have the extension pgvector: {_reason(error)}. Install it there, on Debian "
                "the package postgresql-NN-pgvector of the server's version NN."
            ) from error
        except psycopg.OperationalError as error:
            raise RetrieverError(
                f"PostgreSQL cannot be reached: {_reason(error)}. Start the server, or set {ADDRESS} to its address, "
                "such as postgresql://user@host:5432/database."
            ) from error


def _psycopg() -> Any:
    try:
        import pgvector.psycopg  # noqa: F401
        import psycopg
    except ImportError as error:
        raise MissingExtraError(
            "the retriever 'pgvector' needs psycopg and pgvector: pip install 'retroexit[pgvector]'"
        ) from error
    return psycopg


_idle: dict[tuple[int, str], list[Any]] = {}  # open connections by process and address


@contextmanager
def connection(address: str) -> Iterator[Any]:
    """Use an idle connection to a server, or open one; a forked process opens its own."""
    pool = _idle.setdefault((os.getpid(), address), [])
    opened = pool.pop() if pool else _connect(address)
    try:
        yield opened
    finally:
        if not opened.closed:
            pool.append(opened)


@atexit.register
def close() -> None:
    """Close the idle connections of this process."""
    for pool in (pool for (process, _), pool in _idle.items() if process == os.getpid()):
        while pool:
            pool.pop().close()


def _connect(address: str) -> Any:
    import pgvector.psycopg
    import psycopg

    opened = psycopg.connect(address, autocommit=True, connect_timeout=10)
    try:
        with opened.transaction():
            opened.execute("SELECT pg_advisory_xact_lock(%s)", [_BUILDING])
            if not opened.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'").fetchone():
                opened.execute("CREATE EXTENSION vector")
        pgvector.psycopg.register_vector(opened)
    except BaseException:
        opened.close()
        raise
    return opened


def _exists(server: Any, table: str) -> bool:
    return bool(server.execute("SELECT to_regclass(%s) IS NOT NULL", [table]).fetchone()[0])


def _fill(server: Any, table: str, keys: np.ndarray) -> None:
    server.execute(f"CREATE TABLE {table} (id integer PRIMARY KEY, key vector({keys.shape[1]}) NOT NULL)")
    if keys.shape[1] <= _GRAPH_WIDTH:  # fits into a page: compared without a detour
        server.execute(f"ALTER TABLE {table} ALTER key SET STORAGE PLAIN")
    with server.cursor().copy(f"COPY {table} FROM STDIN (FORMAT binary)") as copy:
        copy.set_types(["int4", "vector"])
        for number, key in enumerate(keys):
            copy.write_row((number, key))


def _reason(error: Exception) -> str:
    """Return the first line of a server's message."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
