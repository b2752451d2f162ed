"""Decisions with what came of them: one row a choice, with the chance that it was chosen with, to learn from and to judge by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from features.people.consent import LEARNING
from features.people.identity import Identities
from features.state.disk import move_into_place
from features.state.home import Home
from features.state.ports import DECISIONS, MissingStateError
from features.store.outputs import remember_output
from features.store.timeline import open_timeline

SHOWN = ("offer_view", "view_promotion", "view_item_list", "ad_impression", "message_open")
CLICKED = ("select_promotion", "select_item", "view_item", "message_click", "ad_click")
TAKEN = ("offer_redeem",)
ACCEPTED, DECLINED = "offer_accept", "offer_decline"
"""What an associate, a call or a page tells of an answer that is given at once."""
OUTCOMES = ("shown", "clicked", "accepted", "declined", "redeemed", "bought")
EVER = datetime(2200, 1, 1, tzinfo=UTC)
WITHIN_DAYS = 14
"""Within how many days a purchase counts as what came of a decision."""
_CHOICES = '[{"item_id": "VARCHAR", "offer_id": "VARCHAR", "score": "DOUBLE", "source": "VARCHAR", "propensity": "DOUBLE"}]'


class Joined(NamedTuple):
    """What was joined.

    Attributes:
        rows: one a choice; see ``joined``.
        unknown: how many events name a decision that the log does not know; they stay in the log of events.
    """

    rows: pa.Table
    unknown: int


def joined(home: Home, until: datetime, within_days: int = WITHIN_DAYS) -> Joined:
    """Each choice of each decision before *until*, and what came of it before then.

    Columns: ``decision_id, kind, model, as_of, customer_id, group, held_out, variants`` (JSON), ``place`` (from 1), ``id`` (item or offer),
    ``score, source, propensity, is_item``; ``sent, shown, clicked, accepted, declined, redeemed``: an event names the decision and this
    choice, or the decision alone (an offer that the customer redeemed counts without naming one); ``bought``: the customer bought the
    item; each within *within_days*; ``closed``: whether all of that time has passed. What was held out was shown to nobody: its
    ``bought`` is what happened anyway.
    Left out are dry runs, answers without a choice, and customers from whom no model may learn.

    Raises:
        MissingStateError: no decision is logged yet.
    """
    with open_decisions(home) as opened:
        con, files = opened.connection, opened.files
        told = {"files": files, "until": until, "within": timedelta(days=within_days), "shape": _CHOICES}
        con.execute(_LOGGED, {"files": files})
        con.execute(_DECIDED, {name: told[name] for name in ("files", "until", "shape")})
        con.execute(_NAMED, {"until": until})
        names = {"shown": list(SHOWN), "clicked": list(CLICKED), "taken": list(TAKEN), "accepted": ACCEPTED, "declined": DECLINED}
        rows = con.execute(_JOINED, {"until": until, "within": told["within"], **names}).to_arrow_table()
        unknown = con.execute("SELECT count(*) FROM named ANTI JOIN logged USING (decision_id)").fetchone()[0]
        return Joined(rows, int(unknown))


def served(home: Home, decision_ids: Sequence[str]) -> dict[str, str]:
    """The features that were served with these decisions, as JSON, by decision."""
    if not decision_ids:
        return {}
    with open_decisions(home) as opened:
        query = """SELECT decision_id, any_value(features) FROM read_parquet(?, union_by_name = true)
                   WHERE decision_id IN (SELECT unnest(?)) GROUP BY decision_id"""
        return dict(opened.connection.execute(query, [opened.files, list(decision_ids)]).fetchall())


class OpenDecisions(NamedTuple):
    """The logged decisions beside the log of events.

    Attributes:
        backend: Ibis's, of ``connection``.
        connection: DuckDB's, with the tables of the timeline that may be learnt from (``features.store.timeline``), and ``current_names``:
            the customer that each ``logged`` one has become (``current``).
        files: the Parquet files of the decisions.
    """

    backend: Any
    connection: Any
    files: list[str]


@contextmanager
def open_decisions(home: Home) -> Iterator[OpenDecisions]:
    """Open the log of decisions; at the end the connection is closed.

    Raises:
        MissingStateError: no decision is logged yet.
    """
    files = home.tables[DECISIONS].files()
    if not files:
        raise MissingStateError("no decision is logged yet: serve answers first (python -m serving); the log is written every ten seconds")
    # who is who as is known now, for events as for decisions: what came of one is to be found, whoever was merged since
    timeline = open_timeline(home, identified_by=EVER, purposes=LEARNING)
    with closing(timeline):
        backend = timeline.events.get_backend()
        con = backend.con
        identities = Identities(home)
        asked = con.execute("SELECT DISTINCT customer_id FROM read_parquet(?, union_by_name = true)", [files]).fetchall()
        known = [row[0] for row in asked if row[0] is not None]
        current = pa.array([identities.current(customer) for customer in known], pa.string())
        con.register("current_names", pa.table({"logged": pa.array(known, pa.string()), "current": current}))
        yield OpenDecisions(backend, con, files)


def write(home: Home, found: Joined, out: Path) -> None:
    """Write the rows as Parquet, whole or not at all; an erasure will find the file."""
    remember_output(home, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    pq.write_table(found.rows, part)
    move_into_place(part, out)


def summary(rows: pa.Table) -> pd.DataFrame:
    """By kind and group: how many decisions and choices, how many were drawn, and the share of those that each outcome came of."""
    frame = rows.to_pandas()
    lines: list[dict[str, Any]] = []
    for (kind, held_out), part in frame.groupby(["kind", "held_out"], sort=True):
        line: dict[str, Any] = {
            "kind": kind, "held out": "yes" if held_out else "", "decisions": part["decision_id"].nunique(), "choices": len(part),
            "drawn": f"{(part['propensity'] < 1).mean():.1%}", "closed": f"{part['closed'].mean():.1%}",
        }  # fmt: skip
        lines.append(line | {name: f"{part[name].mean():.1%}" for name in OUTCOMES})
    return pd.DataFrame(lines)


_LOGGED = "CREATE TEMP TABLE logged AS SELECT DISTINCT decision_id FROM read_parquet($files, union_by_name = true)"
_DECIDED = """
CREATE TEMP TABLE decided AS
WITH each AS (
  SELECT decision_id, kind, model, as_of, n.current AS customer_id, request, assignment,
         unnest(from_json(choices, $shape)) AS choice, generate_subscripts(from_json(choices, $shape), 1) AS place
  FROM (
    -- a step of a journey that was broken off and done again is logged twice
    SELECT * FROM (
      SELECT NULL::VARCHAR AS assignment WHERE false UNION ALL BY NAME SELECT * FROM read_parquet($files, union_by_name = true)
    ) QUALIFY row_number() OVER (PARTITION BY decision_id ORDER BY as_of DESC) = 1
  ) AS d
       LEFT JOIN current_names AS n ON n.logged = d.customer_id
  WHERE as_of < $until AND coalesce(request ->> '$.dry_run', 'false') <> 'true'
    AND (d.customer_id IS NULL OR n.current IN (SELECT customer_id FROM events WHERE customer_id IS NOT NULL))
)
SELECT decision_id, kind, model, as_of, customer_id, assignment ->> '$.group' AS "group",
       coalesce(assignment ->> '$.held_out', 'false') = 'true' AS held_out, coalesce(assignment -> '$.variants', '{}')::VARCHAR AS variants,
       place, coalesce(choice.item_id, choice.offer_id) AS id, choice.item_id IS NOT NULL AS is_item, choice.score, choice.source,
       choice.propensity
FROM each WHERE coalesce(choice.item_id, choice.offer_id) IS NOT NULL
"""
_NAMED = """
CREATE TEMP TABLE named AS
SELECT decision_id, name, occurred_at, offer_id, list_transform(items, lambda i: i.item_id) AS item_ids
FROM events WHERE decision_id IS NOT NULL AND occurred_at < $until
"""
_JOINED = """
WITH told AS (
  SELECT d.decision_id, d.place,
         bool_or(n.name IN (SELECT unnest($shown))) AS shown, bool_or(n.name IN (SELECT unnest($clicked))) AS clicked,
         bool_or(n.name IN (SELECT unnest($taken))) AS redeemed, bool_or(n.name = 'message_sent') AS sent,
         bool_or(n.name = $accepted) AS accepted, bool_or(n.name = $declined) AS declined
  FROM decided AS d JOIN named AS n USING (decision_id)
  -- clients tell whole seconds
  WHERE n.occurred_at >= date_trunc('second', d.as_of) AND n.occurred_at < d.as_of + $within
    AND (n.offer_id = d.id OR list_contains(n.item_ids, d.id) OR (n.offer_id IS NULL AND coalesce(len(n.item_ids), 0) = 0))
  GROUP BY ALL
), redeemed AS (
  SELECT DISTINCT d.decision_id, d.place FROM decided AS d JOIN events AS e ON e.customer_id = d.customer_id AND e.offer_id = d.id
  -- one that names a decision counts for that one
  WHERE (e.decision_id IS NULL OR e.decision_id = d.decision_id)
    AND e.name IN (SELECT unnest($taken)) AND e.occurred_at >= d.as_of AND e.occurred_at < least(d.as_of + $within, $until)
), bought AS (
  SELECT DISTINCT d.decision_id, d.place FROM decided AS d
  JOIN lines AS l ON l.customer_id = d.customer_id AND l.item_id = d.id AND d.is_item
  WHERE l.quantity > 0 AND l.occurred_at >= d.as_of AND l.occurred_at < least(d.as_of + $within, $until)
)
SELECT d.decision_id, d.kind, d.model, d.as_of, d.customer_id, d."group", d.held_out, d.variants, d.place, d.id, d.score, d.source,
       d.propensity, d.is_item, coalesce(t.sent, false) AS sent,
       coalesce(t.shown, false) AS shown, coalesce(t.clicked, false) AS clicked, coalesce(t.accepted, false) AS accepted,
       coalesce(t.declined, false) AS declined,
       coalesce(t.redeemed, false) OR r.place IS NOT NULL AS redeemed, b.place IS NOT NULL AS bought, d.as_of + $within <= $until AS closed
FROM decided AS d LEFT JOIN told AS t USING (decision_id, place) LEFT JOIN redeemed AS r USING (decision_id, place)
LEFT JOIN bought AS b USING (decision_id, place)
ORDER BY d.as_of, d.decision_id, d.place
"""
