"""Dead letters sent again: each through the intake first, and out of the list after; the ids of events make a repeat harmless."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from features.catalogue.shop import Shop
from features.events.event import RejectedEvent
from features.sources.replay import AS_SENT, TRANSLATORS, Replayed, read_again
from serving.console.port import Port, RefusedError

logger = logging.getLogger("ubiquo")
LOOKED_AT = 2_000
"""Among so many of the newest letters of one source and field those of one reason are looked for: each must be decrypted."""
AT_ONCE = 200
JOBS_KEPT = 8
_SPECIFIC = re.compile(r"\S*\d\S*")
GONE = {"accepted": "stored", "duplicate": "already known", "erased": "erased"}
"""What the intake says of an event that need not be kept as a letter any more, and what a replay calls it."""


async def send_again(port: Port, letters: Sequence[Mapping[str, Any]], fixed: Any = None) -> list[Replayed]:
    """Send letters of one source again, or *fixed* in place of the one; those that were taken leave the list.

    What makes no event yet is not sent, and stays. A crash in between leaves a letter that is known already when it is sent again.

    Raises:
        RefusedError: the intake takes nothing now.
    """
    home = port.runtime.home
    shop = await port.work(Shop.load, home)
    told: dict[str, Replayed] = {}
    sent: list[tuple[Mapping[str, Any], Any]] = []
    for letter in letters:
        try:
            message, _ = read_again(letter, shop, fixed)
        except LookupError as error:
            told[letter["letter_id"]] = Replayed(letter["letter_id"], "from a file", letter["field"], str(error.args[0]))
        except RejectedEvent as error:
            told[letter["letter_id"]] = Replayed(letter["letter_id"], "rejected", error.field, error.reason)
        else:
            sent.append((letter, message))
    if sent:
        answer = await port.take([message for _, message in sent], sent[0][0]["source"], _translation(sent, shop.currency))
        for (letter, _), receipt in zip(sent, answer["events"], strict=True):
            outcome = GONE.get(receipt["status"], "rejected")
            told[letter["letter_id"]] = Replayed(letter["letter_id"], outcome, receipt["field"] or "", receipt["reason"] or "")
        gone = [name for name, each in told.items() if each.outcome in GONE.values()]
        await port.work(port.runtime.log.forget_letters, gone)
    return [told[letter["letter_id"]] for letter in letters]


def _translation(sent: Sequence[tuple[Mapping[str, Any], Any]], currency: str) -> Any:
    """How the messages become events: each as at the moment of its receipt, as their clients' clocks are corrected by it."""
    source = sent[0][0]["source"]
    if source in AS_SENT:
        return None
    # the same objects come back one by one
    received: dict[int, datetime] = {id(message): letter["received_at"] for letter, message in sent}

    def translate(message: Any, now: datetime) -> Any:
        return TRANSLATORS[source](message, received.get(id(message), now), currency)

    return translate


class Resending:
    """All letters of one reason, on their way again; it goes on whoever looks."""

    def __init__(self, port: Port, key: str, source: str, field: str, kind: str) -> None:
        self.name, self.source, self.field, self.kind = uuid.uuid4().hex, source, field, kind
        self.outcomes: Counter[str] = Counter()
        self.first_refusal: Replayed | None = None
        self.all = 0
        self.failure = ""
        self.ended = False
        self._port, self._key = port, key

    @property
    def done(self) -> int:
        """How many letters have had their turn."""
        return self.outcomes.total()

    async def run(self) -> None:
        """Send them, some at a time, and note in the audit log what became of them."""
        try:
            letters = await self._port.work(self._find)
            self.all = len(letters)
            for start in range(0, len(letters), AT_ONCE):
                for each in await send_again(self._port, letters[start : start + AT_ONCE]):
                    self.outcomes[each.outcome] += 1
                    if each.outcome == "rejected" and self.first_refusal is None:
                        self.first_refusal = each
        except RefusedError as error:
            self.failure = error.detail
        except Exception as error:
            logger.exception("sending dead letters again broke off; those that were not sent are still there")
            self.failure = type(error).__name__
        finally:
            self.ended = True
            runtime = self._port.runtime
            outcome = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.outcomes.items())) or "none"
            subject = f"{self.source} {self.field}"
            # not among the pages' work: what was done is written down however many wait there
            await asyncio.to_thread(runtime.audit.note, runtime.clock(), self._key, "replay letters", subject, outcome)

    def _find(self) -> list[dict[str, Any]]:
        newest = self._port.runtime.log.letters.newest(self.source, self.field, LOOKED_AT)
        return [each for each in newest if alike(each["reason"]) == self.kind]


class Resendings:
    """The latest few jobs of a process; one runs at a time."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Resending] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, job: Resending) -> None:
        """Let it run.

        Raises:
            RefusedError: another is still running.
        """
        if any(not each.ended for each in self._jobs.values()):
            raise RefusedError(409, "letters are being sent again already: wait for the end of that")
        self._jobs[job.name] = job
        while len(self._jobs) > JOBS_KEPT:
            self._jobs.popitem(last=False)
        task = asyncio.create_task(job.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def get(self, name: str) -> Resending | None:
        """The job of that name, if it is one of the latest."""
        return self._jobs.get(name)


JOBS = Resendings()


class Group(NamedTuple):
    """Letters of one source, field and reason, and the newest of them."""

    source: str
    field: str
    kind: str
    """What their reasons have in common."""
    letters: int
    newest: Mapping[str, Any]


def alike(reason: str) -> str:
    """A reason without its numbers, times and ids: those that differ in nothing else are one."""
    return _SPECIFIC.sub("#", reason)


def groups(letters: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Letters, newest first, by source, field and reason; the most frequent first."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for letter in letters:
        found.setdefault((letter["source"], letter["field"], alike(letter["reason"])), []).append(letter)
    return sorted((Group(*key, len(those), those[0]) for key, those in found.items()), key=lambda group: -group.letters)


def value_at(raw: str, field: str) -> str | None:
    """What stands at the path of the field at fault, as JSON; None where nothing does, or the letter is no JSON."""
    try:
        found: Any = msgspec.json.decode(raw)
        for step in field.replace("[", ".[").strip(".").split("."):
            if step == "$":
                return None
            found = found[int(step[1:-1])] if step.startswith("[") else found[step]
    except (msgspec.DecodeError, KeyError, IndexError, TypeError, ValueError, RecursionError):
        return None
    return msgspec.json.encode(found).decode()[:300]
