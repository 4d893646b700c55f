"""A guidance bank whose index several machines share: the search back-end ``"pgvector"``, on PostgreSQL with pgvector.

```python
os.environ["RETROEXIT_PGVECTOR"] = "postgresql://user@host:5432/database"  # or libpq's PGHOST, PGDATABASE, ...
model = retroexit.wrap(generator, guidance=retroexit.Guidance(size=100_000, retriever="pgvector"))
retroexit.fit(model, samples, "runs/guided")
```

The keys go to a table that is named after their content. A saved folder holds that name and the keys, and nothing of
the server: where it is loaded, the environment says which server to search. If that server has no such table, it is
made from the keys of the folder. No table is ever removed: ``DROP TABLE`` those of banks that you deleted.
"""

from __future__ import annotations

from retroexit.plugins import hookimpl
from retroexit.retrieval import Retriever
from retroexit_pgvector.retriever import ADDRESS, PgvectorRetriever

__all__ = ["ADDRESS", "PgvectorRetriever", "retroexit_retrievers"]


@hookimpl
def retroexit_retrievers() -> dict[str, type[Retriever]]:
    """Offer the back-end."""
    return {PgvectorRetriever.name: PgvectorRetriever}
