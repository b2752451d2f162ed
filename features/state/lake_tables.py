"""The Delta tables of a lake: objects of an S3 store, which several machines read and write.

A commit is one object, put only where there is none of its number (a conditional write), so there is nothing half, and no commit is
lost. ``version`` and ``files`` ask the store each time, by one listing of the commits: whoever has just taken a lease sees what its
last holder has committed. What a version holds is read once a process, its data files are fetched once a machine.

Objects go as the files of a folder do, with two more cares, as a lease may be lost while its holder uploads: before data objects are
deleted a commit is made, so that what was begun before can never be committed; and commits stay for ``KEPT_SECONDS`` even when an
erasure purges at once, as whoever was held up must find them.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec
import pyarrow as pa
import pyarrow.dataset as pds

from features.state.delta import HOOKS, CommitProperties, DeltaError, DeltaTable, write_deltalake
from features.state.delta_commits import LOOKS
from features.state.delta_writes import CHECKPOINT_EVERY, SHORT_MEMORY, WRITER, DeltaWrites
from features.state.disk import DamagedStateError, write_atomically
from features.state.lake_cache import LakeCache, Why
from features.state.lake_store import LakeError, LakeStore, StoredObject, options
from features.state.ports import KEPT_SECONDS, MovedOnError

logger = logging.getLogger("ubiquo")
_KEPT_IN = "lake"
"""The file of a home that names its lake: without it a forgotten setting would begin an empty log."""
LOG = "_delta_log"
LOOK_SECONDS = 15.0
"""How often a process that has copies of a table looks whether it needs them still, if nobody else asks."""
REMEMBERED = 64
"""How many commits of a table a process remembers."""


_ending = threading.Event()
# before Arrow lets go of its client
atexit.register(_ending.set)


class _Seen(NamedTuple):
    """One version of a table."""

    version: int
    sizes: Mapping[str, int]
    """Data object to its bytes."""
    schema: pa.Schema


class _Commit(NamedTuple):
    digest: str
    said: Mapping[str, Any]
    added: list[str]
    takes_out: bool
    """Whether rows were taken out, or changed."""


_ABSENT = _Seen(-1, {}, pa.schema([]))


class LakeTable(DeltaWrites):
    """One Delta table in an S3 store. Safe to call from several threads.

    Args:
        address: such as ``s3://bucket/prefix/log/events``.
        cache: the folder of this machine for copies of its data files.
        begun: called before the table is made.
    """

    def __init__(self, address: str, cache: Path, begun: Callable[[], None] = lambda: None) -> None:
        self._store, self._begun = LakeStore(address), begun
        self._cache = LakeCache(cache, self._store)
        self._looking, self._writing = threading.RLock(), threading.Lock()
        self._seen: _Seen | None = None
        self._table: DeltaTable | None = None
        self._written: DeltaTable | None = None
        self._commits: dict[int, _Commit] = {}
        self._orphaned: dict[str, float] = {}
        self._watched = False

    @property
    def place(self) -> str:
        """Its address."""
        return self._store.address

    @property
    def exists(self) -> bool:
        """Whether anything was ever stored in it, readable or not."""
        return bool(self._store.listed(LOG))

    def version(self) -> int:
        """The current version, whoever made it; -1 if there is no table. One request."""
        return self._look().version

    def files(self) -> list[str]:
        """This machine's copies of the Parquet files that make up the current version; none if there is no table.

        One request, and what it takes to fetch what is new.

        Raises:
            DamagedStateError: a file is missing, or cut short.
        """
        for left in reversed(range(LOOKS)):
            seen = self._look()
            try:
                paths = self._cache.paths(seen.sizes)
            except FileNotFoundError as error:
                # it may have been erased between the two
                if not left and self._look().version == seen.version:
                    raise DamagedStateError(
                        f"{error}: put it back from a backup, or give up the rows that it held: python -m features repair"
                    ) from error
            else:
                self._watch()
                return paths
        raise LakeError(f"{self.place} changes faster than it can be read: try again")

    def names(self) -> set[str]:
        """The data objects that make up the current version, none of which is fetched."""
        return set(self._look().sizes)

    @contextlib.contextmanager
    def held(self) -> Iterator[list[str]]:
        """This machine's copies, and every object that none of them is of, fetched for as long as the context lasts."""
        copies = self._cache.copies()
        with tempfile.TemporaryDirectory(prefix="ubiquo-lake-") as fetched:
            others = [each for folder in ("", LOG) for each in self._store.listed(folder) if each.name not in copies]
            for each in others:
                # it may be gone by now
                with contextlib.suppress(FileNotFoundError):
                    self._store.fetch(each.name, each.size, Path(fetched) / each.name)
            yield [*copies.values(), *(str(path) for path in Path(fetched).rglob("*") if path.is_file())]

    def read(self, columns: Sequence[str] | None = None) -> pa.Table | None:
        """The rows of the current version, or None if there is no table."""
        seen = self._look()
        if seen.version < 0:
            return None
        wanted = None if columns is None else list(columns)
        rows: pa.Table = pds.dataset(self.files(), schema=seen.schema, format="parquet").to_table(wanted)
        return rows

    def commit_digest(self, number: int) -> str | None:
        """A digest of the commit of that number; None where it is gone. A commit that was read is remembered: none takes its place."""
        commit = self._commit_of(number)
        return None if commit is None else commit.digest

    def appended_since(self, known: int) -> list[str] | None:
        """The data files that were appended after version *known*; None where rows were taken out since, or commits are gone."""
        seen, added = self._look(), dict[str, int]()
        for number in range(known + 1, seen.version + 1):
            commit = self._commit_of(number)
            if commit is None or commit.takes_out:
                return None
            added |= {name: seen.sizes.get(name, -1) for name in commit.added}
        if any(size < 0 for size in added.values()):
            # compacted since
            return None
        try:
            return self._cache.paths(added)
        except FileNotFoundError:
            return None

    def recover(self) -> None:
        """See that all that was stored is there; there is nothing half to take back.

        Raises:
            DamagedStateError: a data object is missing, or does not hold what was written.
        """
        sizes, held = self._look().sizes, {each.name: each.size for each in self._store.listed()}
        for name, size in sizes.items():
            if held.get(name) != size:
                state = "is missing" if name not in held else f"holds {held[name]} bytes instead of {size}"
                raise DamagedStateError(
                    f"{self.place}/{name} {state}: put it back from a backup, or give up the rows that it held: python -m features repair"
                )

    def repair(self) -> list[str]:
        """Give up data objects that are missing or cut short; returns what was given up. Hold the table's lease."""
        seen, held = self._look(), {each.name: each.size for each in self._store.listed()}
        broken = [name for name, size in seen.sizes.items() if held.get(name) != size]
        if not broken:
            return []
        self._store.delete(name for name in broken if name in held)
        self._commit(lambda table, how: {"gone": table.repair(post_commithook_properties=HOOKS, commit_properties=how)})
        self._cache.purge(self._look().sizes)
        return [f"{self.place}/{name}" for name in broken]

    def keep_up(self) -> None:
        """Look whether the copies on this machine are needed still."""
        self._cache.tidy(self._look().sizes, Why.COMPACTED)

    # --- looking

    def _look(self) -> _Seen:
        with self._looking, self._store.told():
            for left in reversed(range(LOOKS)):
                try:
                    return self._looked()
                except (DeltaError, FileNotFoundError):
                    # a checkpoint may have taken the place of commits between the list and the look
                    self._table = None
                    if not left:
                        raise
        raise AssertionError("the last look raises or returns")

    def _looked(self) -> _Seen:
        newest = max((_number(each) for each in self._store.listed(LOG) if each.name.endswith(".json")), default=-1)
        known = self._seen
        if known is not None and known.version == newest:
            return known
        if newest < 0:
            if known is None:
                self._store.check_bucket()
            self._seen, self._table = _ABSENT, None
            return _ABSENT
        if self._table is None or self._table.version() > newest:
            self._table = DeltaTable(self.place, storage_options=options())
        else:
            self._table.update_incremental()
        added = pa.table(self._table.get_add_actions(flatten=True))
        sizes = dict(zip(map(unquote, added["path"].to_pylist()), added["size_bytes"].to_pylist(), strict=True))
        # what is read may be newer than the list by now
        seen = _Seen(self._table.version(), sizes, pa.schema(self._table.schema().to_arrow()))
        self._seen = seen
        self._let_go(known, seen)
        return seen

    def _let_go(self, known: _Seen | None, seen: _Seen) -> None:
        """Let the copies go that a new version does not need."""
        if known is None:
            why = Why.UNKNOWN
        elif known.sizes.keys() <= seen.sizes.keys():
            return
        else:
            commits = [self._commit_of(number) for number in range(known.version + 1, seen.version + 1)]
            why = Why.ERASED if any(commit is None or commit.takes_out for commit in commits) else Why.COMPACTED
        self._cache.tidy(seen.sizes, why)
        if self._cache.holds_more(seen.sizes):
            self._watch()

    def _watch(self) -> None:
        """Look now and then, as long as this process lives, so that an erasure on another machine reaches the copies on this one."""
        if not self._watched:
            self._watched = True
            threading.Thread(target=_watching, args=(weakref.ref(self),), name="ubiquo-lake", daemon=True).start()

    def _commit_of(self, number: int) -> _Commit | None:
        if number < 0:
            return None
        if number not in self._commits:
            try:
                content = self._store.read(f"{LOG}/{number:020}.json")
            except FileNotFoundError:
                return None
            actions: list[dict[str, Any]] = [msgspec.json.decode(line) for line in content.splitlines()]
            takes_out = any("remove" in each and each["remove"]["dataChange"] for each in actions)
            added = [unquote(each["add"]["path"]) for each in actions if "add" in each and each["add"]["dataChange"]]
            said: dict[str, Any] = next((each["commitInfo"] for each in actions if "commitInfo" in each), {})
            with self._looking:
                self._commits[number] = _Commit(hashlib.blake2b(content, digest_size=16).hexdigest(), said, added, takes_out)
                for old in sorted(self._commits)[:-REMEMBERED]:
                    del self._commits[old]
                return self._commits.get(number)
        return self._commits.get(number)

    # --- writing

    def _sizes(self) -> list[int]:
        return list(self._look().sizes.values())

    def _at(self, version: int) -> DeltaTable:
        # opened anew it would read every commit since the last checkpoint
        if self._written is not None and self._written.version() < version:
            self._written.update_incremental()
        if self._written is None:
            try:
                self._written = DeltaTable(self.place, version=version, storage_options=options())
            except DeltaError as error:
                if (now := self.version()) != version:
                    raise MovedOnError(f"{self.place} stands at version {now}, not {version}") from error
                raise
        if (now := self._written.version()) != version:
            raise MovedOnError(f"{self.place} stands at version {now}, not {version}")
        return self._written

    def _first(self, rows: pa.Table, how: CommitProperties, **more: Any) -> None:
        self._begun()
        more |= {"writer_properties": WRITER, "post_commithook_properties": HOOKS, "commit_properties": how}
        write_deltalake(self.place, rows, storage_options=options(), **more)

    def _tried(self, work: Any, seen: int, mark: str) -> tuple[Mapping[str, Any], int]:
        with self._writing, self._store.told():
            try:
                return super()._tried(work, seen, mark)
            except BaseException:
                # what it holds now nobody knows
                self._written = None
                raise

    def _maker(self, version: int) -> Mapping[str, Any] | None:
        commit = self._commit_of(version)
        return None if commit is None else commit.said

    def _settle(self) -> None:
        """Nothing: an object is stored for good once the store has taken it."""

    def _checkpoint_if_due(self) -> None:
        objects = self._store.listed(LOG)
        last = max((_number(each) for each in objects if each.name.endswith(".checkpoint.parquet")), default=-1)
        if sum(_number(each) > last for each in objects if each.name.endswith(".json")) <= CHECKPOINT_EVERY:
            return
        with self._store.told():
            table = DeltaTable(self.place, storage_options=options())
            if not SHORT_MEMORY.items() <= table.metadata().configuration.items():
                self._commit_settings()
                table = DeltaTable(self.place, storage_options=options())
            table.create_checkpoint()

    def _purge(self, kept_seconds: float) -> int | None:
        """Delete the objects that no version needs and this process has known as such for *kept_seconds*, and copies of them."""
        made = None
        lying = [each.name for each in self._store.listed() if each.name.endswith(".parquet")]
        seen = self._look()
        due = self._due([name for name in lying if name not in seen.sizes], kept_seconds)
        if due:
            # what was begun before this commit is never committed: what lies there and is not needed after it never will be
            made = self._commit_nothing()
            seen = self._look()
            self._store.delete(name for name in due if name not in seen.sizes)
            self._forget(due)
        commits = self._store.listed(LOG)
        last = max((_number(each) for each in commits if each.name.endswith(".checkpoint.parquet")), default=-1)
        old = [each.name for each in commits if each.name.endswith((".json", ".checkpoint.parquet")) and _number(each) < last]
        gone = self._due(old, max(kept_seconds, KEPT_SECONDS))
        self._store.delete(gone)
        self._forget(gone)
        known = {*lying, *old}
        self._orphaned = {name: since for name, since in self._orphaned.items() if name in known}
        if kept_seconds:
            self._cache.tidy(seen.sizes, Why.COMPACTED)
        else:
            self._cache.purge(seen.sizes)
        return made

    def _commit_nothing(self) -> int:
        """Commit no change: what was begun on an earlier version is never committed after it; returns the version."""

        def work(table: DeltaTable, how: CommitProperties) -> None:
            table.create_write_transaction([], "append", table.schema(), commit_properties=how, post_commithook_properties=HOOKS)
            # it does not take note of it by itself
            table.update_incremental()

        return self._commit(work)[1]

    def _due(self, names: Sequence[str], kept_seconds: float) -> list[str]:
        now = time.monotonic()
        for name in names:
            self._orphaned.setdefault(name, now)
        return [name for name in names if now - self._orphaned[name] >= kept_seconds]

    def _forget(self, names: Sequence[str]) -> None:
        for name in names:
            self._orphaned.pop(name, None)


def kept_in(home: Path) -> str:
    """The lake that the tables of a home lie in; empty where they lie in its own folder, or there are none yet."""
    try:
        return (home / _KEPT_IN).read_text()
    except FileNotFoundError:
        return ""


def keep_in(home: Path, lake: str) -> None:
    """Note for good that the tables of a home lie in *lake*."""
    if kept_in(home) != lake:
        write_atomically(home / _KEPT_IN, lake.encode())


def _number(commit: StoredObject) -> int:
    number = commit.name.rpartition("/")[2].partition(".")[0]
    return int(number) if number.isdigit() else -1


def _watching(reference: weakref.ref[LakeTable]) -> None:
    while not _ending.wait(LOOK_SECONDS):
        table = reference()
        if table is None:
            return
        try:
            table.keep_up()
        except Exception as error:
            logger.warning("whether copies of %s are needed still cannot be told: %s", table.place, error)
        del table
