"""The log as it could be seen at a moment: identifiers resolved, nothing from the future. Every feature reads this."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from features.catalogue.shop import Shop
from features.catalogue.tables import Catalogue
from features.definitions.compute import Compute, Make
from features.definitions.domain import domain_named
from features.definitions.timeline import Timeline
from features.events.event import Purpose
from features.events.identifiers import KINDS
from features.people.consent import FEATURES, Consents
from features.people.hidden import Hidden
from features.people.identity import SCHEMA, Identities
from features.people.identity_state import keys_of
from features.state.home import Home
from features.state.ports import IDENTIFIERS
from features.store.duckdb_compute import DuckDBCompute
from features.store.event_log import EVENT_SCHEMA, EventLog

MANY_KEYS = 10_000
"""From so many identifiers on they are joined with what was said rather than looked up one by one."""
_EVER, _FOREVER = datetime(1900, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
_TIME = pa.timestamp("us", tz="UTC")
_STEP_COLUMNS = ["identity_key", "customer_id", "known_at", "seq"]
_SAID = pa.schema([("speaker", pa.string()), ("starts", _TIME), ("ends", _TIME), ("allowed", pa.bool_())])


def open_timeline(
    home: Home,
    identified_by: datetime,
    customers: Sequence[str] | None = None,
    purposes: Sequence[Purpose] = FEATURES,
    consents: Consents | None = None,
    identities: Identities | None = None,
    compute: Compute | None = None,
    few: Callable[[], Compute] | None = None,
) -> Timeline:
    """Open the log of *home* as far as consent allows: this is where consent is enforced.

    An event is usable for a purpose if that was allowed when it occurred and is not withdrawn now, whatever the moment that is
    looked back to. Events of nobody are nobody's to allow. To learn from, a customer of whom any event is not allowed for all
    *purposes* is left out whole, as their feature rows would carry it.

    Args:
        home: the installation.
        identified_by: identifiers resolve to the customers that were known strictly before this moment.
        customers: read only these customers' events, for the micro-batch that follows an intake.
        purposes: what the events are to be used for.
        consents: what customers have said; read from the log unless given.
        identities: who is who; with them *customers* costs what their events cost, whatever the length of the log.
        compute: what works it out, and is closed with it; a DuckDB connection of its own unless given.
        few: makes one that works it out where all that is needed of *customers* was found by the index.

    Raises:
        MissingStateError: nothing was imported yet.
    """
    shop = Shop.load(home)
    log = EventLog(home, shop.timezone)
    files = log.files()
    consents = consents or Consents(home, shop.consent)
    found = None if customers is None or identities is None else _by_key(log, identities, customers, identified_by)
    compute = compute or (DuckDBCompute(home) if found is None or few is None else few())
    try:
        if found is None:
            identifiers, raw = _steps(home, compute), compute.parquet("log", files, EVENT_SCHEMA)
        else:
            identifiers, raw = compute.given("identifiers_raw", found.owners), compute.given("log", found.events)
        return _opened(home, shop, compute, identifiers, raw, identified_by, customers, purposes, consents)
    except BaseException:
        compute.close()
        raise


def _opened(
    home: Home,
    shop: Shop,
    compute: Compute,
    identifiers: ir.Table,
    raw: ir.Table,
    identified_by: datetime,
    customers: Sequence[str] | None,
    purposes: Sequence[Purpose],
    consents: Consents,
) -> Timeline:
    hidden = Hidden(home).events
    # of people who were erased, and whose rows the files still hold
    gone = compute.given("hidden", pa.table({"event_id": pa.array(sorted(hidden), pa.string())})) if hidden else None

    def rows() -> ir.Table:
        return raw if gone is None else raw.anti_join(gone, "event_id")

    without = "" if gone is None else "without hidden"
    known = compute.kept("known", lambda: _as_known(identifiers, compute.moment(identified_by)))
    some_are_shared = _some_are_shared(compute, "known", known)
    wanted = None if customers is None else compute.given("wanted", pa.table({"customer_id": pa.array(customers, pa.string())}))

    def whose() -> ir.Table:
        # whose an event is and whether it may be used is worked out without what it holds, which is most of it
        bare = rows().select("event_id", "identity_key", "identifiers", "occurred_at", "declared_purposes")
        found = _identified(bare, known.filter(known.customer_id.notnull()), some_are_shared)
        return found if wanted is None else found.semi_join(wanted, "customer_id")

    identified = compute.kept("identified", whose, f"{without} {some_are_shared}")
    usable = _usable(compute, identified, identifiers, consents, purposes)
    kept = compute.kept("kept", lambda: usable().select("event_id", "customer_id"))

    def of_the_usable() -> ir.Table:
        all_rows = rows()
        return kept.inner_join(all_rows, "event_id").select("customer_id", *all_rows.columns)

    events = compute.kept("events", of_the_usable, without)
    compute.let_go("identified", "with_subject", "kept", *(f"judged_{purpose}" for purpose in purposes))
    catalogue = Catalogue(home)
    items = compute.parquet("items", [str(catalogue.path("items"))])
    untold = [name for name in domain_named(shop.domain).attributes if name not in items.columns]
    items = items.mutate(**{name: ibis.null("string") for name in untold})
    lines = compute.kept("lines", lambda: _lines(events))
    return Timeline(
        events=events,
        # joined anew by each query, which reads only the attributes that it asks for
        lines=lines.left_join(items, "item_id").drop("item_id_right"),
        refunds=compute.kept("refunds", lambda: _refunds(events)),
        baskets=compute.kept("baskets", lambda: _baskets(lines)),
        items=items,
        offers=compute.parquet("offers", [str(catalogue.path("offers"))]),
        item_context=compute.parquet("item_context", [str(catalogue.path("item_context"))]),
        shop=shop,
        # it names all that anybody said, which a few customers' rows need not know
        consents=consents.digest() if customers is None else "",
        compute=compute,
    )


def _lines(events: ir.Table) -> ir.Table:
    purchases = events.filter(events.name == "purchase")
    line = purchases.select(
        "event_id", "customer_id", "occurred_at", "known_at", "local_date", "local_hour", "store_id", item=purchases["items"].unnest()
    )
    return line.select(
        *[c for c in line.columns if c != "item"],
        **{name: line.item[name] for name in ("item_id", "quantity", "amount_minor", "discount_minor", "coupon_minor")},
    )


def _baskets(lines: ir.Table) -> ir.Table:
    return lines.group_by("event_id", "customer_id", "occurred_at", "known_at", "local_date", "local_hour", "store_id").aggregate(
        amount_minor=lines.amount_minor.sum(),
        discount_minor=lines.discount_minor.sum(),
        coupon_minor=lines.coupon_minor.sum(),
        lines=lines.count(),
    )


def _refunds(events: ir.Table) -> ir.Table:
    back = events.filter(events.name == "refund")
    back = back.select("event_id", "customer_id", "occurred_at", "known_at", "local_date", item=back["items"].unnest())
    return back.group_by("event_id", "customer_id", "occurred_at", "known_at", "local_date").aggregate(
        amount_minor=back.item["amount_minor"].sum()
    )


class _Found(NamedTuple):
    """What the index tells of a few customers."""

    events: pa.Table
    owners: pa.Table


def _by_key(log: EventLog, identities: Identities, customers: Sequence[str], moment: datetime) -> _Found | None:
    """The customers' events and the owners of all their identifiers before *moment*; None where only the identifiers table tells."""
    keys = {key for customer in customers for key in identities.members(customer)}
    # the index may not know yet that the log was compacted
    log.catch_up()
    with contextlib.closing(log.index) as index:
        if index.version < log.version():
            # lost or damaged a moment ago; it catches up with the next events
            return None
        rows = index.of(keys)
    owners = identities.owners_before(keys.union(*(keys_of(row.event.identifiers) for row in rows)), moment)
    if owners is None:
        return None
    columns = [list(owners), list(owners.values()), [_EVER] * len(owners), list(range(len(owners)))]
    schema = pa.schema([SCHEMA.field(name) for name in _STEP_COLUMNS])
    return _Found(log.to_arrow(rows), pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema))


def _steps(home: Home, compute: Compute) -> ir.Table:
    """The identifiers table; empty where every event so far is anonymous."""
    files = home.tables[IDENTIFIERS].files()
    if not files:
        return compute.given("identifiers_raw", SCHEMA.empty_table().select(_STEP_COLUMNS))
    return compute.parquet("identifiers_raw", files, SCHEMA).select(*_STEP_COLUMNS)


def _identified(raw: ir.Table, known: ir.Table, some_are_shared: bool) -> ir.Table:
    """Each event with its customer: that of its strongest identifier which identifies anybody."""
    owners = known.select("identity_key", "customer_id")
    if not some_are_shared:
        return raw.left_join(owners, "identity_key").select("customer_id", *raw.columns)
    order = ibis.literal({kind: rank for rank, kind in enumerate(KINDS)}, type="map<string, int64>")
    pairs = raw.filter(raw.identifiers.length() > 0).select("event_id", pair=raw.identifiers.unnest())
    keyed = pairs.select(pairs.event_id, kind=pairs.pair.key, each_key=pairs.pair.key + ":" + pairs.pair.value)
    owned = keyed.join(owners, keyed.each_key == owners.identity_key).select("event_id", "customer_id", rank=order.get(keyed.kind, 99))
    first = owned.group_by("event_id").aggregate(customer_id=owned.customer_id.argmin(owned["rank"]))
    return raw.left_join(first, "event_id").select("customer_id", *raw.columns)


def _some_are_shared(compute: Compute, name: str, known: ir.Table) -> bool:
    """Whether any identifier that was seen identifies nobody."""
    found = compute.asked(f"shared_{name}", lambda: known.aggregate(some=known.customer_id.isnull().any()))
    return bool(found["some"][0].as_py())


def _usable(compute: Compute, events: ir.Table, identifiers: ir.Table, consents: Consents, purposes: Sequence[Purpose]) -> Make:
    """The events that may be used for all of *purposes*."""
    columns = events.columns
    # a withdrawal counts for all that is theirs by now, however little was known of them at the moment looked back to
    known = compute.kept("known_now", lambda: _as_known(identifiers, ibis.timestamp(_FOREVER)))
    some_are_shared = _some_are_shared(compute, "known_now", known)

    def with_subject() -> ir.Table:
        then = events.rename(then="customer_id")
        now = _identified(then, known.filter(known.customer_id.notnull()), some_are_shared)
        as_then = [now.then.name("customer_id") if name == "customer_id" else now[name] for name in columns]
        return now.select(*as_then, subject=ibis.coalesce(now.customer_id, now.then))

    table = compute.kept("with_subject", with_subject, str(some_are_shared))
    speakers = _speakers(compute, known, consents)
    for purpose in purposes:
        rows = [
            (customer, interval.starts or _EVER, interval.ends or _FOREVER, interval.allowed)
            for customer, keys in speakers.items()
            for interval in consents.intervals(keys, purpose)
        ]
        arrays = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in _SAID]
        spoken = pa.table([pa.array(a, f.type) for a, f in zip(arrays, _SAID, strict=True)], schema=_SAID)
        said = compute.given(f"said_{purpose}", spoken)
        table = compute.kept(f"judged_{purpose}", partial(_judged, table, said, purpose, consents.policy.default(purpose)))

    def usable() -> ir.Table:
        kept = table.filter(table[purposes[0]])
        if len(purposes) > 1:
            refused = ibis.or_(*(~kept[purpose] for purpose in purposes[1:]))
            kept = kept.anti_join(kept.filter(refused).select("customer_id").distinct(), "customer_id")
        return kept.select(*columns)

    return usable


def _judged(table: ir.Table, said: ir.Table, purpose: Purpose, default: bool) -> ir.Table:
    within = table.left_join(said, [table.subject == said.speaker, table.occurred_at >= said.starts, table.occurred_at < said.ends])
    # what a source declares of its rows stands in for what the customer has not said
    verdict = ibis.coalesce(within.allowed, within.declared_purposes.contains(purpose), ibis.literal(default))
    return within.select(*table.columns, **{purpose: within.customer_id.isnull() | verdict})


def _speakers(compute: Compute, latest: ir.Table, consents: Consents) -> dict[str, list[str]]:
    """Each present customer who has said anything, with the keys that they said it under."""
    if consents.silent:
        return {}
    count = compute.asked("known_count", lambda: latest.aggregate(rows=latest.count()))["rows"][0].as_py()
    if count < MANY_KEYS:
        owners = compute.asked("owners", lambda: latest)
    else:
        said = compute.given("spoken", pa.table({"identity_key": pa.array(consents.keys(), pa.string())}))
        owners = compute.asked("owners", lambda: latest.semi_join(said, "identity_key"), "of who said anything")
    return consents.speakers(dict(zip(owners["identity_key"].to_pylist(), owners["customer_id"].to_pylist(), strict=True)))


def _as_known(identifiers: ir.Table, moment: ir.TimestampValue) -> ir.Table:
    """The last customer that each key was known to belong to before *moment*; ``row_number`` runs on every engine."""
    known = identifiers.filter(identifiers.known_at < moment)
    newest = ibis.window(group_by="identity_key", order_by=[ibis.desc("known_at"), ibis.desc("seq")])
    latest = known.mutate(nth=ibis.row_number().over(newest))
    return latest.filter(latest.nth == 0).select("identity_key", "customer_id")
