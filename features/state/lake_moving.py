"""How the tables of a home go from its own folder to a lake: copied, compared, and only then used."""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from features.state.lake_store import LakeStore
from features.state.lake_tables import LOG, LakeTable
from features.state.ports import MovedOnError
from features.state.tables import DeltaFolder

WRITERS, ROUNDS = 6, 8
"""How many make one table at once, and how often: a round tells only where two of them meet, as on a busy machine not all do."""


class CopiedTable(NamedTuple):
    """What of a table lies in the lake now."""

    version: int
    objects: int
    copied: int
    """How many of them were copied just now: the others lay there from an earlier try."""
    size: int
    rows: int


class UnfitStoreError(ValueError):
    """A store does not keep to what several writers rely on."""


class NotACopyError(ValueError):
    """What lies at an address of the lake is no copy of the table that is to go there."""


def check_store(lake: str) -> None:
    """See that the store puts a commit only where there is none: several writers make one table at once, and one must win.

    Raises:
        UnfitStoreError: two have won, so that one would have lost its commit without a word.
        LakeError: the store cannot be reached, or refuses.
    """
    scratch = f"{lake}/check-{uuid.uuid4().hex}"
    rows = pa.table({"known_at": pa.array([0], pa.timestamp("us", tz="UTC"))})
    with tempfile.TemporaryDirectory() as nowhere, ThreadPoolExecutor(WRITERS, "ubiquo-check") as pool:
        for number in range(ROUNDS):
            tables = [LakeTable(f"{scratch}/{number}", Path(nowhere)) for _ in range(WRITERS)]
            begin = threading.Barrier(WRITERS)
            try:
                won = sum(pool.map(lambda table, begin=begin: _wins(table, rows, begin), tables))
            finally:
                store = LakeStore(f"{scratch}/{number}")
                store.delete(each.name for folder in ("", LOG) for each in store.listed(folder))
            if won > 1:
                raise UnfitStoreError(
                    f"the store of {lake} keeps no conditional writes (If-None-Match): two writers at once would lose a commit; use another"
                )


def _wins(table: LakeTable, rows: pa.Table, begin: threading.Barrier) -> bool:
    begin.wait()
    try:
        table.append(rows, expected_version=-1)
    except MovedOnError:
        return False
    return True


def copy_table(folder: DeltaFolder, table: LakeTable, done: Callable[[int], None] = lambda size: None) -> CopiedTable | None:
    """Copy a table to the lake and compare the two; None where there is no table. Safe to repeat. Hold the table's lease.

    Data first and then the commits in their order, so that no commit is there before what it tells of.

    Args:
        folder: where it lies, and stays.
        table: where it is to lie.
        done: told how many bytes lie in the lake, after each file.

    Raises:
        NotACopyError: another table, or a later version of it, lies there already.
        DamagedStateError: the table is damaged.
    """
    folder.recover()
    if folder.version() < 0:
        return None
    store, log = LakeStore(table.place), folder.path / LOG
    data = sorted(map(Path, folder.files()))
    told = [*sorted(log.glob("*.checkpoint.parquet")), *log.glob("_last_checkpoint"), *sorted(log.glob("*.json"))]
    lying = {each.name: each.size for each in (*store.listed(), *store.listed(LOG))}
    _check_commits(log, store, [name for name in lying if name.endswith(".json")])
    copied = 0
    for path in (*data, *told):
        name, size = str(path.relative_to(folder.path)), path.stat().st_size
        if lying.get(name) != size or path.name == "_last_checkpoint":
            store.put(name, path)
            copied += 1
        done(size)
    _compare(folder, table, store, data)
    rows = sum(pq.read_metadata(path).num_rows for path in data)
    return CopiedTable(folder.version(), len(data) + len(told), copied, sum(path.stat().st_size for path in (*data, *told)), rows)


def _check_commits(log: Path, store: LakeStore, lying: list[str]) -> None:
    own = {f"{LOG}/{path.name}": path for path in log.glob("*.json")}
    oldest = min(own)
    for name in lying:
        # what is older than a checkpoint may be gone here
        if name not in own and name > oldest:
            raise NotACopyError(f"{store.address} is at a later version than {log.parent}: somebody has written to it; take another prefix")
        if name in own and store.read(name) != own[name].read_bytes():
            raise NotACopyError(f"{store.address} holds another table than {log.parent}: take another prefix, or delete what lies there")


def _compare(folder: DeltaFolder, table: LakeTable, store: LakeStore, data: list[Path]) -> None:
    held = {each.name: each.size for each in store.listed()}
    for path in data:
        place, size = f"{store.address}/{path.name}", path.stat().st_size
        if held.get(path.name) != size:
            raise NotACopyError(f"{place} holds {held.get(path.name)} bytes instead of {size}: try again")
        with store.opened(path.name) as copy:
            there, here = pq.ParquetFile(copy).metadata.num_rows, pq.read_metadata(path).num_rows
        if there != here:
            raise NotACopyError(f"{place} holds {there} rows instead of {here}: delete it and try again")
    if (table.version(), table.names()) != (folder.version(), {path.name for path in data}):
        raise NotACopyError(f"{store.address} reads as another version than {folder.path}: take another prefix, or delete what lies there")
