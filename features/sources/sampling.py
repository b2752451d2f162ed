"""A sample of an unknown file: how it is written, and what each of its columns shows."""

from __future__ import annotations

import codecs
import csv
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
from charset_normalizer import from_bytes

from features.sources.headers import known_headers, plain_header
from features.sources.mapping_parts import Files
from features.sources.tabular import LINE, TabularFile, UnreadableFileError

SAMPLE_ROWS = 50_000
SAMPLE_BYTES = 1 << 20
TIME_FORMATS = (
    "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d", "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%d/%m/%Y", "%m/%d/%Y %H:%M:%S",
    "%m/%d/%Y %H:%M", "%m/%d/%Y", "%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y", "%d-%m-%Y %H:%M:%S", "%d-%m-%Y %H:%M", "%d-%m-%Y",
    "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y/%m/%d", "%Y%m%d", "%d/%m/%y %H:%M", "%m/%d/%y %H:%M", "%d/%m/%y", "%m/%d/%y",
    "%d.%m.%y %H:%M", "%d.%m.%y", "%d/%m/%Y %H.%M", "%d %b %Y", "%b %d, %Y", "%b %d, %Y %I:%M:%S %p", "%m/%d/%Y %I:%M:%S %p",
    "%m/%d/%Y %I:%M %p",
)  # fmt: skip
CLOCK_FORMATS = ("%H:%M:%S", "%H:%M", "%H.%M.%S", "%H.%M", "%I:%M %p", "%I:%M:%S %p", "%H%M")
_SIGNS = re.compile(r"[€$£¥\s\u00a0\u202f]|EUR|USD|GBP|CHF")
_PURE = re.compile(r"[+-]?\d+([.,']\d+)*$")
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}")
_EPOCHS = {"epoch_seconds": re.compile(r"1\d{9}(\.\d+)?"), "epoch_milliseconds": re.compile(r"1\d{12}")}
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class Column:
    """What a sample shows of a column."""

    name: str
    kind: Literal["time", "clock", "number", "text"]
    """A ``clock`` is a time of day without its day."""
    examples: list[str]
    empty_share: float
    distinct: int
    formats: list[str] = field(default_factory=list)
    """The time formats that every value fits."""
    negative: bool = False
    fractional: bool = False
    whole_with_point: bool = False
    """Whole numbers written 17850.0."""

    @property
    def header(self) -> str:
        """Its name in plain letters."""
        return plain_header(self.name)


@dataclass(frozen=True)
class FileSample:
    """The first rows of a file.

    Attributes:
        files: how it is written.
        doubts: what of that is not certain.
        columns: by name, in the order of the file.
        values: the rows as texts, a column each; None where a field is empty.
    """

    path: Path
    files: Files
    doubts: list[str]
    columns: dict[str, Column]
    values: pd.DataFrame

    def numbers(self, name: str) -> pd.Series:
        """A column as numbers; NaN where it holds none."""
        texts = self.values[name].str.replace(_SIGNS, "", regex=True)
        if self.files.thousands:
            texts = texts.str.replace(self.files.thousands, "", regex=False)
        return pd.to_numeric(texts.str.replace(self.files.decimal, ".", regex=False), errors="coerce")


def read_sample(path: Path) -> FileSample:
    """The first rows of *path*.

    Raises:
        UnreadableFileError: it cannot be read, or has none.
    """
    files, doubts = _files(path)
    file = TabularFile(path, files)
    tables: list[pa.Table] = []
    for table, _ in itertools.islice(file.batches(file.columns()), 8):
        tables.append(table)
        if sum(map(len, tables)) >= SAMPLE_ROWS:
            break
    if not tables or not sum(map(len, tables)):
        raise UnreadableFileError(f"{path}: it has no rows to guess from")
    sample = pa.concat_tables(tables).slice(0, SAMPLE_ROWS)
    columns = {name: sample[name].to_pylist() for name in sample.column_names if name != LINE}
    values = pd.DataFrame({name: pd.Series(column, dtype=object) for name, column in columns.items()})
    return FileSample(path, files, doubts, {name: _column(name, column, files.decimal) for name, column in columns.items()}, values)


def _files(path: Path) -> tuple[Files, list[str]]:
    """Encoding, delimiter, decimal sign and divider of thousands."""
    if TabularFile(path).kind != "csv":
        return Files(), []
    raw = TabularFile(path).open().read(SAMPLE_BYTES)
    doubts = []
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        # a sample may end within a character
        raw[: raw.rfind(b"\n") + 1 or len(raw)].decode(encoding, errors="strict" if encoding == "utf-8" else "replace")
    except UnicodeDecodeError:
        encoding = _encoding(raw)
        doubts.append(f"files.encoding: it is not UTF-8; {encoding} is likely: see that names with accents come out right")
    lines = raw.decode(encoding, errors="replace").removeprefix("\ufeff").splitlines()[:300]
    delimiter = max(",;\t|", key=lines[0].count) if lines else ","
    rows = list(csv.reader(lines, delimiter=delimiter))
    clock = known_headers().rules["clock"]
    # a time of day such as 14.30 is no number
    taken = [k for k, name in enumerate(rows[0] if rows else []) if clock.rank(plain_header(name)) is None]
    cells = [re.sub(_SIGNS, " ", row[k]).strip() for row in rows[1:] for k in taken if k < len(row)]
    commas = sum(bool(re.fullmatch(r"-?\d+([.' ]\d{3})*,\d{1,2}", cell)) for cell in cells)
    points = sum(bool(re.fullmatch(r"-?\d+([,' ]\d{3})*\.\d{1,2}", cell)) for cell in cells)
    decimal: Any = "," if commas > points else "."
    others = [sign for sign in (".", ",", "'", " ") if sign not in (decimal, delimiter)]
    grouped = {s: sum(bool(re.fullmatch(rf"-?\d{{1,3}}(\{s}\d{{3}})+(\{decimal}\d+)?", cell)) for cell in cells) for s in others}
    thousands: Any = max(grouped, key=grouped.__getitem__) if any(grouped.values()) else ""
    dotted = [cell for cell in cells if re.fullmatch(r"-?\d{1,3}(\.\d{3})+", cell)]
    if not commas + points and dotted and not any(cell.lstrip("-").startswith("0") for cell in dotted) and delimiter == ";":
        # who divides fields by semicolons writes a decimal comma, if ever
        decimal, thousands = ",", "."
    if not commas + points and (thousands or dotted):
        said, meaning = (dotted or ["1,234"])[0], "that" if thousands else "less"
        doubts.append(f"files.thousands: is {said} more than a thousand? It is taken for {meaning}")
    return Files(encoding=encoding, delimiter=None if delimiter == "," else delimiter, decimal=decimal, thousands=thousands), doubts


def _encoding(raw: bytes) -> str:
    """Excel's own for a text with a few accents in it; where other letters prevail, what their frequencies tell."""
    strange = sum(byte >= 0x80 for byte in raw) / max(len(raw), 1)
    if strange < 0.1:
        return "windows-1252"
    best = from_bytes(raw).best()
    return "windows-1252" if best is None else best.encoding


def _column(name: str, values: Sequence[str | None], decimal: str) -> Column:
    present = [v for v in values if v is not None]
    distinct = set(present)
    told: dict[str, Any] = {
        "examples": list(dict.fromkeys(present))[:3], "empty_share": 1 - len(present) / max(len(values), 1), "distinct": len(distinct),
    }  # fmt: skip
    some = sorted(distinct)[:: max(len(distinct) // 2000, 1)]
    header, rules = plain_header(name), known_headers().rules
    is_time, is_clock = rules["event.occurred_at"].rank(header) is not None, rules["clock"].rank(header) is not None
    clocks = [f for f in CLOCK_FORMATS if some and (":" in f or is_clock) and _fits(some, f)]
    if clocks:
        return Column(name, "clock", formats=clocks, **told)
    formats = [f for f in TIME_FORMATS if some and _fits(some, f)]
    formats += [f for f, pattern in _EPOCHS.items() if some and is_time and all(map(pattern.fullmatch, some))]
    iso = bool(some) and all(map(_ISO.match, some))
    if iso or (formats and not (formats == ["%Y%m%d"] and not is_time)):
        return Column(name, "time", formats=formats, **told)
    plain = [_SIGNS.sub("", v) for v in present]
    numbers = [v for v in plain if _PURE.match(v)]
    # a few placeholders such as "n/a" do not make a text of it
    if numbers and len(numbers) >= 0.95 * len(present):
        return Column(
            name, "number", **told, negative=any(v.startswith("-") for v in numbers),
            fractional=any(re.search(rf"\{decimal}\d*[1-9]", v) for v in numbers), whole_with_point=all(v.endswith(".0") for v in numbers),
        )  # fmt: skip
    return Column(name, "text", **told)


def _fits(values: Sequence[str], format: str) -> bool:
    try:
        for value in values:
            datetime.strptime(value, format)
    except ValueError:
        return False
    return True
