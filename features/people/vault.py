"""The installation's secret: keyed hashes in place of identifiers, encryption of what is personal."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple

import msgspec
import sqlalchemy as sa
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy.exc import SQLAlchemyError

from features.events.event import Event, SealedEvent, identity_key
from features.events.identifiers import RANK, IdentifierKind, holds_personal
from features.state.disk import DamagedStateError
from features.state.ports import EVENTS, MissingStateError, State
from features.state.sql import BIG

_HASH_BYTES: Final = 16
_NO_TIME: Final = datetime(1970, 1, 1, tzinfo=UTC)
IDENTIFIER: Final = "identifier"


CONTACTS: Final = sa.Table(
    "contacts",
    sa.MetaData(),
    sa.Column("identity_key", sa.Text, primary_key=True),
    sa.Column("field", sa.Text, primary_key=True),
    sa.Column("known_at", BIG, nullable=False),
    sa.Column("token", sa.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
"""What is personal, encrypted, by the identifier that it came with."""


class WrongSecretError(MissingStateError):
    """What is stored was encrypted under another secret."""


class Personal(NamedTuple):
    """One thing about a person, in clear: for the contact table alone."""

    identity_key: str
    field: str
    """``identifier`` for the identifier itself, else the name of a trait."""
    value: str


class Sealed(NamedTuple):
    """An event parted into what may be stored and what is personal."""

    event: SealedEvent
    content_hash: str
    personal: list[Personal]


class Vault:
    """Hashes and encrypts under one secret, from which the key of each use is derived (HKDF, RFC 5869).

    On one machine the secret is ``UBIQUO_SECRET``, or else the file ``secret.key`` of the home, made at the first use. Without it the
    contact table cannot be read and no identifier found again: back it up apart from the data.
    """

    def __init__(self, secret: bytes) -> None:
        uses = ("identifiers", "tombstones", "personal", "webhooks")
        derived = {use: HKDF(SHA256(), 32, salt=None, info=use.encode()).derive(secret) for use in uses}
        self._identifiers = derived["identifiers"]
        self._tombstones, self._webhooks = derived["tombstones"], derived["webhooks"]
        self._fernet = Fernet(base64.urlsafe_b64encode(derived["personal"]))

    @classmethod
    def open(cls, state: State) -> Vault:
        """The vault of an installation; its secret is made if there is none yet.

        Raises:
            MissingStateError: there are events, but the secret is gone, or they were written before there was one.
        """
        secret = state.secrets.find()
        if secret is None:
            if state.tables[EVENTS].exists:
                raise MissingStateError(
                    f"{state.secrets.place} is missing, and the identifiers of the events in {state.place} mean nothing without it: put it "
                    "back, or import again into another UBIQUO_HOME"
                )
            secret = state.secrets.make()
        return cls(secret)._checked(state)

    def _checked(self, state: State) -> Vault:
        """This vault, if it is the one that the data were made with; that is noted beside them at the first use."""
        marked, mine = state.secrets.marked(), self.tombstone("the secret of this home").encode()
        if marked is None:
            self._check_contacts(state)
            # where nothing can be written somebody else says so
            with contextlib.suppress(OSError):
                state.secrets.mark(mine)
        elif marked != mine:
            raise WrongSecretError(
                f"{state.place} was made with another secret: put secret.key or UBIQUO_SECRET back. With this one nobody would be known "
                "again"
            )
        return self

    def _check_contacts(self, state: State) -> None:
        database = state.database("contacts", CONTACTS)
        if not database.exists:
            return
        tokens: list[bytes] = []
        # what cannot be read is told by whoever needs it
        with (
            contextlib.suppress(SQLAlchemyError, DamagedStateError, OSError),
            contextlib.closing(database.connect(read_only=True)) as session,
        ):
            tokens = [token for (token,) in session.read(sa.select(CONTACTS.c.token).limit(1))]
        for token in tokens:
            self.decrypt(token)

    def key(self, kind: str, value: str) -> str:
        """The identity key of an identifier in its compared form: its kind and a keyed hash."""
        return f"{kind}:{self.hash(kind, value)}"

    def hash(self, kind: str, value: str) -> str:
        """The keyed hash (32 hexadecimal digits) that stands for an identifier everywhere but in the contact table."""
        return hashlib.blake2b(f"{kind}:{value}".encode(), digest_size=_HASH_BYTES, key=self._identifiers).hexdigest()

    def keys(self, identifiers: Mapping[IdentifierKind, str]) -> list[str]:
        """The identity keys of normalised *identifiers*, the strongest first."""
        return [self.key(kind, identifiers[kind]) for kind in sorted(identifiers, key=RANK.__getitem__)]

    def seal(self, event: Event, timeless: bool = False) -> Sealed:
        """Part the event into what may be stored and what is personal; *timeless*: its time is no part of what it says."""
        fields = msgspec.structs.asdict(event)
        fields["identifiers"] = {kind: self.hash(kind, value) for kind, value in event.identifiers.items()}
        if event.previous:
            fields["previous"] = {kind: self.hash(kind, value) for kind, value in event.previous.items()}
        fields["personal"] = {}
        if event.session_id and holds_personal(event.session_id):
            fields["session_id"] = self.hash("session", event.session_id)
        sealed = SealedEvent(**fields)
        personal = [
            Personal(f"{kind}:{sealed_by[kind]}", IDENTIFIER, value)
            for clear, sealed_by in ((event.identifiers, sealed.identifiers), (event.previous, sealed.previous))
            for kind, value in clear.items()
        ]
        owner = identity_key(sealed)
        if owner is not None:
            personal += [Personal(owner, field, value) for field, value in event.personal.items()]
        return Sealed(sealed, self._content_hash(event, timeless), personal)

    def _content_hash(self, event: Event, timeless: bool) -> str:
        """A keyed digest of everything the event says; equal for a faithful repeat, different for a conflict."""
        content = msgspec.json.encode(msgspec.structs.replace(event, occurred_at=_NO_TIME) if timeless else event, order="sorted")
        return hashlib.blake2b(content, digest_size=_HASH_BYTES, key=self._identifiers).hexdigest()

    def tombstone(self, key: str) -> str:
        """What is left of an identity key once its person is erased: it can be compared, and nothing else."""
        return hashlib.blake2b(key.encode(), digest_size=_HASH_BYTES, key=self._tombstones).hexdigest()

    def webhook_key(self, sink: str) -> bytes:
        """The secret with which webhooks to a sink are signed."""
        return hashlib.blake2b(sink.encode(), digest_size=32, key=self._webhooks).digest()

    def encrypt(self, content: bytes) -> bytes:
        """An authenticated token (Fernet) that only this secret opens."""
        return self._fernet.encrypt(content)

    def decrypt(self, token: bytes) -> bytes:
        """What was encrypted.

        Raises:
            WrongSecretError: under another secret, or the token was changed.
        """
        try:
            return self._fernet.decrypt(token)
        except InvalidToken:
            raise WrongSecretError("what is stored was encrypted under another secret: put secret.key or UBIQUO_SECRET back") from None
