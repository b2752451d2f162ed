"""API keys with scopes, hashed at rest, and the audit log of what was read of and done to customers and rules."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple, get_args

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from features.people.vault import Vault
from features.state.clock import microseconds, moment_of
from features.state.disk import DamagedStateError
from features.state.ports import Database, State, UnreachableError
from features.state.sql import BIG

logger = logging.getLogger("ubiquo")
Scope = Literal["ingest", "decide", "read_customer", "manage", "admin", "browser"]
"""Send events; ask for answers; open a customer; make and end merchandising rules; erase customers (``admin`` holds the others); do what a
page may do for its visitor."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
REFRESH_SECONDS = 5.0
"""How soon a new or revoked key counts in a running service."""


WAIT_SECONDS = 0.05
"""How long requests wait for whoever changes the keys."""
_META = sa.MetaData()
_KEYS = sa.Table(
    "keys",
    _META,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False, unique=True),
    sa.Column("scopes", sa.Text, nullable=False),
    sa.Column("created_at", BIG, nullable=False),
    sa.Column("revoked_at", BIG),
)
_AUDIT = sa.Table(
    "audit",
    _META,
    # SQLite has it in every table, made before or since
    sa.Column("rowid", BIG, primary_key=True),
    sa.Column("at", BIG, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
)


class Key(NamedTuple):
    """A key by its name, and what it may."""

    name: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        """Whether the key holds *scope*."""
        return scope in self.scopes or "admin" in self.scopes

    @property
    def is_public(self) -> bool:
        """Whether it stands in the source of a page, where everybody reads it."""
        return self.scopes == {"browser"}


_LINE = _AUDIT.c.at, _AUDIT.c.key, _AUDIT.c.action, _AUDIT.c.subject, _AUDIT.c.outcome


LOCAL = Key("local", frozenset(SCOPES))
"""Whoever speaks to a service on loopback that has no keys."""


class Keys:
    """The keys of one installation, and beside them ``UBIQUO_API_KEY``, which may everything.

    A key is 32 random bytes, so its SHA-256 cannot be guessed back; the key itself is shown once and kept nowhere.
    """

    def __init__(self, state: State) -> None:
        self._database = _opened(state)
        self._lock = threading.Lock()
        self._known: dict[str, Key] = {}
        self._ever = False
        self._read_at = float("-inf")
        self._was_read, self._is_far = False, bool(state.settings.database)
        environment, self._loopback = state.settings.api_key, state.settings.loopback
        self._environment = _digest(environment) if environment else ""

    def create(self, name: str, scopes: Sequence[str], at: datetime) -> str:
        """A new key, to be handed over now.

        Raises:
            ValueError: an unknown scope, one that goes with no other, or the name is taken.
        """
        for scope in scopes:
            if scope not in SCOPES:
                raise ValueError(f"{scope!r} is no scope: use {', '.join(SCOPES)}")
        if "browser" in scopes and len(set(scopes)) > 1:
            raise ValueError("a key of the scope browser is read by everybody: make another key for the other scopes")
        if not scopes:
            raise ValueError(f"a key needs a scope: use {', '.join(SCOPES)}")
        token = "ubq_" + secrets.token_urlsafe(32)
        try:
            with self._database.begin() as connection:
                row = {"name": name, "digest": _digest(token), "scopes": " ".join(scopes), "created_at": microseconds(at)}
                connection.execute(sa.insert(_KEYS).values(row))
        except IntegrityError:
            raise ValueError(f"there is a key named {name!r} already: choose another name, or revoke it first") from None
        return token

    def revoke(self, name: str, at: datetime) -> None:
        """Let a key open nothing any more.

        Raises:
            ValueError: there is no such key in force.
        """
        in_force = sa.update(_KEYS).where(_KEYS.c.name == name, _KEYS.c.revoked_at.is_(None))
        with self._database.begin() as connection:
            changed = connection.execute(in_force.values(revoked_at=microseconds(at))).rowcount
        if not changed:
            raise ValueError(f"no key named {name!r} is in force")

    def listed(self) -> list[dict[str, Any]]:
        """Every key: name, scopes, made and revoked when."""
        columns = _KEYS.c.name, _KEYS.c.scopes, _KEYS.c.created_at, _KEYS.c.revoked_at
        with contextlib.closing(self._database.connect()) as session:
            rows = session.read(sa.select(*columns).order_by(_KEYS.c.created_at))
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
            is_due = time.monotonic() - self._read_at > REFRESH_SECONDS
            if is_due:
                self._read_at = time.monotonic()
                if self._is_far and self._was_read:
                    # whoever asks stands on the event loop, and a server may be silent
                    threading.Thread(target=self._try_to_refresh, name="ubiquo-keys", daemon=True).start()
                else:
                    self._try_to_refresh()
            return self._known

    def _try_to_refresh(self) -> None:
        try:
            self._refresh()
            self._was_read = True
        except UnreachableError as error:
            # it tells nothing new of keys: what was read stays in force, and where nothing ever was nobody is let in
            logger.warning("%s cannot be read (%s): the keys known before stay in force", self._database.place, error)
            self._ever = self._ever or not self._was_read
        except (SQLAlchemyError, DamagedStateError, OSError) as error:
            # those known stay in force; where none was ever read nobody is let in
            logger.warning("%s cannot be read (%s): the keys known before stay in force", self._database.place, error)
            self._ever = True

    def _refresh(self) -> None:
        if not self._database.exists:
            return
        # a file that was emptied has no tables, and must not get new ones here: that would open the doors
        with contextlib.closing(self._database.connect(WAIT_SECONDS, read_only=True)) as session:
            rows = session.read(sa.select(_KEYS.c.name, _KEYS.c.digest, _KEYS.c.scopes).where(_KEYS.c.revoked_at.is_(None)))
            # a shop that revoked its last key has not opened its doors
            self._ever = session.read(sa.select(sa.func.count()).select_from(_KEYS)) != [(0,)]
        self._known = {digest: Key(name, frozenset(scopes.split())) for name, digest, scopes in rows}


class Audit:
    """Who read or erased which customer, and when. The customer stands there as a keyed hash, so that it outlives their erasure."""

    def __init__(self, state: State, vault: Vault) -> None:
        self._database, self._vault = _opened(state), vault

    def note(self, at: datetime, key: str, action: str, customer_id: str, outcome: str) -> None:
        """Write one line; it is on the disk when this returns."""
        self.note_all(at, key, action, [customer_id], outcome)

    def note_all(self, at: datetime, key: str, action: str, customer_ids: Sequence[str], outcome: str) -> None:
        """Write one line a customer; they are on the disk when this returns."""
        same = {"at": microseconds(at), "key": key, "action": action, "outcome": outcome}
        rows = [{**same, "subject": self._vault.tombstone(customer_id)} for customer_id in customer_ids]
        with self._database.begin() as connection:
            connection.execute(sa.insert(_AUDIT), rows)

    def note_rule(self, at: datetime, key: str, action: str, rule_id: str, outcome: str) -> None:
        """Write one line about merchandising rules, which are nobody's: the subject is the rule's id, or nothing."""
        row = {"at": microseconds(at), "key": key, "action": action, "subject": rule_id, "outcome": outcome}
        with self._database.begin() as connection:
            connection.execute(sa.insert(_AUDIT).values(row))

    def lines(self, customer_id: str | None = None) -> list[dict[str, Any]]:
        """Every line, or those about one customer, oldest first."""
        # of one moment the order in which they were written
        query = sa.select(*_LINE).order_by(_AUDIT.c.at, _AUDIT.c.rowid)
        if customer_id:
            query = query.where(_AUDIT.c.subject == self._vault.tombstone(customer_id))
        with contextlib.closing(self._database.connect()) as session:
            rows = session.read(query)
        return [{"at": _moment(at), "key": k, "action": a, "subject": s, "outcome": o} for at, k, a, s, o in rows]

    def page(self, limit: int, offset: int = 0, key: str = "", action: str = "", customer_id: str = "") -> tuple[int, list[dict[str, Any]]]:
        """How many lines there are of a key, an action and a customer (or of every, where none is named), and some, newest first."""
        wanted = [column == said for column, said in ((_AUDIT.c.key, key), (_AUDIT.c.action, action)) if said]
        if customer_id:
            wanted.append(_AUDIT.c.subject == self._vault.tombstone(customer_id))
        query = sa.select(*_LINE).where(*wanted).order_by(_AUDIT.c.at.desc(), _AUDIT.c.rowid.desc()).limit(limit).offset(offset)
        with contextlib.closing(self._database.connect()) as session:
            [(count,)] = session.read(sa.select(sa.func.count()).select_from(_AUDIT).where(*wanted))
            rows = session.read(query)
        return int(count), [{"at": _moment(at), "key": k, "action": a, "subject": s, "outcome": o} for at, k, a, s, o in rows]

    def named(self) -> tuple[list[str], list[str]]:
        """The names of keys and the actions that stand in it."""
        with contextlib.closing(self._database.connect()) as session:
            keys, actions = (session.read(sa.select(column).distinct().order_by(column)) for column in (_AUDIT.c.key, _AUDIT.c.action))
        return [name for (name,) in keys], [action for (action,) in actions]


def _opened(state: State) -> Database:
    return state.database("access", _KEYS, _AUDIT)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _moment(at: int | None) -> datetime | None:
    return None if at is None else moment_of(at)
