"""Leases and the secret of one machine: locked files, which the operating system frees when their process dies."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from features.state.disk import PRIVATE_FILE, make_folder, write_atomically
from features.state.ports import Lease, LeaseTakenError

SHORTEST_SECRET = 32
_LOCK = "in-use"


class FileHeld:
    """A locked file, which stays locked until it is closed."""

    def __init__(self, handle: IO[str]) -> None:
        self._handle = handle

    def still_held(self) -> bool:
        """Whether it was not closed: the operating system takes a lock from nobody."""
        return not self._handle.closed

    def close(self) -> None:
        """Let go of it."""
        self._handle.close()

    def __enter__(self) -> FileHeld:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()


class FileLease:
    """The leases of one home: a file ``NAME.lock`` each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def hold(self, name: str, *, shared: bool = False) -> Iterator[FileHeld]:
        """Hold the lease *name*, alone or *shared*, having waited for it."""
        with self._opened(name) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield FileHeld(handle)

    def take(self, name: str, *, shared: bool = False) -> FileHeld:
        """Hold the lease *name* at once, until it is closed.

        Raises:
            LeaseTakenError: somebody holds it.
        """
        handle = self._opened(name)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise LeaseTakenError(f"another process holds {name}.lock of {self._folder}: let it end first") from None
        return FileHeld(handle)

    def _opened(self, name: str) -> IO[str]:
        make_folder(self._folder)
        return open(self._folder / f"{name}.lock", "w")


class FileSecrets:
    """The secret that the settings give, or else a file of the home.

    Args:
        folder: the home.
        given: what the settings say; empty where they say nothing.
        lease: so that two processes do not make two secrets.
    """

    def __init__(self, folder: Path, given: str, lease: Lease) -> None:
        self._file, self._mark, self._given, self._lease = folder / "secret.key", folder / "secret.check", given, lease

    @property
    def place(self) -> str:
        """The file that the secret lies in unless the settings give one."""
        return str(self._file)

    def find(self) -> bytes | None:
        """The secret, or None where there is none yet.

        Raises:
            ValueError: the one that the settings give is too short.
        """
        if self._given:
            if len(self._given) < SHORTEST_SECRET:
                raise ValueError("UBIQUO_SECRET is too short: use 32 characters or more, such as `openssl rand -hex 32` prints")
            return self._given.encode()
        return self._file.read_bytes().strip() if self._file.exists() else None

    def make(self) -> bytes:
        """A new secret, kept for good; where somebody has just made one, theirs."""
        with self._lease.hold("secret"):
            if not self._file.exists():
                write_atomically(self._file, secrets.token_hex(SHORTEST_SECRET).encode(), PRIVATE_FILE)
        return self._file.read_bytes().strip()

    def marked(self) -> bytes | None:
        """The mark of the secret that the home was made with, or None."""
        return self._mark.read_bytes() if self._mark.exists() else None

    def mark(self, mark: bytes) -> None:
        """Note *mark* beside the data."""
        write_atomically(self._mark, mark, PRIVATE_FILE)


class _Open(Protocol):
    def fileno(self) -> int:
        """The descriptor."""


def use(path: Path, file: _Open) -> None:
    """Have *file*, which is *path*, count as in use until it is closed, or its process ends."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LeaseTakenError(f"another process holds {path}") from None


def is_in_use(path: Path) -> bool:
    """Whether a process uses the file."""
    try:
        # for writing: on a volume that machines share, NFS for one, only such a file can be locked alone
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class Scratch:
    """A folder for what one process spills to the disk; it is in use until it is closed."""

    def __init__(self, home: Path, kind: str) -> None:
        self.folder = home / f"{kind}-{uuid.uuid4().hex}"
        made = self.folder.with_name(f"new-{self.folder.name}")
        make_folder(made)
        # it gets its name once it is in use, so that nobody clears it in between
        self._lock = open(made / _LOCK, "w")  # noqa: SIM115 - closed with the scratch
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        made.rename(self.folder)

    def close(self) -> None:
        """Delete it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    @staticmethod
    def clear(home: Path, kind: str) -> None:
        """Delete what scratches that are closed, or whose process was killed, have left on the disk."""
        for folder in home.glob(f"{kind}-*"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), open(folder / _LOCK, "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
