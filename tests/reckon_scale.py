"""What so many customers need in memory, disk, processors and money, reckoned from what ``bench_costs.py`` has measured.

``python tests/reckon_scale.py [CUSTOMERS ...]`` prints the tables of ``docs/scale.md``. How a shop's customers behave and what a machine
costs are assumptions: they stand in one block each, to be replaced by your own.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

SIZES = (1_000_000, 10_000_000, 100_000_000)


class Measured(NamedTuple):
    """One run of ``tests/bench_costs.py`` on two cores: bytes, and CPU seconds."""

    log_bytes: float = 88.5
    """Of an event in Parquet."""
    index_bytes: float = 489.0
    """Of an event in the index of the log, in PostgreSQL."""
    queue_bytes: float = 656.0
    """Of an event that waits, in PostgreSQL; let go once it is in the log."""
    identifier_bytes: float = 56.0 + 215.0 + 828.0
    """Of an identifier: table, index, contact."""
    graph_bytes: float = 495.0
    """Of an identifier, in the memory of each process."""
    consent_bytes: float = 811.0
    """Of a statement, in the memory of each process."""
    online_bytes: float = 25_004.0
    """Of a customer in Redis."""
    snapshot_bytes: float = 8_581.0
    """Of a customer in each night's snapshot."""
    process_bytes: float = 762e6
    """Of a service that has just started."""
    accepted: float = 92e-6
    """Of an event, by the process that takes it."""
    followed: float = 30e-6
    """Of an event, by each other process."""
    moved: float = 107e-6
    """Of an event, by the one that moves it into log, index and states."""
    windowed: float = 864e-6
    """Of a customer who has done something."""
    answer: float = 2.9e-3
    """Of an answer: the dearest of recommendations, offer and churn."""
    started: float = 16e-6
    """Of a customer, at each start of a process."""
    night: float = 6.8e-3 + 5.6e-3
    """Of a customer: features of everybody, and one model's scores; the start of both included."""
    turns: float = 218.0
    """Commits a second of the queue, one after the other, in PostgreSQL on that disk."""


class Shop(NamedTuple):
    """Assumed: what a customer does."""

    identifiers: float = 2.5
    events_a_day: float = 0.2
    answers_a_day: float = 0.5
    statements: float = 1.0
    kept_days: float = 730.0
    peak: float = 10.0
    """The busiest second beside the mean."""
    snapshots: float = 14.0
    """How many are kept."""


class Prices(NamedTuple):
    """Assumed, in units of money a month: an example, no offer of anybody."""

    core: float = 25.0
    memory_gb: float = 3.0
    ssd_gb: float = 0.10
    object_gb: float = 0.02


class Need(NamedTuple):
    """What an installation needs."""

    customers: int
    events: float
    answers: float
    process_gb: float
    processes: int
    start_seconds: float
    following: float
    moving: float
    redis_gb: float
    database_gb: float
    object_gb: float
    cores: float
    night_hours: float
    units: float


def need(customers: int, m: Measured, shop: Shop, prices: Prices) -> Need:
    """What *customers* need."""
    events, answers = (customers * each * shop.peak / 86_400 for each in (shop.events_a_day, shop.answers_a_day))
    process = m.process_bytes + customers * (shop.identifiers * m.graph_bytes + shop.statements * m.consent_bytes)
    # each answers half of the time of a core, follows everything, and there are two at least
    left = 0.5 - events * m.followed
    processes = max(2, round((events * m.accepted + answers * m.answer) / left + 0.5)) if left > 0 else 0
    kept = customers * shop.events_a_day * shop.kept_days
    database = kept * m.index_bytes + customers * shop.identifiers * (m.identifier_bytes - 56.0)
    objects = kept * m.log_bytes + customers * (shop.identifiers * 56.0 + shop.snapshots * m.snapshot_bytes)
    # half of what is taken falls to the database's own processes
    cores = 2 * processes + events * (m.moved + m.windowed) + 2 * events * m.accepted + 2
    redis = customers * m.online_bytes
    memory = processes * process + redis + 0.1 * database
    night = customers * m.night / 3600
    units = (
        (cores + night * 30 / 730) * prices.core
        + memory / 1e9 * prices.memory_gb
        + database / 1e9 * prices.ssd_gb
        + objects / 1e9 * prices.object_gb
    )
    return Need(
        customers, events, answers, process / 1e9, processes, customers * m.started, events * m.followed,
        events * (m.moved + m.windowed), redis / 1e9, database / 1e9, objects / 1e9, cores, night, units,
    )  # fmt: skip


def main_table(sizes: tuple[int, ...] = SIZES) -> list[str]:
    """The rows of the main table."""
    found = [need(customers, Measured(), Shop(), Prices()) for customers in sizes]

    def row(name: str, values: list[str]) -> str:
        return f"| {name} | " + " | ".join(values) + " |"

    def amount(gigabytes: float) -> str:
        return f"{gigabytes / 1000:,.1f} TB" if gigabytes >= 1000 else f"{gigabytes:,.0f} GB" if gigabytes >= 10 else f"{gigabytes:.1f} GB"

    return [
        row("customers", [f"{each.customers / 1e6:,.0f} M" for each in found]),
        "|---|" + "---|" * len(found),
        row("events a second, at the peak", [f"{each.events:,.0f}" for each in found]),
        row("answers a second, at the peak", [f"{each.answers:,.0f}" for each in found]),
        row("**memory of each process**", [amount(each.process_gb) for each in found]),
        row("processes that answer", [f"{each.processes}" for each in found]),
        row("their memory in all", [amount(each.process_gb * each.processes) for each in found]),
        row("CPU seconds to start one: who is who", [f"{each.start_seconds:,.0f}" for each in found]),
        row("share of a core with which each follows the others", [f"{each.following:.1%}" for each in found]),
        row("share of a core that the one mover needs", [f"{each.moving:.0%}" for each in found]),
        row("Redis, memory", [amount(each.redis_gb) for each in found]),
        row("PostgreSQL, disk", [amount(each.database_gb) for each in found]),
        row("object storage", [amount(each.object_gb) for each in found]),
        row("cores, in all", [f"{each.cores:,.0f}" for each in found]),
        row("core hours of each night", [f"{each.night_hours:,.0f}" for each in found]),
        row("units of money a month, at the example's prices", [f"{each.units:,.0f}" for each in found]),
    ]


def limits() -> list[str]:
    """The rows of the table of what gives way, the first of all first."""
    m, shop = Measured(), Shop()
    a_customer = shop.identifiers * m.graph_bytes + shop.statements * m.consent_bytes
    events_a_customer = shop.events_a_day * shop.peak / 86_400
    found = {
        "memory: processes of 16 GB (64 GB)": [(gigabytes * 1e9 - m.process_bytes) / a_customer for gigabytes in (16, 64)],
        "a start that takes 5 (30) CPU minutes": [minutes * 60 / m.started for minutes in (5, 30)],
        "Redis: 250 GB (1 TB) of memory in one server": [size / m.online_bytes for size in (250e9, 1e12)],
        "PostgreSQL: 1 TB (4 TB) of one server": [
            size
            / (events_a_customer / shop.peak * 86_400 * shop.kept_days * m.index_bytes + shop.identifiers * (m.identifier_bytes - 56.0))
            for size in (1e12, 4e12)
        ],
        "the mover: half of a core (a whole one)": [share / (events_a_customer * (m.moved + m.windowed)) for share in (0.5, 1.0)],
        "followed by each process: 5% (25%) of a core": [share / (events_a_customer * m.followed) for share in (0.05, 0.25)],
        "a night of 8 hours: 8 cores (32)": [cores * 8 * 3600 / m.night for cores in (8, 32)],
        "the queue: 10 (100) events in each of its commits": [size * m.turns / events_a_customer for size in (10, 100)],
    }
    rows = sorted(found.items(), key=lambda each: each[1][0])
    return ["| what is full | customers |", "|---|---|"] + [f"| {name} | {a / 1e6:,.0f} M ({b / 1e6:,.0f} M) |" for name, (a, b) in rows]


def main() -> None:
    print("\n".join([*main_table(tuple(int(word) for word in sys.argv[1:]) or SIZES), "", *limits()]))


if __name__ == "__main__":
    main()
