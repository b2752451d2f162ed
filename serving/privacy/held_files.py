"""The files that hold rows of customers: snapshots of features, and what batches and exports were written into."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.state.disk import move_into_place, write_atomically
from features.state.home import Home
from features.store.outputs import is_owners, is_part, outputs, owners_of
from serving.privacy.holdings import Row, Subject


class Snapshots:
    """Feature snapshots."""

    name = "feature snapshots"

    def __init__(self, home: Home) -> None:
        self._folder = home.snapshots

    def find(self, subject: Subject) -> Iterator[Row]:
        """Her rows at every moment."""
        for path in self._files():
            yield from _parquet_rows(path, subject)

    def erase(self, subject: Subject) -> int:
        """Write each file that has them anew, without them."""
        return sum(_without(path, subject) for path in self._files())

    def _files(self) -> list[Path]:
        return sorted(path for path in self._folder.rglob("*.parquet") if "customer_id" in pq.read_schema(path).names)


class BatchFiles:
    """Files that batches were scored into, wherever they were written."""

    name = "batch files"

    def __init__(self, home: Home) -> None:
        self._home = home

    def find(self, subject: Subject) -> Iterator[Row]:
        """Her lines."""
        for path in outputs(self._home):
            if is_part(path):
                # of whom its rows are nobody can tell
                yield {"file": path.name}
            elif path.suffix == ".parquet":
                yield from _parquet_rows(path, subject)
            elif owners_of(path).exists():
                yield from ({"file": path.name, "line": line.decode("utf-8", "replace")} for line in OwnedFile(path).of(subject))
            elif not is_owners(path):
                yield from (msgspec.json.decode(line) for line in path.read_bytes().splitlines() if _is_theirs(line, subject))

    def erase(self, subject: Subject) -> int:
        """Write each file that has them anew, without them."""
        gone = 0
        for path in outputs(self._home):
            if is_part(path):
                # nobody writes while a customer is erased: it was broken off, and can be made anew
                path.unlink()
                gone += 1
            elif path.suffix == ".parquet":
                gone += _without(path, subject)
            elif owners_of(path).exists():
                gone += OwnedFile(path).erase(subject)
            elif not is_owners(path):
                lines = path.read_bytes().splitlines(keepends=True)
                kept = [line for line in lines if not _is_theirs(line, subject)]
                if len(kept) < len(lines):
                    write_atomically(path, b"".join(kept), mode=stat.S_IMODE(path.stat().st_mode))
                gone += len(lines) - len(kept)
        return gone


class OwnedFile:
    """A file of which another beside it tells whose each row is (``owners_of``)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owners: list[str] = msgspec.json.decode(owners_of(path).read_bytes(), type=list[str])
        rows = path.read_bytes().splitlines(keepends=True) if path.suffix == ".jsonl" else _csv_rows(path.read_bytes())
        # a CSV has a header
        self._head, self._rows = (rows[:1], rows[1:]) if path.suffix == ".csv" else ([], rows)

    def of(self, subject: Subject) -> list[bytes]:
        """The rows of a customer."""
        return [row for row, owner in zip(self._rows, self._owners, strict=False) if owner in subject.customer_ids]

    def erase(self, subject: Subject) -> int:
        """Write the file anew without a customer's rows, with the same rights."""
        if len(self._rows) != len(self._owners):
            # broken off between the two files: nobody can tell whose a row is, and the file can be made anew
            kept = []
        else:
            kept = [(row, owner) for row, owner in zip(self._rows, self._owners, strict=True) if owner not in subject.customer_ids]
        gone = len(self._rows) - len(kept)
        if gone:
            mode = stat.S_IMODE(self._path.stat().st_mode)
            write_atomically(self._path, b"".join([*self._head, *(row for row, _ in kept)]), mode=mode)
            write_atomically(owners_of(self._path), msgspec.json.encode([owner for _, owner in kept]), mode=mode)
        return gone


def _parquet_rows(path: Path, subject: Subject) -> Iterator[Row]:
    table = pq.ParquetFile(path).read()
    yield from table.filter(_mine(table, subject)).to_pylist()


def _without(path: Path, subject: Subject) -> int:
    """Write a Parquet file anew without the subject's rows, whole or not at all; returns how many they were."""
    file = pq.ParquetFile(path)
    customers = file.read(columns=[name for name in ("customer_id",) if name in file.schema_arrow.names])
    count = int(pc.sum(_mine(customers, subject)).as_py() or 0)
    if count:
        table = pq.ParquetFile(path).read()
        part = path.with_name(f".{path.name}.part")
        part.touch()
        # it may hold addresses, and stays as private as it was
        part.chmod(stat.S_IMODE(path.stat().st_mode))
        pq.write_table(table.filter(pc.invert(_mine(table, subject))), part)
        move_into_place(part, path)
    return count


def _csv_rows(content: bytes) -> list[bytes]:
    """The rows of a CSV as they are written; one may go over several lines."""
    rows: list[bytes] = []
    for line in content.splitlines(keepends=True):
        # a row ends where its quotes are closed
        if rows and rows[-1].count(b'"') % 2:
            rows[-1] += line
        else:
            rows.append(line)
    return rows


def _is_theirs(line: bytes, subject: Subject) -> bool:
    try:
        row = msgspec.json.decode(line)
    except msgspec.DecodeError:
        # somebody has written something else there: the search will tell whether it names them
        return False
    return isinstance(row, dict) and row.get("customer_id") in subject.customer_ids


def _mine(table: pa.Table, subject: Subject) -> pa.Array:
    if "customer_id" not in table.column_names:
        return pa.repeat(False, len(table))
    return pc.is_in(table["customer_id"], pa.array(list(subject.customer_ids), pa.string()))
