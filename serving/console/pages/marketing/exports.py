"""Exports: which files with rows of customers there are, and what waits for a sink that is a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starlette.responses import FileResponse, Response

from serving.console.pages.marketing.exporting import DOWNLOADED, MOST_FILES, customers_in, file_named, held_files, remove
from serving.console.pages.marketing.journeys import sinks_of
from serving.console.port import RefusedError
from serving.console.visit import Page, Visit

ADDRESS = "/exports"


async def exports_page(visit: Visit) -> Response:
    """What lies there, and what waits."""
    runtime = visit.runtime
    files = await visit.port.work(held_files, runtime.home)
    waiting = [each for each in await visit.port.work(sinks_of, runtime.journeys) if each.sink is not None and each.sink.url is None]
    return visit.page("exports.html", files=files, sinks=waiting, most=MOST_FILES, may_open=visit.may("read_customer"))


async def download(visit: Visit) -> Response:
    """One file that a page wrote; who is in it is noted first."""
    path = await _file(visit)
    await visit.port.work(_note, visit, path)
    return FileResponse(path, media_type="text/csv", filename=path.name)


async def delete(visit: Visit) -> Response:
    """Delete one file that a page wrote."""
    await visit.port.work(remove, await _file(visit))
    return visit.go(ADDRESS)


async def _file(visit: Visit) -> Path:
    path = await visit.port.work(file_named, visit.runtime.home, visit.part("name"))
    if path is None:
        raise RefusedError(404, visit.words.say("There is no such file any more."))
    return path


def _note(visit: Visit, path: Path) -> None:
    assert visit.key is not None
    customers = customers_in(path)
    if customers is None:
        raise RefusedError(409, visit.words.say("Nothing tells any more whose rows these are: delete the file and write it anew."))
    if customers:
        visit.runtime.audit.note_all(visit.runtime.clock(), visit.key.name, DOWNLOADED, customers, "done")


PAGES: Sequence[Page] = [
    Page(ADDRESS, exports_page, "decide", menu="Exports", group="Marketing"),
    Page(f"{ADDRESS}/{{name}}", download, "read_customer"),
    Page(f"{ADDRESS}/{{name}}/delete", delete, "read_customer", "POST"),
]
