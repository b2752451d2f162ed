"""The identifiers table, and the graph of it that this process holds in memory."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from features.events.event import SealedEvent
from features.events.identifiers import IdentifierKind, normalise_all
from features.people.hidden import Hidden
from features.people.identity_graph import IdentityGraph
from features.people.identity_state import Step, keys_of
from features.people.step_index import NumberedStep, StepIndex
from features.people.tombstones import Tombstones
from features.people.vault import Vault
from features.state.ports import IDENTIFIERS, LOG, State
from features.state.seen import Seen
from features.state.table_index import MARK

SCHEMA = pa.schema(
    [
        ("identity_key", pa.string()),
        ("customer_id", pa.string()),
        ("known_at", pa.timestamp("us", tz="UTC")),
        ("event_id", pa.string()),
        ("cause", pa.string()),
        ("through", pa.string()),
        ("seq", pa.int64()),
    ]
)


class Lesson(NamedTuple):
    """What an event taught, to be taught again."""

    keys: Sequence[str]
    previous: Sequence[str]
    event_id: str
    known_at: datetime


class Former(NamedTuple):
    """A customer who proved to be the same as another, when that was learnt, and by what they were known until then."""

    customer_id: str
    learnt_at: datetime
    keys: tuple[str, ...] = ()


class Identities:
    """The identifiers table and the graph that follows from it. Safe to call from several threads.

    Readers see the graph before a change by another process or after it.
    """

    def __init__(self, state: State, vault: Vault | None = None) -> None:
        self._state, self._table = state, state.tables[IDENTIFIERS]
        self.vault = vault or Vault.open(state)
        self.hidden = Hidden(state, self.refresh)
        """Who was erased: they are nobody's from then on, though the table may hold them yet."""
        self._tombstones = Tombstones(state, self.vault)
        self._lock, self._reading = threading.RLock(), threading.RLock()
        """Held while somebody looks or learns, which is short; and while the table is read or written, which may take long."""
        self._graph = IdentityGraph()
        self._learnt: list[tuple[Lesson | Step, int]] = []
        """What is to be written, and how many steps each taught."""
        self._seen = Seen(self._table)
        self._seq = 0
        self._index = StepIndex(state.database("step_index", MARK), self._table)
        self.refresh()
        # what was merged before this process began is no news to it
        self.take_disturbed()

    def refresh(self) -> None:
        """Read the table again: another process may have added to it, or an erasure taken from it.

        What was learnt here and is not written yet is learnt again on top of what the others have written, so that the guards
        hold over both.
        """
        with self._reading:
            files = self._seen.news()
            if files is None or (files and not self._take_over(self._read(files))):
                self._seq, fresh = 0, IdentityGraph()
                for step in self._read(self._seen.everything()):
                    fresh.apply(step)
                with self._lock:
                    fresh.disturbed = self._graph.disturbed
                    self._graph = self._learnt_again(fresh)
            self._seen.note()

    def _take_over(self, steps: Sequence[Step]) -> bool:
        """Take over what was appended: mostly what this process has worked out as well, from the same events in the same order.

        Where it is something else nothing is done: the guards must hold over both.
        """
        with self._lock:
            own = self._graph.news
            same = min(len(steps), len(own))
            if steps[:same] != own[:same]:
                return False
            known = len(own)
            self._drop_news(same)
            for step in steps[known:]:
                self._graph.apply(step)
            return True

    def _drop_news(self, number: int) -> None:
        """So many steps of what was learnt are written."""
        self._graph.news = self._graph.news[number:]
        while number and self._learnt:
            lesson, taught = self._learnt.pop(0)
            if taught > number:
                self._learnt.insert(0, (lesson, taught - number))
            number = max(0, number - taught)

    def _learnt_again(self, fresh: IdentityGraph) -> IdentityGraph:
        """What was learnt here and is not written yet, learnt again on top of *fresh*."""
        again = []
        for lesson, _ in self._learnt:
            if self._tombstones.stand_since(_about(lesson), lesson.known_at):
                # another process has erased them meanwhile
                continue
            had = len(fresh.news)
            if isinstance(lesson, Lesson):
                fresh.learn(*lesson)
            else:
                fresh.record(lesson)
            again.append((lesson, len(fresh.news) - had))
        self._learnt = [(lesson, count) for lesson, count in again if count]
        fresh.disturbed = fresh.disturbed | fresh.changed_since(self._graph)
        return fresh

    def _read(self, paths: Sequence[str]) -> list[Step]:
        if not paths:
            return []
        # an erasure writes the same texts in another of Arrow's layouts
        rows = pa.concat_tables([pq.ParquetFile(path).read().cast(SCHEMA) for path in paths]).sort_by("seq")
        self._seq = max(self._seq, rows["seq"][-1].as_py() if len(rows) else 0)
        return list(_steps(rows))

    # --- look-ups

    def resolve(self, identifiers: Mapping[IdentifierKind, str], region: str | None = None) -> str | None:
        """The customer that the strongest known one of *identifiers*, in clear, belongs to, or None.

        Raises:
            IdentifierError: a value is no identifier of its kind.
        """
        return self.owner_of(self.vault.keys(normalise_all(identifiers, region)))

    def owner_of(self, keys: Iterable[str]) -> str | None:
        """The customer of the first of *keys* that has one."""
        hidden = self.hidden.keys
        return self._graph.owner_of(key for key in keys if key not in hidden) if hidden else self._graph.owner_of(keys)

    def customer_of(self, event: SealedEvent) -> str | None:
        """The customer of an event, or None."""
        return self.owner_of(keys_of(event.identifiers))

    def owners(self) -> dict[str, str | None]:
        """The customer of every identity key; None where it identifies nobody."""
        hidden = self.hidden.keys
        return {key: owner for key, owner in self._graph.owners().items() if key not in hidden}

    def owners_before(self, keys: Iterable[str], moment: datetime) -> dict[str, str | None] | None:
        """The customer of each of *keys* that was known before *moment*; None where only the table tells, as one has changed since."""
        hidden = self.hidden.keys
        with self._lock:
            return self._graph.owners_before([key for key in keys if key not in hidden], moment)

    def current(self, customer_id: str) -> str:
        """The customer that *customer_id* has become by merges: itself, mostly."""
        return self._graph.current(customer_id)

    def knows(self, key: str) -> bool:
        """Whether the identity key was ever seen."""
        return self._graph.knows(key)

    def members(self, customer_id: str) -> list[str]:
        """The customer's identity keys, the strongest first."""
        return [] if customer_id in self.hidden.customers else self._graph.members(customer_id)

    def customers(self) -> list[str]:
        """Every customer that has an identifier, in order."""
        hidden = self.hidden.customers
        return [customer for customer in self._graph.customers() if customer not in hidden]

    def count(self) -> int:
        """How many customers have an identifier; it costs the same however many they are."""
        return self._graph.count() - sum(bool(self._graph.members(customer)) for customer in self.hidden.customers)

    def strongest(self) -> dict[str, str]:
        """Each customer's strongest identity key, the first of them by alphabet."""
        hidden = self.hidden.customers
        return {customer: key for customer, key in self._graph.strongest().items() if customer not in hidden}

    def former(self, customer_id: str) -> list[str]:
        """The customers that were merged into this one."""
        return self._graph.former(customer_id)

    def parted(self, one: str, other: str) -> bool:
        """Whether two customers were parted by hand."""
        return self._graph.parted(one, other)

    def lost(self, customer_id: str) -> list[str]:
        """The keys that were theirs, or of those merged into them, and identify nobody any more."""
        keys = {step.identity_key for step in self._steps_about((), (customer_id, *self.former(customer_id)))}
        return sorted(key for key in keys if self.knows(key) and self.owner_of([key]) is None)

    def story(self, customer_id: str) -> list[Step]:
        """How the customer came to be: everything known of their identifiers and of what was split from them, oldest first."""
        return sorted(self._steps_about(self.members(customer_id), [customer_id]), key=lambda step: step.known_at)

    def _steps_about(self, keys: Collection[str], customers: Collection[str]) -> list[Step]:
        """The steps of these identity keys and of these customers, in the order in which they were written."""
        if self._index.version != self._table.version():
            with self._state.lease.hold(LOG):
                self._index.catch_up()
        # not while they go from the one to the other
        with self._reading:
            with self._lock:
                news = [step for step in self._graph.news if step.identity_key in keys or step.customer_id in customers]
            return [*self._index.about(keys, customers), *news]

    def steps(self) -> list[Step]:
        """The whole table, in the order in which it was written, and what is to be written."""
        with self._reading:
            table = self._table.read()
            with self._lock:
                news = list(self._graph.news)
        return [*(() if table is None else _steps(table.sort_by("seq"))), *news]

    def disturbed_since(self, moment: datetime) -> set[str]:
        """Everybody who ever had an identifier that has changed hands since *moment*: those who were merged and are nobody now, too."""
        keys = self._graph.changed_hands_since(moment)
        return {step.customer_id for step in self._steps_about(keys, ()) if step.customer_id is not None} if keys else set()

    def take_disturbed(self) -> set[str]:
        """The customers who gained or lost an identifier with a past since the last call: what was derived of them is out of date."""
        with self._lock:
            taken, self._graph.disturbed = self._graph.disturbed, set()
            return taken

    # --- learning; what is new waits for ``flush``

    def learn(self, event: SealedEvent, known_at: datetime) -> str | None:
        """The event's customer, minted if need be. None where nobody is identified."""
        if not event.identifiers:
            return None
        lesson = Lesson(keys_of(event.identifiers), keys_of(event.previous), event.event_id, known_at)
        with self._lock:
            had = len(self._graph.news)
            owner = self._graph.learn(*lesson)
            if len(self._graph.news) > had:
                self._learnt.append((lesson, len(self._graph.news) - had))
            return owner

    def join(self, one: str, other: str, known_at: datetime, why: str) -> None:
        """Make two customers one, because somebody (or a link between their contacts) says so.

        Raises:
            PartedError: one of them is unknown.
        """
        with self._lock:
            had = len(self._graph.news)
            self._graph.join(one, other, known_at, why)
            self._learnt += [(step, 1) for step in self._graph.news[had:]]

    def part(self, customer_id: str, keys: Sequence[str], known_at: datetime, why: str) -> str:
        """Take *keys* from a customer, for good: no event will join them again. Returns the customer that they make.

        Raises:
            PartedError: they do not have them, or have no others.
        """
        with self._lock:
            had = len(self._graph.news)
            minted = self._graph.part(customer_id, keys, known_at, why)
            self._learnt += [(step, 1) for step in self._graph.news[had:]]
            return minted

    def flush(self) -> None:
        """Append what was learnt to the table; without news it writes nothing. Hold the lock of the log around it.

        Raises:
            MovedOnError: another process has written meanwhile, as the lock was lost; nothing was appended: try again.
        """
        with self._reading:
            if not self._graph.news:
                return
            # what others have written meanwhile comes first
            self.refresh()
            with self._lock:
                # who learns meanwhile adds to the end
                steps = list(self._graph.news)
            if not steps:
                return
            self._index.catch_up()
            # on that alone, as the lease may have been lost: who learnt the same meanwhile must not write it twice
            version = self._table.append(_table(steps, self._seq + 1), expected_version=self._seen.version)
            self._index.add(map(NumberedStep, itertools.count(self._seq + 1), steps), version)
            with self._lock:
                # not before they are written: a failed commit is tried again
                self._drop_news(len(steps))
            self._seq += len(steps)
            self._seen.note(version)

    def erase(self, keys: Sequence[str], customers: Sequence[str], event_ids: Sequence[str] = ()) -> int:
        """Delete every row of these identifiers and customers, and what others' rows say of them and of their events; returns how many.

        Raises:
            MovedOnError: another process has written to the table meanwhile, as the lease was lost: try again.
        """
        with self._state.lease.hold(LOG):
            self._index.catch_up()
            gone, seen = 0, self._index.version
            for change, column, values in (
                (self._table.erase, "identity_key", keys), (self._table.erase, "customer_id", customers),
                # what is left is somebody else's, though it was joined through a thing of theirs
                (self._table.blank, "through", keys), (self._table.blank, "event_id", event_ids),
            ):  # fmt: skip
                rows, seen = change(column, values, seen)
                gone += rows
            self._index.forget(keys, customers, event_ids, seen)
        self.refresh()
        return gone

    def close(self) -> None:
        """Let go of the databases that tell who was erased; they are opened again where they are needed."""
        self.hidden.close()
        self._tombstones.close()


def _about(lesson: Lesson | Step) -> Sequence[str]:
    """The identity keys that a lesson is about."""
    return [*lesson.keys, *lesson.previous] if isinstance(lesson, Lesson) else [lesson.identity_key]


def write_anew(state: State, steps: Sequence[Step]) -> None:
    """Put *steps* in the place of the whole table. Hold the lock of the log around it."""
    state.tables[IDENTIFIERS].overwrite(_table(steps, 1))


def _steps(rows: pa.Table) -> Iterator[Step]:
    return map(Step._make, zip(*(rows.column(name).to_pylist() for name in Step._fields), strict=True))


def _table(steps: Sequence[Step], first: int) -> pa.Table:
    columns = [list(column) for column in zip(*steps, strict=True)] or [[] for _ in Step._fields]
    numbered = [*columns, list(range(first, first + len(steps)))]
    return pa.table([pa.array(c, f.type) for c, f in zip(numbered, SCHEMA, strict=True)], schema=SCHEMA)
