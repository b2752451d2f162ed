"""The installation's secret: keyed hashes in place of identifiers, encryption of what is personal."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import secrets
import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple

import msgspec
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from features.events.event import Event, SealedEvent, identity_key
from features.events.identifiers import RANK, IdentifierKind, holds_personal
from features.state.disk import PRIVATE_FILE, write_atomically
from features.state.home import Home, MissingStateError
from features.state.settings import Settings

_HASH_BYTES: Final = 16
_NO_TIME: Final = datetime(1970, 1, 1, tzinfo=UTC)
IDENTIFIER: Final = "identifier"


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

    The secret is ``UBIQUO_SECRET``, or else the file ``secret.key`` of the home, made at the first use. Without it the
    contact table cannot be read and no identifier found again: back it up apart from the data.
    """

    def __init__(self, secret: bytes) -> None:
        uses = ("identifiers", "tombstones", "personal")
        derived = {use: HKDF(SHA256(), 32, salt=None, info=use.encode()).derive(secret) for use in uses}
        self._identifiers = derived["identifiers"]
        self._tombstones = derived["tombstones"]
        self._fernet = Fernet(base64.urlsafe_b64encode(derived["personal"]))

    @classmethod
    def open(cls, home: Home) -> Vault:
        """The vault of *home*; its secret is made if there is none yet.

        Raises:
            MissingStateError: the home holds events, but its secret is gone, or they were written before there was one.
        """
        given = Settings.from_environment().secret
        if given:
            if len(given) < 32:
                raise ValueError("UBIQUO_SECRET is too short: use 32 characters or more, such as `openssl rand -hex 32` prints")
            return cls(given.encode())._checked(home)
        if not home.secret.exists():
            if home.events.exists():
                raise MissingStateError(
                    f"{home.secret} is missing, and the identifiers in {home.events} mean nothing without it: put it back, or import "
                    "again into another UBIQUO_HOME"
                )
            with home.locked("secret"):
                if not home.secret.exists():
                    write_atomically(home.secret, secrets.token_hex(32).encode(), PRIVATE_FILE)
        return cls(home.secret.read_bytes().strip())._checked(home)

    def _checked(self, home: Home) -> Vault:
        """This vault, if it is the one that the home was made with; that is noted beside the data at the first use."""
        mark, mine = home.root / "secret.check", self.tombstone("the secret of this home").encode()
        if not mark.exists():
            self._check_contacts(home)
            # a home that cannot be written to says so elsewhere
            with contextlib.suppress(OSError):
                write_atomically(mark, mine, PRIVATE_FILE)
        elif mark.read_bytes() != mine:
            raise WrongSecretError(
                f"{home.root} was made with another secret: put secret.key or UBIQUO_SECRET back. With this one nobody would be known again"
            )
        return self

    def _check_contacts(self, home: Home) -> None:
        if not home.contacts.exists():
            return
        with contextlib.closing(sqlite3.connect(f"file:{home.contacts}?mode=ro", uri=True)) as db, contextlib.suppress(sqlite3.Error):
            for (token,) in db.execute("SELECT token FROM contacts LIMIT 1"):
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
