"""API keys with scopes, hashed at rest, and the audit log of what was read of and done to customers."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, get_args

from features.people.vault import Vault
from features.state.clock import microseconds
from features.state.disk import transaction
from features.state.home import Home
from features.state.settings import Settings

logger = logging.getLogger("ubiquo")
Scope = Literal["ingest", "decide", "read_customer", "admin"]
"""Send events; ask for answers; open a customer; erase customers. ``admin`` holds the others."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
REFRESH_SECONDS = 5.0
"""How soon a new or revoked key counts in a running service."""


class Key(NamedTuple):
    """A key by its name, and what it may."""

    name: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        """Whether the key holds *scope*."""
        return scope in self.scopes or "admin" in self.scopes


LOCAL = Key("local", frozenset(SCOPES))
"""Whoever speaks to a service on loopback that has no keys."""


class Keys:
    """The keys of one home, in a SQLite file, and beside them ``UBIQUO_API_KEY``, which may everything.

    A key is 32 random bytes, so its SHA-256 cannot be guessed back; the key itself is shown once and kept nowhere.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._known: dict[str, Key] = {}
        self._ever = False
        self._read_at = float("-inf")
        settings = Settings.from_environment()
        environment, self._loopback = settings.api_key, settings.loopback
        self._environment = _digest(environment) if environment else ""

    def create(self, name: str, scopes: Sequence[str], at: datetime) -> str:
        """A new key, to be handed over now.

        Raises:
            ValueError: an unknown scope, or the name is taken.
        """
        for scope in scopes:
            if scope not in SCOPES:
                raise ValueError(f"{scope!r} is no scope: use {', '.join(SCOPES)}")
        if not scopes:
            raise ValueError(f"a key needs a scope: use {', '.join(SCOPES)}")
        token = "ubq_" + secrets.token_urlsafe(32)
        try:
            with _open(self._home) as db:
                db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, NULL)", (name, _digest(token), " ".join(scopes), microseconds(at)))
        except sqlite3.IntegrityError:
            raise ValueError(f"there is a key named {name!r} already: choose another name, or revoke it first") from None
        return token

    def revoke(self, name: str, at: datetime) -> None:
        """Let a key open nothing any more.

        Raises:
            ValueError: there is no such key in force.
        """
        with _open(self._home) as db:
            changed = db.execute("UPDATE keys SET revoked_at = ? WHERE name = ? AND revoked_at IS NULL", (microseconds(at), name)).rowcount
        if not changed:
            raise ValueError(f"no key named {name!r} is in force")

    def listed(self) -> list[dict[str, Any]]:
        """Every key: name, scopes, made and revoked when."""
        with _open(self._home) as db:
            rows = db.execute("SELECT name, scopes, created_at, revoked_at FROM keys ORDER BY created_at").fetchall()
        return [
            {"name": name, "scopes": scopes.split(), "created_at": _moment(created), "revoked_at": _moment(revoked)}
            for name, scopes, created, revoked in rows
        ]

    def any(self) -> bool:
        """Whether a key is needed."""
        return bool(self._environment) or bool(self._current())

    def check(self, token: str) -> Key | None:
        """The key that *token* is, or None. On loopback everybody may everything until the first key is made."""
        digest = _digest(token)
        if self._environment and hmac.compare_digest(digest, self._environment):
            return Key("environment", frozenset(SCOPES))
        known = self._current()
        if not self._environment and not self._ever and self._loopback:
            return LOCAL
        return known.get(digest)

    def _current(self) -> dict[str, Key]:
        with self._lock:
            if time.monotonic() - self._read_at > REFRESH_SECONDS:
                self._read_at = time.monotonic()
                try:
                    self._refresh()
                except sqlite3.Error as error:
                    # those known stay in force; where none was ever read nobody is let in
                    logger.warning("%s cannot be read (%s): the keys known before stay in force", self._home.access, error)
                    self._ever = True
            return self._known

    def _refresh(self) -> None:
        if not self._home.access.exists():
            return
        # only to read, and without waiting: requests wait for this
        with contextlib.closing(sqlite3.connect(f"file:{self._home.access}?mode=ro", uri=True, timeout=0.05)) as db:
            rows = db.execute("SELECT name, digest, scopes FROM keys WHERE revoked_at IS NULL").fetchall()
            # a shop that revoked its last key has not opened its doors
            self._ever = db.execute("SELECT count(*) FROM keys").fetchone() != (0,)
        self._known = {digest: Key(name, frozenset(scopes.split())) for name, digest, scopes in rows}


class Audit:
    """Who read or erased which customer, and when. The customer stands there as a keyed hash, so that it outlives her erasure."""

    def __init__(self, home: Home, vault: Vault) -> None:
        self._home, self._vault = home, vault

    def note(self, at: datetime, key: str, action: str, customer_id: str, outcome: str) -> None:
        """Write one line; it is on the disk when this returns."""
        with _open(self._home) as db:
            subject = self._vault.tombstone(customer_id)
            db.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?)", (microseconds(at), key, action, subject, outcome))

    def lines(self, customer_id: str | None = None) -> list[dict[str, Any]]:
        """Every line, or those about one customer, oldest first."""
        where, values = ("WHERE subject = ?", [self._vault.tombstone(customer_id)]) if customer_id else ("", [])
        with _open(self._home) as db:
            rows = db.execute(f"SELECT at, key, action, subject, outcome FROM audit {where} ORDER BY at, rowid", values).fetchall()
        return [{"at": _moment(at), "key": k, "action": a, "subject": s, "outcome": o} for at, k, a, s, o in rows]


def _open(home: Home) -> AbstractContextManager[sqlite3.Connection]:
    return transaction(
        home.access,
        "CREATE TABLE IF NOT EXISTS keys (name TEXT PRIMARY KEY, digest TEXT NOT NULL UNIQUE, scopes TEXT NOT NULL, "
        "created_at INTEGER NOT NULL, revoked_at INTEGER)",
        "CREATE TABLE IF NOT EXISTS audit (at INTEGER NOT NULL, key TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL, "
        "outcome TEXT NOT NULL)",
    )


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _moment(at: int | None) -> datetime | None:
    return None if at is None else datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at)
