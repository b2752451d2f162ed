"""The files that a batch writes, part by part and never half: Parquet, JSON Lines, and CSV as other tools load it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BufferedWriter
from pathlib import Path
from typing import Any, Protocol
from zoneinfo import ZoneInfo

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from serving.decide.formats import FileFormat, encoded, header


class Writer(Protocol):
    """A file being written."""

    def __enter__(self) -> Writer: ...
    def __exit__(self, *error: object) -> None: ...
    def write_rows(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Append rows, each with its customer's id."""


class ParquetFile:
    """Rows as Parquet, one row group a chunk."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        _private(path).close()
        self._writer = pq.ParquetWriter(path, schema)

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def write_rows(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Append rows, each with its customer's id."""
        self._writer.write_table(pa.Table.from_pylist([dict(row) for _, row in rows], self._schema))


class JsonLinesFile:
    """Rows as JSON, one a line."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._names = schema.names
        self._file = _private(path)

    def __enter__(self) -> JsonLinesFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def write_rows(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Append rows, each with its customer's id."""
        for _, row in rows:
            self._file.write(msgspec.json.encode({name: row.get(name) for name in self._names}) + b"\n")


class CsvFile:
    """Rows as one tool loads them, and beside them whose each is, so that an erasure finds them."""

    def __init__(self, path: Path, owners: Path, columns: Sequence[str], form: FileFormat, delimiter: str, zone: ZoneInfo) -> None:
        self._columns, self._form, self._delimiter, self._zone = columns, form, delimiter, zone
        self._file, self._owners = _private(path), _private(owners)
        self._file.write(header(columns, form, delimiter))
        self._between = b"["

    def __enter__(self) -> CsvFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._owners.write(b"[]" if self._between == b"[" else b"]")
        self._file.close()
        self._owners.close()

    def write_rows(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Append rows, each with its customer's id."""
        self._file.write(encoded((row for _, row in rows), self._columns, self._form, self._delimiter, self._zone))
        for customer, _ in rows:
            self._owners.write(self._between + msgspec.json.encode(customer))
            self._between = b","


def _private(path: Path) -> BufferedWriter:
    """A new file that only its owner may read."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
