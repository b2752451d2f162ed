"""A search of files for whatever betrays a person, as a process of its own (``python -m serving.privacy.traces``).

Closing a file cancels every POSIX lock that the process holds on it: a search within the service would take SQLite's locks
away, and what the service writes afterwards would be lost once another process closes the database
(SQLite documentation, "How To Corrupt An SQLite Database File", section 2.2).
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
EVENT_ID = "event id"


class Found(msgspec.Struct):
    """A trace that was found."""

    file: str
    what: str
    """Of which kind the trace is; the value itself is not told."""


class Trace(msgspec.Struct):
    """One value to search for."""

    value: str
    what: str
    whole: bool = False
    """What follows it must not belong to the same word: a short card number is the beginning of many a hash."""

    def is_in(self, content: bytes) -> bool:
        """Whether *content* holds it."""
        value = self.value.encode()
        if not self.whole:
            return value in content
        return re.search(re.escape(value) + rb"(?![0-9A-Za-z])", content) is not None


class TraceSearch(msgspec.Struct):
    """Where to look, and for what."""

    files: list[str]
    traces: list[Trace]
    database: str = ""
    """The URL of the server that holds the databases."""


class Searched(msgspec.Struct):
    """What a search has come upon, and how many tables of a server it went through."""

    found: list[Found]
    tables: int


def search(files: Sequence[Path], traces: Sequence[Trace], database: str = "") -> Searched:
    """Every trace that any of *files* holds, file by file, and any table of the server at *database*.

    Parquet files are searched value by value, as they are compressed; all others byte by byte, tables in all their text and bytes.

    Raises:
        subprocess.CalledProcessError: the search broke off.
    """
    asked = msgspec.json.encode(TraceSearch([str(path) for path in files], list(traces), database))
    command = [sys.executable, "-W", "ignore", "-m", "serving.privacy.traces"]
    done = subprocess.run(command, cwd=ROOT, input=asked, stdout=subprocess.PIPE, check=True)
    return msgspec.json.decode(done.stdout, type=Searched)


def _held(path: Path, traces: Sequence[Trace]) -> set[str]:
    if path.suffix != ".parquet":
        content = path.read_bytes()
        return {trace.what for trace in traces if trace.is_in(content)}
    texts = {text for column in pq.ParquetFile(path).read().itercolumns() for text in _texts(column)}
    found = {trace.what for trace in traces if trace.value in texts}
    joined = "\n".join(texts).encode()
    return found | {trace.what for trace in traces if trace.what != EVENT_ID and trace.is_in(joined)}


def _held_on(database: str, traces: Sequence[Trace]) -> Iterator[tuple[str, set[str]]]:
    """What each table of a server holds of the traces."""
    from features.state.postgres_search import contents, tables_of
    from features.state.postgres_server import server_at

    server = server_at(database)
    for place, columns in tables_of(server).items():
        found: set[str] = set()
        for content in contents(server, columns):
            found |= {trace.what for trace in traces if trace.is_in(content)}
        yield place, found


def _texts(column: pa.ChunkedArray) -> Iterator[str]:
    """Every distinct text in a column, however deep."""
    kind = column.type
    if pa.types.is_struct(kind):
        for part in column.combine_chunks().flatten():
            yield from _texts(pa.chunked_array([part]))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind):
        yield from _texts(pa.chunked_array([pc.list_flatten(column.combine_chunks())]))
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        yield from (text for text in pc.unique(column.cast(pa.string())).to_pylist() if text is not None)
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        yield from (content.decode("latin-1") for content in column.to_pylist() if content is not None)


if __name__ == "__main__":
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=TraceSearch)
    betrayed: list[Found] = []
    for file in asked.files:
        # a lock or a part may be gone again by now
        with contextlib.suppress(FileNotFoundError):
            betrayed += [Found(file, what) for what in sorted(_held(Path(file), asked.traces))]
    searched = 0
    if asked.database:
        for place, whats in _held_on(asked.database, asked.traces):
            searched += 1
            betrayed += [Found(place, what) for what in sorted(whats)]
    sys.stdout.buffer.write(msgspec.json.encode(Searched(betrayed, searched)))
