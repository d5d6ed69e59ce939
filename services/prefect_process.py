"""`python -m services.prefect_process server start ...`: Prefect's command line, with SQLite transactions that wait for each other.

Prefect begins most transactions on SQLite as readers. One that writes later on fails at once when another has written in
between, the API answers 503, and the client tries again two seconds later: every tenth run that an event asked for. Begun as
writers they wait, for milliseconds. See docs/decisions/0007-sqlite-transactions-that-wait.md.
"""

import runpy
import sys
from contextlib import AbstractAsyncContextManager
from typing import Any


def let_transactions_wait() -> None:
    """Make every transaction on SQLite begin with BEGIN IMMEDIATE. Reads outside of transactions are as before."""
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    def begin_as_writer(self: Any, session: Any, with_for_update: bool = False) -> AbstractAsyncContextManager[Any]:
        return begin(self, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = begin_as_writer  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    let_transactions_wait()
    sys.argv[0] = "prefect"
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
