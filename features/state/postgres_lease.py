"""Leases of many machines: advisory locks of PostgreSQL, which the server frees when the connection of their holder ends."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

from features.state.ports import LeaseLostError, LeaseTakenError
from features.state.postgres import lock_number
from features.state.postgres_server import WRITE_SECONDS, PatientConnection, PostgresServer, is_error

ASKED_AGAIN_SECONDS = 5.0
"""For how long one question for a lease waits at the server; the next one sees whether the network still works."""
KEPT_CONNECTIONS = 4
BEAT_SECONDS, LOST_SECONDS = 4.0, 20
"""How often a holder shows that it lives, and after how long a silence the server gives its leases to others."""


class PostgresHeld:
    """A lease that is held, on a connection of its own."""

    def __init__(self, lease: PostgresLease, name: str, shared: bool, connection: PatientConnection) -> None:
        self._lease, self._name, self._shared, self._connection = lease, name, shared, connection
        self._is_closed = False
        self._asking = threading.Lock()
        lease.beats_for(self)

    def still_held(self) -> bool:
        """Whether nobody else can have it: the server is asked."""
        with self._asking, contextlib.suppress(Exception):
            if not self._is_closed:
                self._connection.execute("SELECT 1")
                return True
        return False

    def close(self) -> None:
        """Let go of it.

        Raises:
            LeaseLostError: it had been lost meanwhile.
        """
        with self._asking:
            if self._is_closed:
                return
            self._is_closed = True
            self._lease.beats_no_more_for(self)
            unlock = f"SELECT pg_advisory_unlock{'_shared' if self._shared else ''}(%s)"
            try:
                row = self._connection.execute(unlock, (self._lease.number(self._name),)).fetchone()
            except Exception as error:
                self._connection.close()
                if not is_error(error):
                    raise
                raise self._lost(error) from error
            if row is None or not row[0]:
                self._connection.close()
                raise self._lost("the server knows nothing of it")
            self._lease.give_back(self._connection)

    def _lost(self, why: object) -> LeaseLostError:
        return LeaseLostError(f"the lease {self._name} was lost while it was held ({why}): somebody else may have had it meanwhile")

    def __enter__(self) -> PostgresHeld:
        return self

    def __exit__(self, kind: object, error: object, traceback: object, /) -> None:
        try:
            self.close()
        except LeaseLostError:
            # what went wrong within says more
            if error is None:
                raise


class PostgresLease:
    """The leases of one installation: an advisory lock a name, each on a connection that nothing else uses meanwhile."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._guard = threading.Lock()
        self._idle: list[PatientConnection] = []
        self._held: set[PostgresHeld] = set()
        self._beating: threading.Thread | None = None
        self._process = os.getpid()

    @contextlib.contextmanager
    def hold(self, name: str, *, shared: bool = False) -> Iterator[PostgresHeld]:
        """Hold the lease *name*, alone or *shared*, having waited for it.

        Raises:
            UnreachableDatabaseError: the server does not answer.
            LeaseLostError: at the end; it was lost meanwhile.
        """
        with self._waited_for(name, shared) as held:
            yield held

    def take(self, name: str, *, shared: bool = False) -> PostgresHeld:
        """Hold the lease *name* at once, until it is closed.

        Raises:
            LeaseTakenError: somebody holds it.
            UnreachableDatabaseError: as ``hold``.
        """
        connection, got = self._asked(f"SELECT pg_try_advisory_lock{'_shared' if shared else ''}(%s)", name)
        if not got:
            self.give_back(connection)
            raise LeaseTakenError(f"another process holds the lease {name} in {self._server.place}: let it end first")
        return PostgresHeld(self, name, shared, connection)

    def beats_for(self, held: PostgresHeld) -> None:
        """Show now and then that the holder lives: one behind a network that hangs, or stopped, must not keep others waiting for ever."""
        with self._guard:
            self._mine()
            self._held.add(held)
            if self._beating is None:
                self._beating = threading.Thread(target=self._beat, name="ubiquo-leases", daemon=True)
                self._beating.start()

    def beats_no_more_for(self, held: PostgresHeld) -> None:
        """It is held no more."""
        with self._guard:
            self._held.discard(held)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            with self._guard:
                held = tuple(self._held)
                if not held:
                    self._beating = None
                    return
            for each in held:
                each.still_held()

    @staticmethod
    def number(name: str) -> int:
        """The advisory lock of a lease."""
        return lock_number(f"lease:{name}")

    def give_back(self, connection: PatientConnection) -> None:
        """Keep a connection for the next lease."""
        with self._guard:
            if len(self._mine()) < KEPT_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()

    def _waited_for(self, name: str, shared: bool) -> PostgresHeld:
        statement = f"SELECT pg_advisory_lock{'_shared' if shared else ''}(%s)"
        while True:
            # one that the server has not given in time is asked for again: a network that hangs is noticed by that
            connection, got = self._asked(statement, name)
            if got:
                return PostgresHeld(self, name, shared, connection)
            self.give_back(connection)

    def _asked(self, statement: str, name: str) -> tuple[PatientConnection, bool]:
        """A connection on which it was asked for a lease, and whether it was given."""
        while True:
            connection, is_new = self._connection()
            try:
                row = connection.execute(statement, (self.number(name),)).fetchone()
                return connection, row is not None and row[0] is not False
            except Exception as error:
                if getattr(error, "sqlstate", None) == "55P03":
                    return connection, False
                connection.close()
                if not is_error(error):
                    raise
                lost = self._server.lost(error)
                # one that was kept may have been lost long ago; none of them is older than the loss of all
                if is_new or lost.is_silent:
                    raise lost from error

    def _connection(self) -> tuple[PatientConnection, bool]:
        with self._guard:
            if self._mine():
                return self._idle.pop(), False
        patience = ASKED_AGAIN_SECONDS + WRITE_SECONDS
        waits = {"lock_timeout": f"{round(ASKED_AGAIN_SECONDS * 1000)}", "idle_session_timeout": f"{LOST_SECONDS * 1000}"}
        return self._server.opened(patience, **waits), True

    def _mine(self) -> list[PatientConnection]:
        if self._process != os.getpid():
            # those of the process that this one was forked from
            self._process, self._idle, self._held, self._beating = os.getpid(), [], set(), None
        return self._idle
