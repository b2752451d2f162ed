"""The engine of many machines: databases and leases of one PostgreSQL server."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Table

from features.state.postgres import PostgresDatabase, PostgresKeeping
from features.state.postgres_lease import PostgresLease
from features.state.postgres_migrations import bring_up
from features.state.postgres_server import server_at


class PostgresState:
    """What of an installation lies on the server that *url* names."""

    def __init__(self, url: str) -> None:
        self.server = server_at(url)

    def lease(self) -> PostgresLease:
        """Who may do what only one may do."""
        return PostgresLease(self.server)

    def database(self, name: str, tables: Sequence[Table], *, is_lasting: bool, is_durable: bool, counts: bool) -> PostgresDatabase:
        """The database *name*: what lasts is made by migrations, what follows from elsewhere by its users."""
        return PostgresDatabase(self.server, name, tables, PostgresKeeping(is_durable, counts, bring_up if is_lasting else None))

    def relieve(self) -> int:
        """End the transactions of silent clients for whose locks others wait; returns how many."""
        return self.server.relieve()
