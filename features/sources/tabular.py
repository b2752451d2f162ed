"""Read CSV, JSON Lines and Parquet files, compressed or not, as batches of texts with the row each came from."""

from __future__ import annotations

import codecs
import csv
import glob
import io
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from features.sources.mapping_parts import Files

FileKind = Literal["csv", "jsonl", "parquet"]
BLOCK_BYTES = 8 << 20
ROWS_A_BATCH = 50_000
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
ENDINGS: dict[str, FileKind] = {
    ".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet",
}  # fmt: skip
LINE = "_line"
"""The column that holds a JSON line as it was read, beside the columns asked for."""


class UnreadableFileError(ValueError):
    """A file that cannot be read as what it is said to be; the message names it and the fix."""


@dataclass(frozen=True)
class BadRow:
    """A row that is not even a row: too few or too many fields, or broken JSON."""

    row: int
    reason: str
    raw: str


@dataclass
class TabularFile:
    """One file.

    Attributes:
        path: where it lies.
        files: how it is written.
        bad: the rows that could not be split into fields, as far as was read.
        position: how many bytes of it were read, for a progress bar.
    """

    path: Path
    files: Files = field(default_factory=Files)
    bad: list[BadRow] = field(default_factory=list)
    position: Callable[[], int] = lambda: 0
    _undecodable: str | None = None
    _recoded: Any = None

    @property
    def kind(self) -> FileKind:
        """What it is written in.

        Raises:
            UnreadableFileError: its name does not say.
        """
        if self.files.kind is not None:
            return self.files.kind
        suffixes = [s.lower() for s in self.path.suffixes]
        if suffixes and suffixes[-1] in COMPRESSED:
            suffixes.pop()
        if not suffixes or suffixes[-1] not in ENDINGS:
            known = " ".join(ENDINGS)
            raise UnreadableFileError(
                f"{self.path}: its name does not tell what it is ({known}, perhaps with {' '.join(COMPRESSED)}): "
                "rename it, save a spreadsheet as CSV, or set files.kind"
            )
        return ENDINGS[suffixes[-1]]

    def columns(self, nested: bool = False) -> list[str]:
        """The names of its columns, those that hold lists only if *nested*; of JSON Lines those of
        the first 50,000 lines.

        Raises:
            UnreadableFileError: it is empty or not readable.
        """
        if self.kind == "parquet":
            return [f.name for f in self._parquet().schema_arrow if nested or not pa.types.is_nested(f.type)]
        if self.kind == "jsonl":
            seen: dict[str, None] = {}
            for _, line in itertools.islice(self._lines(), 50_000):
                try:
                    value = msgspec.json.decode(line)
                    seen.update(dict.fromkeys(value if nested and isinstance(value, dict) else _flat(value)))
                except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
                    continue
            if not seen:
                raise UnreadableFileError(f"{self.path}: none of its first lines is a JSON object")
            return list(seen)
        return self._header()

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Its rows as texts (empty ones null), and the number of each: 1 is the header of a CSV file, else the first row.

        Args:
            columns: which columns of JSON Lines to pick; the others' are all read.

        Raises:
            UnreadableFileError: a byte is not of the encoding, or the file is broken.
        """
        reader = {"csv": self._csv_batches, "parquet": self._parquet_batches}.get(self.kind)
        yield from reader() if reader else self._json_batches(columns)

    def open(self) -> Any:
        """The file's bytes, decompressed."""
        try:
            # Arrow's own file: a Python one would need the interpreter's lock in Arrow's threads, and may wait for ever
            raw = pa.OSFile(str(self.path), "rb")
        except OSError as error:
            raise UnreadableFileError(f"{self.path}: {error.strerror or error}") from error
        self.position = lambda: 0 if raw.closed else int(raw.tell())
        compression = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}.get(self.path.suffix.lower())
        return pa.CompressedInputStream(raw, compression) if compression else raw

    @property
    def delimiter(self) -> str:
        """What divides the fields of a CSV file."""
        return self.files.delimiter or ("\t" if ".tsv" in self.path.suffixes else ",")

    def _header(self) -> list[str]:
        try:
            start = self.open().read(1 << 20)
            text = codecs.getincrementaldecoder(self.files.encoding)().decode(start).removeprefix("\ufeff")
            return list(next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter)))
        except StopIteration:
            raise UnreadableFileError(f"{self.path} is empty: it needs a header and rows") from None
        except (UnicodeDecodeError, OSError, csv.Error) as error:
            raise UnreadableFileError(self._told(error)) from error

    def _utf8(self) -> Any:
        """The file's text in UTF-8, by way of a temporary file where it is written in another encoding."""
        if codecs.lookup(self.files.encoding).name in ("utf-8", "ascii"):
            return self.open()
        decoder, stream = codecs.getincrementaldecoder(self.files.encoding)(), self.open()
        self._recoded = tempfile.NamedTemporaryFile(suffix=".csv")  # noqa: SIM115 - it goes with this object
        while chunk := stream.read(BLOCK_BYTES):
            self._recoded.write(decoder.decode(chunk).encode())
        self._recoded.write(decoder.decode(b"", final=True).encode())
        self._recoded.flush()
        return pa.OSFile(self._recoded.name, "rb")

    def _csv_reader(self, names: list[str]) -> pa_csv.CSVStreamingReader:
        def skip(row: pa_csv.InvalidRow) -> str:
            number, fewer = int(row.number or 0), row.actual_columns < row.expected_columns
            mend = "a field is missing, or a line break cuts the row" if fewer else "quote a field that holds the delimiter"
            fields = f"{row.actual_columns} fields where the header has {row.expected_columns}: {mend}"
            try:
                self.bad.append(BadRow(number, fields, row.text))
            except UnicodeDecodeError as error:
                # to raise within the reader would be lost: it is told when the reader comes back
                self._undecodable = f"row {number}: {error}"
            return "skip"

        return pa_csv.open_csv(
            self._utf8(),
            # only one thread counts rows
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
            parse_options=pa_csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True, invalid_row_handler=skip),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=list(self.files.empty)
            ),
        )

    def _csv_batches(self) -> Iterator[tuple[pa.Table, np.ndarray]]:
        names = self._header()
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise UnreadableFileError(f"{self.path}: its header names {repeated[0]!r} twice: rename one")
        self.bad.clear()
        ordinal = 0
        try:
            reader = self._csv_reader(names)
            for batch in reader:
                good = np.arange(ordinal + 1, ordinal + 1 + len(batch))
                ordinal += len(batch)
                # rows passed over before a good one move it down
                gaps = np.sort([bad.row for bad in self.bad]) - np.arange(len(self.bad)) - 1
                rows = good + 1 + np.searchsorted(gaps, good, side="right")
                yield self._blank_to_null(pa.Table.from_batches([batch])), rows
            if self._undecodable is not None:
                raise UnreadableFileError(self._told(ValueError(f"encoding: {self._undecodable}")))
        except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
            raise UnreadableFileError(self._told(error)) from error

    def _parquet(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UnreadableFileError(f"{self.path} is not a whole Parquet file ({error}): export it again") from error

    def _parquet_batches(self) -> Iterator[tuple[pa.Table, np.ndarray]]:
        source, ordinal = self._parquet(), 0
        size, rows_in_all = self.path.stat().st_size, max(source.metadata.num_rows, 1)
        names = [f.name for f in source.schema_arrow if not pa.types.is_nested(f.type)]
        for batch in source.iter_batches(ROWS_A_BATCH, columns=names):
            table = pa.table({n: _as_text(batch.column(n)) for n in names})
            rows = np.arange(ordinal + 1, ordinal + 1 + len(table))
            ordinal += len(table)
            self.position = lambda done=ordinal: int(size * done / rows_in_all)  # type: ignore[misc]
            yield self._blank_to_null(table), rows

    def _json_batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.Table, np.ndarray]]:
        self.bad.clear()
        decoder = msgspec.json.Decoder(float_hook=Decimal)
        lines = self._lines()
        while chunk := list(itertools.islice(lines, ROWS_A_BATCH)):
            picked: dict[str, list[str | None]] = {name: [] for name in (*columns, LINE)}
            rows = []
            for number, line in chunk:
                try:
                    values = _flat(decoder.decode(line))
                except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
                    self.bad.append(BadRow(number, f"not a JSON object: {error}", line.decode(errors="replace")))
                    continue
                rows.append(number)
                picked[LINE].append(line.decode(errors="replace"))
                for name in columns:
                    picked[name].append(values.get(name))
            yield self._blank_to_null(pa.table({n: pa.array(v, pa.string()) for n, v in picked.items()})), np.array(rows, dtype=np.int64)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Its lines that are not blank, with their numbers, in UTF-8."""
        stream = self.open()
        try:
            for number, line in enumerate(io.BufferedReader(_Readable(stream), BLOCK_BYTES), 1):
                if line.strip():
                    recode = self.files.encoding.lower().replace("-", "") not in ("utf8", "ascii")
                    yield number, line.decode(self.files.encoding).encode() if recode else line
        except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
            raise UnreadableFileError(self._told(error)) from error

    def _blank_to_null(self, table: pa.Table) -> pa.Table:
        empty = pa.array(self.files.empty, pa.string())
        columns = []
        for column in table.columns:
            trimmed = pc.utf8_trim_whitespace(column)
            columns.append(pc.if_else(pc.is_in(trimmed, empty), pa.scalar(None, pa.string()), trimmed))
        return pa.table(columns, names=table.column_names)

    def _told(self, error: Exception) -> str:
        text = str(error).strip()
        if isinstance(error, LookupError) or "codec can't decode" in text or "UTF8" in text or "encoding" in text.lower():
            return (
                f"{self.path} is not written in {self.files.encoding} ({text}): set files.encoding, e.g. windows-1252 for a file "
                "from Excel, or let `python -m features guess` tell"
            )
        if "Empty CSV" in text:
            return f"{self.path} is empty: it needs a header and rows"
        return f"{self.path}: {text}"


class _Readable(io.RawIOBase):
    """An Arrow stream as a raw file, so that Python's own buffering finds the lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that names and globs stand for, in order, each once.

    Raises:
        UnreadableFileError: a pattern finds nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UnreadableFileError(f"there is no file {pattern}")
        found.update(dict.fromkeys(Path(m) for m in matches if Path(m).is_file()))
    return list(found)


def _flat(value: Any, prefix: str = "") -> dict[str, str | None]:
    """An object's plain values as texts, those of inner objects under ``outer.inner``; lists are left out."""
    if not isinstance(value, dict):
        raise ValueError("a line must be an object in braces")
    flat: dict[str, str | None] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat.update(_flat(inner, f"{prefix}{key}."))
        elif not isinstance(inner, list):
            flat[prefix + key] = None if inner is None else str(inner).lower() if isinstance(inner, bool) else f"{inner}"
    return flat


def _as_text(column: pa.Array) -> pa.Array:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _as_text(column.dictionary_decode())
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", tz=kind.tz), safe=False)
        if kind.tz is not None:
            # through plain UTC and a Z of our own: no time zone database takes part
            plain = column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).cast(pa.timestamp("us"))
            return pc.binary_join_element_wise(plain.cast(pa.string()), "Z", "")
    if pa.types.is_binary(kind):
        return column.cast(pa.string())
    return column.cast(pa.string())
