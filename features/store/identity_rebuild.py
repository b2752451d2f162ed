"""The identifiers table worked out anew from the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from features.people.identity import Identities, write_anew
from features.people.identity_graph import BY_HAND, IdentityGraph
from features.people.identity_state import keys_of
from features.state.ports import LOG, State
from features.store.event_log import EventLog, connect

Advance = Callable[[int, int], None]
BATCH = 100_000


def rebuild(state: State, timezone: str, advance: Advance = lambda done, of: None) -> int:
    """Replay every event that names somebody, in the order in which they became known; returns the number of customers.

    An event with one identifier says nothing when it is repeated, so only the first such of each identifier is read. What was
    decided by hand is done again at its own moment.
    """
    log = EventLog(state, timezone)
    with state.lease.hold(LOG):
        decisions = [step for step in Identities(state).steps() if step.cause in BY_HAND]
        graph = IdentityGraph()
        db = connect()
        db.execute(_ORDERED, [log.files()]).fetchall()
        [(count,)] = db.execute("SELECT count(*) FROM said").fetchall()
        waiting = iter([*decisions, None])
        decision = next(waiting)
        for start in range(0, count, BATCH):
            rows = db.execute(
                "SELECT identifiers, previous, event_id, known_at FROM said WHERE nth > ? AND nth <= ? ORDER BY nth", [start, start + BATCH]
            ).fetchall()
            for identifiers, previous, event_id, known_at in rows:
                while decision is not None and decision.known_at < known_at:
                    graph.repeat(decision)
                    decision = next(waiting)
                graph.learn(keys_of(_dict(identifiers)), keys_of(_dict(previous)), event_id, known_at)
            advance(min(start + BATCH, count), count)
        while decision is not None:
            graph.repeat(decision)
            decision = next(waiting)
        write_anew(state, graph.news)
    return len(graph.customers())


_ORDERED = """
    CREATE TEMP TABLE said AS
    WITH named AS (
        SELECT identifiers, previous, event_id, known_at, len(identifiers) = 1 AND len(previous) = 0 AS single
        FROM read_parquet(?) WHERE len(identifiers) > 0
    ), first AS (
        SELECT identifiers, previous, arg_min(event_id, known_at) AS event_id, min(known_at) AS known_at
        FROM named WHERE single GROUP BY identifiers, previous
        UNION ALL SELECT identifiers, previous, event_id, known_at FROM named WHERE NOT single
    )
    SELECT *, row_number() OVER (ORDER BY known_at, event_id) AS nth FROM first
"""


def _dict(pairs: list[dict[str, str]] | None) -> dict[Any, str]:
    return {pair["key"]: pair["value"] for pair in pairs or []}
