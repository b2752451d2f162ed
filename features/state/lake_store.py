"""Objects below one address of an S3 store: what lies there, read, written and deleted.

By Arrow's client. That of deltalake, which reads and writes the tables, keeps the whole process waiting while it lists or deletes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, NamedTuple

from pyarrow.fs import AwsStandardS3RetryStrategy, FileSelector, FileType, S3FileSystem

from features.state.delta import DeltaError
from features.state.disk import PRIVATE_FILE, DamagedStateError, NoSpaceError, make_folder, move_into_place
from features.state.ports import UnreachableError
from features.state.settings import ObjectStore

SECONDS = {"request": 20, "silence": 8, "connect": 5}
"""How long one request may take, how long a store may say nothing, and how long it may take to reach it."""
TRIES = 2
"""After so many a store is given up: whoever waits is told within half a minute, and tries again later."""
AT_ONCE = 8
"""How many objects are fetched, or deleted, at once."""
PART = 8_000_000
_COLOURS, _WHY = re.compile(r"\x1b\[\d+m|↳"), re.compile(r"\s+")


def options() -> dict[str, str]:
    """What deltalake's client is to be told."""
    store = ObjectStore.from_environment()
    told = {"aws_endpoint": store.endpoint} if store.endpoint else {}
    waits = {"timeout": f"{SECONDS['request']}s", "connect_timeout": f"{SECONDS['connect']}s"}
    return {**told, **waits, "aws_region": store.region, "max_retries": f"{TRIES - 1}", "retry_timeout": "30s"}


class LakeError(UnreachableError):
    """The object store cannot be reached, or refuses; the message names the address and what it said."""


class StoredObject(NamedTuple):
    """One object: its name below the address, and its bytes."""

    name: str
    size: int


class LakeStore:
    """The objects below *address*, such as ``s3://bucket/prefix/log/events``."""

    def __init__(self, address: str) -> None:
        self.address = address

    @cached_property
    def _root(self) -> str:
        return self.address.removeprefix("s3://")

    @cached_property
    def _files(self) -> S3FileSystem:
        store = ObjectStore.from_environment()
        return S3FileSystem(
            endpoint_override=store.endpoint or None,
            region=store.region,
            force_virtual_addressing=store.virtual,
            request_timeout=SECONDS["silence"],
            connect_timeout=SECONDS["connect"],
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=TRIES),
        )

    def check_bucket(self) -> None:
        """See that the bucket is there: what is not there lists as nothing.

        Raises:
            LakeError: there is none.
        """
        bucket = self._root.partition("/")[0]
        with self.told():
            found = self._files.get_file_info(bucket).type
        if found == FileType.NotFound:
            raise LakeError(f"there is no bucket {bucket}: make it, or correct UBIQUO_LAKE")

    def listed(self, folder: str = "") -> list[StoredObject]:
        """The objects right in *folder*, in one request for every thousand of them."""
        with self.told():
            found = self._files.get_file_info(FileSelector(self._path(folder), allow_not_found=True))
        return [StoredObject(each.path.removeprefix(f"{self._root}/"), each.size) for each in found if each.type == FileType.File]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def read(self, name: str) -> bytes:
        """What an object holds.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        with self.told(), self._files.open_input_stream(self._path(name)) as stream:
            content: bytes = stream.read()
        return content

    def opened(self, name: str) -> IO[bytes]:
        """An object, to be read in parts as a file is."""
        with self.told():
            found: IO[bytes] = self._files.open_input_file(self._path(name))
        return found

    def fetch(self, name: str, size: int, path: Path) -> None:
        """Bring an object onto this machine: *path* holds all of it afterwards, or is not there.

        Raises:
            FileNotFoundError: there is none of that name.
            DamagedStateError: it does not hold *size* bytes.
        """
        make_folder(path.parent)
        part = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.part")
        try:
            with self.told(), self._files.open_input_file(self._path(name)) as source:
                held = source.size()
                if held != size:
                    raise DamagedStateError(
                        f"{self.address}/{name} holds {held} bytes instead of {size}: put it back from a backup, or give up the rows "
                        "that it held: python -m features repair"
                    )
                with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE), "wb") as into:
                    while some := source.read(PART):
                        into.write(some)
            move_into_place(part, path)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise NoSpaceError(f"the disk of {path.parent}, which holds copies of {self.address}, is full") from error
            raise
        finally:
            part.unlink(missing_ok=True)

    def put(self, name: str, source: Path) -> None:
        """Store a file of this machine as an object, in the place of any other of that name."""
        with self.told(), source.open("rb") as content, self._files.open_output_stream(self._path(name)) as into:
            while some := content.read(PART):
                into.write(some)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; one that is gone already is no mistake."""
        names = list(names)
        if not names:
            return
        with self.told(), ThreadPoolExecutor(min(AT_ONCE, len(names)), "ubiquo-lake") as pool:
            list(pool.map(self._delete, names))

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Tell of an error of the store in one line.

        Raises:
            LakeError: the store cannot be reached, or refuses.
        """
        try:
            yield
        except (FileNotFoundError, LakeError):
            raise
        except (DeltaError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                # of this machine's disk
                raise
            why = _WHY.sub(" ", _COLOURS.sub(" ", str(error))).strip()
            raise LakeError(f"the object store of {self.address} does not do what is asked: {why}") from error
