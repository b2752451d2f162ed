"""One document, three forms: tables that fit a terminal, Markdown to paste, an HTML page."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from enum import StrEnum

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from models.reports import Document, Sheet

GAP = 2
"""Blank columns between two columns of a table."""
LONGEST_NAME = 26
"""A column of texts no longer than this is not wrapped."""
NARROWEST = 15
"""One of longer texts is wrapped by words, down to this width."""
_INTERVAL = re.compile(r" (?=\[)")
_NUMBERS = re.compile(r"(?:[-+]?\d[\d.,e+-]*%?|[\[\]()/ ,;]|to)+")
"""A cell that holds numbers alone; a column of such is not wrapped."""


class Rendering(StrEnum):
    """How tables are printed."""

    RICH = "rich"
    MARKDOWN = "markdown"
    HTML = "html"


def default_rendering() -> Rendering:
    """Fitted to its width on a terminal; Markdown where the output goes into a file or another program."""
    return Rendering.RICH if sys.stdout.isatty() else Rendering.MARKDOWN


def show(documents: Iterable[Document], rendering: Rendering | None, console: Console) -> None:
    """Print documents in that form; None is the default."""
    chosen = rendering or default_rendering()
    found = list(documents)
    if chosen is Rendering.RICH:
        for document in found:
            print_rich(document, console)
    elif chosen is Rendering.MARKDOWN:
        print("\n\n".join(map(markdown, found)) + "\n")
    else:
        # it brings the plots' library with it
        from training.page import page

        print(page(found[0].title, found[0].parts) if len(found) == 1 else page("ubiquo: what the models are worth", found))


def markdown(document: Document) -> str:
    """The document as Markdown: sentences that follow each other stay lines of one paragraph."""
    blocks: list[str] = [f"**{document.title}**"]
    after_table = True
    for part in document.parts:
        if isinstance(part, Sheet):
            blocks.append(markdown_table(part))
        elif after_table:
            blocks.append(part)
        else:
            blocks[-1] += f"\n{part}"
        after_table = isinstance(part, Sheet)
    return "\n\n".join(blocks)


def markdown_table(sheet: Sheet) -> str:
    """A table as Markdown, under its title."""
    lines = [f"*{sheet.title}*\n"] if sheet.title else []
    lines += [_line(sheet.columns), "|" + "---|" * len(sheet.columns)]
    for number, (name, *cells) in enumerate(sheet.rows):
        lines.append(_line([f"**{name}** (served)" if number == sheet.served else name, *cells]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "; ") for cell in cells) + " |"


def print_rich(document: Document, console: Console) -> None:
    """Print the document; every table is turned or parted until it fits the console, and no number is cut or broken."""
    console.print(Text(document.title, style="bold"))
    after_table = False
    for part in document.parts:
        if isinstance(part, Sheet):
            for fitted in fit(part, console.width):
                console.print(Padding(_rich_table(fitted, console.width), (1, 0, 0, 0)))
        else:
            console.print(Padding(Text(part), (int(after_table), 0, 0, 0)))
        after_table = isinstance(part, Sheet)
    console.print()


def fit(sheet: Sheet, width: int) -> list[Sheet]:
    """The table in as few parts as fit *width*: as it is, turned round, or parted by its groups of columns; intervals go on a line of their
    own where that saves room.
    """
    for attempt in _attempts(_told(sheet)):
        if all(sum(_least(each)) + GAP * (len(each.columns) - 1) <= width for each in attempt):
            return attempt
    return [portion for part in by_groups(_told(sheet)) for portion in _portions(_broken(part), width)]


def turned(sheet: Sheet) -> Sheet:
    """Rows as columns and columns as rows."""
    names = [row[0] for row in sheet.rows]
    rows = [[column, *(row[k] for row in sheet.rows)] for k, column in enumerate(sheet.columns) if k]
    return Sheet(columns=["", *names], rows=rows, title=sheet.title)


def by_groups(sheet: Sheet) -> list[Sheet]:
    """One table a group of columns, whose columns no longer repeat its name; itself where it has no groups."""
    names = [group for group in dict.fromkeys(sheet.groups) if group]
    if not names:
        return [sheet]
    found = []
    for name in names:
        kept = [0, *(k for k, group in enumerate(sheet.groups) if group == name)]
        columns = [sheet.columns[k].removeprefix(f"{name} ") for k in kept]
        title = f"{sheet.title}: {name}" if sheet.title else name
        found.append(Sheet(columns=columns, rows=[[row[k] for k in kept] for row in sheet.rows], title=title))
    return found


def _attempts(sheet: Sheet) -> Iterator[list[Sheet]]:
    """Ever narrower ways to show a table, the easiest to read first."""
    # as many columns as there are models read better than as many as there are measures
    turns = [sheet, turned(sheet)] if len(sheet.columns) > len(sheet.rows) + 1 else [sheet]
    parts = by_groups(sheet)
    ways = [[each] for each in turns]
    if len(parts) > 1:
        ways += [parts, [turned(part) for part in parts]]
    yield from ways
    yield from ([_broken(each) for each in way] for way in ways)


def _told(sheet: Sheet) -> Sheet:
    """The table with the served row named so."""
    rows = [[f"{row[0]} (served)", *row[1:]] if number == sheet.served else row for number, row in enumerate(sheet.rows)]
    return Sheet(columns=sheet.columns, rows=rows, title=sheet.title, groups=sheet.groups)


def _broken(sheet: Sheet) -> Sheet:
    """The table with each interval under its value."""
    rows = [[row[0], *(_INTERVAL.sub("\n", cell) for cell in row[1:])] for row in sheet.rows]
    return Sheet(columns=sheet.columns, rows=rows, title=sheet.title, groups=sheet.groups)


def _portions(sheet: Sheet, width: int) -> Iterator[Sheet]:
    """The columns in portions that fit, each beside the names of the rows; one column alone may be too wide, and is wrapped then."""
    least, kept = _least(sheet), [0]
    for column in range(1, len(sheet.columns)):
        if len(kept) > 1 and sum(least[k] + GAP for k in (*kept, column)) - GAP > width:
            yield _some(sheet, kept)
            kept = [0]
        kept.append(column)
    yield _some(sheet, kept)


def _some(sheet: Sheet, kept: list[int]) -> Sheet:
    return Sheet(columns=[sheet.columns[k] for k in kept], rows=[[row[k] for k in kept] for row in sheet.rows], title=sheet.title)


def _least(sheet: Sheet) -> list[int]:
    """How narrow each column can be without breaking a number or a word."""
    found = []
    for column, head in enumerate(sheet.columns):
        cells = [line for row in sheet.rows for line in row[column].split("\n")]
        widest = max(map(len, cells), default=0)
        if widest > LONGEST_NAME and not any(map(_NUMBERS.fullmatch, filter(None, cells))):
            widest = max([NARROWEST, *(len(word) for cell in cells for word in cell.split())])
        found.append(max([widest, *map(len, head.split())], default=1) or 1)
    return found


def _rich_table(sheet: Sheet, width: int) -> Table:
    """The table with the width of each column set, so that nothing is left for Rich to cut."""
    widths = _least(sheet)
    spare = max(width - sum(widths) - GAP * (len(widths) - 1), 0)
    for column, head in enumerate(sheet.columns):
        wished = max([len(head), *(len(line) for row in sheet.rows for line in row[column].split("\n"))])
        more = min(max(wished - widths[column], 0), spare)
        widths[column], spare = widths[column] + more, spare - more
    title = Text(sheet.title, style="italic") if sheet.title else None
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0),
        collapse_padding=True,
    )  # fmt: skip
    for head, cells in zip(sheet.columns, widths, strict=True):
        table.add_column(Text(head), width=cells, overflow="fold")
    for row in sheet.rows:
        table.add_row(*map(Text, row), style="bold" if row[0].endswith("(served)") else "")
    return table
