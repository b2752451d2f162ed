"""A retailer's own files: what a mapping takes, what it refuses and how it says so, and that nothing is lost or taken twice."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, ClassVar
from zoneinfo import ZoneInfo

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import ROOT, command

from features.catalogue.shop import Shop
from features.catalogue.tables import Catalogue
from features.people.consent import ConsentPolicy
from features.sources.complete_journey import CompleteJourney
from features.sources.guessing import propose
from features.sources.importing import EventSource, bring_in
from features.sources.mapped import MappedFiles, RejectedFilesError
from features.sources.mapping import Mapping
from features.sources.mapping_parts import MappingError
from features.sources.tabular import UnreadableFileError
from features.state.home import Home
from features.store.event_log import EventLog, connect

HEADER = "order,at,sku,name,qty,price,customer,branch"
ROWS = (
    "1,2024-03-01 10:00:00,a,Apple,2,1.25,7,north",
    "1,2024-03-01 10:00:00,b,Bread,1,3.10,7,north",
    "2,2024-03-02 11:30:00,a,Apple,1,1.25,,north",
    "3,2024-03-03 09:15:00,c,Cheese,1,5.00,8,south",
)
SHARED = ROOT.parent / "shared" / "data" / "online-retail" / "online-retail.csv.gz"


def said(**changes: Any) -> dict[str, Any]:
    """A mapping for the little shop's file; ``event__id="x"`` changes ``event.id``, None takes a key away."""
    mapping: dict[str, Any] = {
        "source": "little", "max_rejected": 0.5,
        "shop": {"name": "little", "timezone": "Europe/Paris", "currency": "EUR"},
        "consent": {"basis": "loyalty terms", "purposes": ["analytics", "personalization"]},
        "event": {
            "id": "order", "name": {"value": "purchase"}, "identifiers": {"user_id": "customer"}, "store_id": "branch",
            "occurred_at": {"column": "at", "format": "%Y-%m-%d %H:%M:%S", "timezone": "Europe/Paris"},
        },
        "item": {"id": "sku", "quantity": {"column": "qty"}, "amount": {"column": "price", "per": "unit"}, "attributes": {"type": "name"}},
    }  # fmt: skip
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = mapping
        for name in parents:
            inner = inner.setdefault(name, {})
        if value is None:
            inner.pop(last, None)
        else:
            inner[last] = value
    return mapping


def mapped(**changes: Any) -> Mapping:
    return Mapping.parse(yaml.safe_dump(said(**changes)).encode(), "mapping.yaml")


def write(path: Path, rows: Iterable[str] = ROWS, header: str = HEADER, encoding: str = "utf-8") -> Path:
    text = "\n".join([header, *rows]) + "\n"
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
    with openers.get(path.suffix, open)(path, "wb") as handle:
        handle.write(text.encode(encoding))
    return path


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def staged(home: Home, *paths: Path, **changes: Any) -> MappedFiles:
    source = MappedFiles(home, [str(path) for path in paths], mapped(**changes))
    source.stage()
    return source


def taken(source: MappedFiles) -> list[dict[str, Any]]:
    return [json.loads(arrival.raw) for batch in source.events() for arrival in batch]


def only_reason(home: Home, tmp_path: Path, rows: Iterable[str] = ROWS, header: str = HEADER, **changes: Any) -> tuple[str, str]:
    [rejection] = staged(home, write(tmp_path / "f.csv", rows, header), **changes).rejections()
    return rejection.field, f"{rejection.reason} ({rejection.example})"


class TestWhatIsTaken:
    def test_lines_of_one_order_are_one_event_with_money_in_cents_and_time_in_utc(self, home: Home, tmp_path: Path) -> None:
        first, second, third = taken(staged(home, write(tmp_path / "sales.csv")))
        assert first == {
            "event_id": "little-purchase-1", "name": "purchase", "occurred_at": "2024-03-01T09:00:00.000000Z", "currency": "EUR",
            "identifiers": {"user_id": "7"}, "store_id": "north", "traits": {},
            "items": [
                {"item_id": "a", "quantity": 2, "amount_minor": 250, "discount_minor": 0, "coupon_minor": 0},
                {"item_id": "b", "quantity": 1, "amount_minor": 310, "discount_minor": 0, "coupon_minor": 0},
            ],
        }  # fmt: skip
        assert second["identifiers"] == {}, "a row without a customer stays anonymous"
        assert third["items"][0]["amount_minor"] == 500

    @pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.bz2", "tsv", "parquet", "jsonl", "jsonl.gz"])
    def test_every_kind_of_file_gives_the_same_events(self, home: Home, tmp_path: Path, ending: str) -> None:
        expected = taken(staged(Home(tmp_path / "other"), write(tmp_path / "plain.csv")))
        path = tmp_path / f"sales.{ending}"
        records = list(csv.DictReader([HEADER, *ROWS]))
        if ending == "parquet":
            at = [datetime.fromisoformat(r["at"]).replace(tzinfo=ZoneInfo("Europe/Paris")) for r in records]
            columns: dict[str, Any] = {name: [r[name] or None for r in records] for name in records[0]}
            columns |= {
                "at": pa.array(at, pa.timestamp("ns", tz="Europe/Paris")),
                "qty": pa.array([int(r["qty"]) for r in records], pa.int32()),
            }
            columns["price"] = [float(r["price"]) for r in records]
            pq.write_table(pa.table(columns), path)
        elif "jsonl" in ending:
            lines = [
                json.dumps({**r, "qty": int(r["qty"]), "price": float(r["price"]), "customer": r["customer"] or None}) for r in records
            ]
            write(path, lines[1:], header=lines[0])
        else:
            write(path, *(([r.replace(",", "\t") for r in ROWS], HEADER.replace(",", "\t")) if ending == "tsv" else ()))
        changes: dict[str, Any] = {"event__occurred_at": {"column": "at"}} if ending == "parquet" else {}
        assert taken(staged(home, path, **changes)) == expected

    def test_an_export_from_excel_with_its_own_encoding_decimals_and_dates(self, home: Home, tmp_path: Path) -> None:
        rows = ("1;01.03.2024 10:00;a;Crème brûlée;2;1.234,50;7;nord", "2;02.03.2024 10:00;b;Äpfel;1;0,99;7;nord")
        path = write(tmp_path / "s.csv", rows, HEADER.replace(",", ";"), "windows-1252")
        time = {"column": "at", "format": "%d.%m.%Y %H:%M", "timezone": "Europe/Paris"}
        written = {"encoding": "windows-1252", "delimiter": ";", "decimal": ",", "thousands": "."}
        source = staged(home, path, files=written, event__occurred_at=time)
        assert [e["items"][0]["amount_minor"] for e in taken(source)] == [246900, 99]
        source.write_catalogue(Catalogue(home))
        assert Catalogue(home).read("items")["type"].to_pylist() == ["Crème brûlée", "Äpfel"]

    @pytest.mark.parametrize(
        ("date", "clock", "format"),
        [("01.03.2024", "10:00", "%d.%m.%Y %H:%M"), ("2024-03-01", "10:00:00", None), ("20240301", "1000", "%Y%m%d %H%M")],
    )
    def test_a_date_and_a_time_of_day_in_two_columns_are_one_moment(
        self, home: Home, tmp_path: Path, date: str, clock: str, format: str | None
    ) -> None:
        header = HEADER.replace("at", "day,clock", 1)
        rows = [f"1,{date},{clock},a,x,1,1.00,7,n", f"2,{date},,a,x,1,1.00,7,n"]
        time = {"columns": ["day", "clock"], "timezone": "Europe/Paris"} | ({"format": format} if format else {})
        source = staged(home, write(tmp_path / "f.csv", rows, header), event__occurred_at=time)
        assert [e["occurred_at"] for e in taken(source)] == ["2024-03-01T09:00:00.000000Z"]
        [rejection] = source.rejections()
        assert (rejection.field, rejection.reason) == ("event.occurred_at", "is empty: clock")

    @pytest.mark.parametrize(
        ("thousands", "price", "minor"),
        [(".", "1.234,56", 123456), (".", "€ 1.234,56", 123456), (".", "1.234,56 EUR", 123456), (" ", "1\u202f234,56\u00a0€", 123456)],
    )
    def test_money_may_carry_the_sign_of_the_shops_currency_and_no_other(
        self, home: Home, tmp_path: Path, thousands: str, price: str, minor: int
    ) -> None:
        rows = [f"1;2024-03-01 10:00:00;a;x;1;{price};7;n", "2;2024-03-01 10:00:00;a;x;1;$ 5,00;7;n"]
        files = {"delimiter": ";", "decimal": ",", "thousands": thousands}
        source = staged(home, write(tmp_path / "f.csv", rows, HEADER.replace(",", ";")), files=files)
        assert [e["items"][0]["amount_minor"] for e in taken(source)] == [minor]
        assert [r.field for r in source.rejections()] == ["item.amount"]

    @pytest.mark.parametrize(
        ("currency", "price", "unit", "minor"),
        [("EUR", "1.255", "major", 126), ("JPY", "120", "major", 120), ("KWD", "1.2345", "major", 1235), ("EUR", "125", "minor", 125)],
    )
    def test_money_is_in_the_minor_unit_of_its_currency_halves_rounded_up(
        self, home: Home, tmp_path: Path, currency: str, price: str, unit: str, minor: int
    ) -> None:
        source = staged(
            home, write(tmp_path / "f.csv", [f"1,2024-03-01 10:00:00,a,x,1,{price},7,n"]), shop__currency=currency,
            item__amount={"column": "price", "unit": unit},
        )  # fmt: skip
        assert taken(source)[0]["items"][0]["amount_minor"] == minor

    @pytest.mark.parametrize(
        "written", ["2024-03-01 10:00:00 +0100", "2024-03-01T10:00:00+01", "2024-03-01 09:00:00Z", "2024-03-01T09:00:00 +00:00"]
    )
    def test_an_offset_may_be_written_in_any_way(self, home: Home, tmp_path: Path, written: str) -> None:
        source = staged(home, write(tmp_path / "f.csv", [f"1,{written},a,x,1,1.00,7,n"]), event__occurred_at={"column": "at"})
        assert [e["occurred_at"] for e in taken(source)] == ["2024-03-01T09:00:00.000000Z"]

    def test_a_weight_is_one_piece_paid_by_its_weight(self, home: Home, tmp_path: Path) -> None:
        path = write(tmp_path / "f.csv", ["1,2024-03-01 10:00:00,a,x,0.534,10.00,7,n"])
        [event] = taken(staged(home, path, item__quantity={"column": "qty", "fractions": "round_up"}))
        assert (event["items"][0]["quantity"], event["items"][0]["amount_minor"]) == (1, 534)

    def test_an_event_type_of_theirs_is_translated_and_one_not_named_is_rejected(self, home: Home, tmp_path: Path) -> None:
        header = "at,kind,sku,customer"
        rows = ("2024-03-01T10:00:00+01:00,view,a,7", "2024-03-01T10:05:00+01:00,cart,a,7", "2024-03-01T10:06:00+01:00,wink,a,7")
        changes: dict[str, Any] = {
            "event__id": None, "event__store_id": None, "event__name": {"column": "kind", "values": {"view": "view_item", "cart": "add_to_cart"}},
            "event__occurred_at": {"column": "at"}, "item": {"id": "sku"},
        }  # fmt: skip
        source = staged(home, write(tmp_path / "clicks.csv", rows, header), **changes)
        assert [e["name"] for e in taken(source)] == ["view_item", "add_to_cart"]
        [rejection] = source.rejections()
        assert rejection.field == "event.name"
        assert "wink" in rejection.example

    def test_a_cancellation_is_a_refund_of_its_own_with_positive_quantities(self, home: Home, tmp_path: Path) -> None:
        rows = (*ROWS, "C1,2024-03-05 10:00:00,a,Apple,-2,1.25,7,north")
        events = taken(staged(home, write(tmp_path / "f.csv", rows), refunds={"when": [{"column": "order", "matches": "^C"}]}))
        assert [e["name"] for e in events] == ["purchase", "purchase", "purchase", "refund"]
        assert events[-1]["items"][0] | {"discount_minor": 0} == {
            "item_id": "a", "quantity": 2, "amount_minor": 250, "discount_minor": 0, "coupon_minor": 0,
        }  # fmt: skip
        assert "order_id" not in events[-1]

    def test_each_row_is_counted_once_whatever_became_of_it(self, home: Home, tmp_path: Path) -> None:
        rows = (
            *ROWS,
            "4,2024-03-04 10:00:00,POST,Postage,1,4.00,7,north",  # its only line is no item
            "1,2024-03-01 10:00:00,POST,Postage,1,4.00,7,north",  # left out of order 1
            "5,2024-03-04 10:00:00,a,Apple,x,1.25,7,north",  # rejected ...
            "5,2024-03-04 10:00:00,b,Bread,1,1.25,7,north",  # ... and with it its good neighbour
            "6,2024-03-04 10:00:00,a,Apple,-9,0,,north",  # skipped
            "7,2024-03-04 10:00:00,a,Apple",  # too short
        )
        source = staged(
            home, write(tmp_path / "f.csv", rows), item__leave_out=[{"column": "sku", "one_of": ["POST"]}],
            skip=[{"because": "written off", "when": [{"column": "qty", "below": 0}]}],
        )  # fmt: skip
        counts = source.staged()
        assert (counts.rows, counts.taken, counts.left_out, counts.rejected, counts.held_back) == (10, 4, 1, 2, 1)
        assert counts.skipped == {"written off": 1, "no item is left of the event": 1}
        assert counts.rows == counts.taken + counts.left_out + counts.repeated + counts.rejected + counts.held_back + sum(
            counts.skipped.values()
        )
        letters = {letter.reason.split(":")[0]: letter for letter in source.letters()}
        assert set(letters) == {f"{tmp_path}/f.csv, row 8", f"{tmp_path}/f.csv, row 11"}
        assert json.loads(letters[f"{tmp_path}/f.csv, row 8"].raw)["qty"] == "x"

    def test_a_row_cut_short_holds_back_the_rest_of_its_order_and_the_mended_file_brings_it_whole(self, home: Home, tmp_path: Path) -> None:
        path = write(tmp_path / "f.csv", [ROWS[0].rsplit(",", 1)[0], *ROWS[1:]])
        source = staged(home, path)
        assert [e["event_id"] for e in taken(source)] == ["little-purchase-2", "little-purchase-3"]
        assert (source.staged().rejected, source.staged().held_back) == (1, 1)
        bring_in(home, source)
        report = bring_in(home, staged(home, write(path)))
        assert (report.appended, report.repeated, report.conflicting) == (1, 2, 0)

    def test_when_rows_became_known_is_kept(self, home: Home, tmp_path: Path) -> None:
        path = write(tmp_path / "f.csv")
        [batch] = staged(home, path, event__known_at={"after_hours": 24}).events()
        assert batch[0].known_at == datetime(2024, 3, 2, 9, tzinfo=UTC)

    def test_the_consent_basis_reaches_the_log(self, home: Home, tmp_path: Path) -> None:
        bring_in(home, staged(home, write(tmp_path / "f.csv")))
        files = EventLog(home, "Europe/Paris").files()
        assert connect().execute("SELECT DISTINCT consent_basis FROM read_parquet(?)", [files]).fetchall() == [("loyalty terms",)]

    @settings(max_examples=15)
    @given(
        st.lists(
            st.tuples(st.integers(1, 4), st.sampled_from("abc"), st.integers(1, 50), st.decimals("0", "500", places=2)),
            min_size=1,
            max_size=30,
        )
    )
    def test_orders_and_cents_are_what_plain_arithmetic_says(
        self, tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[int, str, int, Decimal]]
    ) -> None:
        folder = tmp_path_factory.mktemp("arithmetic")
        rows = [f"{order},2024-03-01 10:00:00,{sku},x,{qty},{price},7,n" for order, sku, qty, price in lines]
        found = {e["event_id"]: e["items"] for e in taken(staged(Home(folder / "home"), write(folder / "f.csv", rows)))}
        expected = defaultdict(list)
        for order, sku, qty, price in lines:
            cents = int((price * qty * 100).quantize(Decimal(1), ROUND_HALF_UP))
            expected[f"little-purchase-{order}"].append((sku, qty, cents))
        assert {k: [(i["item_id"], i["quantity"], i["amount_minor"]) for i in v] for k, v in found.items()} == expected


class TestEveryMistakeIsToldWithItsMend:
    @pytest.mark.parametrize(
        ("changes", "field", "mend"),
        [
            ({"evnt": {}}, "evnt", "did you mean 'event'"),
            ({"event__occured_at": {"column": "at"}}, "event.occured_at", "did you mean 'occurred_at'"),
            ({"event__occurred_at": None}, "event.occurred_at", "missing required field"),
            ({"shop__timezone": "London"}, "shop.timezone", "Europe/London"),
            ({"shop__churn_horizon_days": 1}, "shop.churn_horizon_days", ">= 7"),
            ({"shop__churnHorizonDays": 60}, "shop.churnHorizonDays", "did you mean 'churn_horizon_days'"),
            ({"shop__currency": "EURO"}, "shop.currency", "ISO 4217"),
            ({"event__name": {"value": "purchased"}}, "event.name", "did you mean 'purchase'"),
            ({"event__channel": {"value": "shop"}}, "event.channel", "is not one of"),
            ({"event__identifiers": {"member": "customer"}}, "event.identifiers.member", "loyalty_card"),
            ({"event__occurred_at__timezone": None}, "event.occurred_at.timezone", "do not carry a zone"),
            ({"event__occurred_at__columns": ["at", "at"]}, "event.occurred_at", "either column, or columns"),
            ({"event__occurred_at__column": None}, "event.occurred_at", "either column, or columns"),
            ({"event__occurred_at__format": "dd/mm/yyyy"}, "event.occurred_at.format", "strptime"),
            ({"event__occurred_at__format": "%Q"}, "event.occurred_at.format", "strptime"),
            ({"item__attributes": {"colour": "name"}}, "item.attributes.colour", "the catalogue knows"),
            ({"refunds": {"when": [{"column": "order", "matches": "("}]}}, "refunds.when[0].matches", "no regular expression"),
            ({"refunds": {"when": [{"column": "order"}]}}, "refunds.when[0]", "at least one of"),
            ({"consent__purposes": []}, "consent.purposes", "must stay out"),
            ({"consent__purposes": ["advertising"]}, "consent.purposes", "is not one of analytics"),
            ({"consent__basis": "TO BE FILLED IN"}, "consent.basis", "say on what basis"),
            ({"event__id": {}}, "event.id", "exactly one of column"),
            ({"files": {"decimal": ",", "thousands": ","}}, "files.thousands", "decimal sign"),
            ({"files": {"encoding": "windows1252x"}}, "files.encoding", "there is no encoding"),
            ({"item__quantity": "qty"}, "item.quantity", "object"),
        ],
    )
    def test_in_the_mapping(self, changes: dict[str, Any], field: str, mend: str) -> None:
        with pytest.raises(MappingError) as error:
            mapped(**changes)
        assert f"mapping.yaml: {field}" in str(error.value)
        assert mend in str(error.value)

    def test_a_column_that_is_not_there_is_named_with_the_nearest_that_is(self, home: Home, tmp_path: Path) -> None:
        with pytest.raises(MappingError, match=r"event\.id: .*f\.csv has no column 'ordre'; did you mean 'order'\?"):
            staged(home, write(tmp_path / "f.csv"), event__id="ordre")

    def test_broken_yaml(self) -> None:
        with pytest.raises(MappingError, match="not valid YAML"):
            Mapping.parse(b"source: [", "mapping.yaml")

    @pytest.mark.parametrize(
        ("row", "field", "mend"),
        [
            ("9,2024-03-01 10:00:00,a,x,two,1.00,7,n", "item.quantity", "is no number"),
            ("9,2024-03-01 10:00:00,a,x,1.5,1.00,7,n", "item.quantity", "fractions: round_up"),
            ("9,2024-03-01 10:00:00,a,x,-1,1.00,7,n", "item.quantity", "under refunds or skip"),
            ('9,2024-03-01 10:00:00,a,x,1,"1,00",7,n', "item.amount", "decimal sign"),
            ("9,2024-03-01 10:00:00,a,x,1,-1.00,7,n", "item.amount", "under refunds or skip"),
            ("9,2024-03-01 10:00:00,a,x,1,,7,n", "item.amount", "is empty"),
            ("9,2024-03-01 10:00:00,,x,1,1.00,7,n", "item.id", "needs an item"),
            (",2024-03-01 10:00:00,a,x,1,1.00,7,n", "event.id", "needs an id"),
            ("9,,a,x,1,1.00,7,n", "event.occurred_at", "is empty"),
            ("9,01/03/2024,a,x,1,1.00,7,n", "event.occurred_at", "does not fit the format"),
            ("9,1924-03-01 10:00:00,a,x,1,1.00,7,n", "event.occurred_at", "before 2000"),
            ("9,2924-03-01 10:00:00,a,x,1,1.00,7,n", "event.occurred_at", "in the future"),
            ("9,2024-03-01 10:00:00,a,x,1,1.00,7", "$", "7 fields where the header has 8"),
        ],
    )
    def test_in_a_row(self, home: Home, tmp_path: Path, row: str, field: str, mend: str) -> None:
        found, told = only_reason(home, tmp_path, (*ROWS, row))
        assert found == field
        assert mend in told
        assert "row 6" in told

    def test_a_date_that_can_be_read_two_ways_is_not_guessed(self, home: Home, tmp_path: Path) -> None:
        field, told = only_reason(
            home, tmp_path, [ROWS[0].replace("2024-03-01 10:00:00", "03/04/2024")], event__occurred_at={"column": "at"}
        )
        assert field == "event.occurred_at"
        assert "day or month first?" in told
        assert "%d/%m/%Y or %m/%d/%Y" in told

    def test_a_time_without_a_zone_is_not_guessed(self, home: Home, tmp_path: Path) -> None:
        _, told = only_reason(home, tmp_path, ROWS[:1], event__occurred_at={"column": "at"})
        assert "set event.occurred_at.timezone" in told

    def test_currencies_do_not_mix(self, home: Home, tmp_path: Path) -> None:
        rows = ("1,2024-03-01 10:00:00,a,x,1,1.00,7,EUR", "2,2024-03-01 10:00:00,a,x,1,1.00,7,USD")
        field, told = only_reason(home, tmp_path, rows, event__currency="branch", event__store_id=None)
        assert field == "event.currency"
        assert "USD" in told
        assert "counts in EUR" in told

    def test_the_rows_of_one_event_must_agree(self, home: Home, tmp_path: Path) -> None:
        field, told = only_reason(home, tmp_path, (*ROWS, "1,2024-03-01 10:00:00,c,x,1,1.00,99,north"))
        assert field == "event.identifiers.user_id"
        assert "1: 7 and 99" in told

    def test_a_decimal_sign_taken_for_a_divider_of_thousands_is_noticed(self, home: Home, tmp_path: Path) -> None:
        rows = ['1,2024-03-01 10:00:00,a,x,1,"9,43",7,n', '2,2024-03-01 10:00:00,a,x,1,"1,234.50",7,n']
        field, told = only_reason(home, tmp_path, rows, files={"thousands": ","})
        assert field == "item.amount"
        assert "9,43" in told

    def test_a_wrong_delimiter_is_named(self, home: Home, tmp_path: Path) -> None:
        path = write(tmp_path / "f.csv", [r.replace(",", ";") for r in ROWS], HEADER.replace(",", ";"))
        with pytest.raises(MappingError, match=r"divided by ';': set files\.delimiter"):
            staged(home, path)

    def test_known_before_it_happened(self, home: Home, tmp_path: Path) -> None:
        header, rows = HEADER + ",known", [ROWS[0] + ",2024-02-01", ROWS[3] + ",2024-04-01"]
        known = {"time": {"column": "known", "timezone": "Europe/Paris"}}
        field, told = only_reason(home, tmp_path, rows, header, event__known_at=known)
        assert field == "event.known_at"
        assert "nothing is known before it happens" in told

    @pytest.mark.parametrize("end", ["", ",too,many", "cut"])
    def test_a_file_of_another_encoding_is_told_and_nothing_is_stored(self, home: Home, tmp_path: Path, end: str) -> None:
        row = ROWS[0].replace("Apple", "Äpfel") + end
        path = write(tmp_path / "f.csv", [row.rsplit(",", 1)[0] if end == "cut" else row], encoding="windows-1252")
        with pytest.raises(UnreadableFileError, match=r"f\.csv is not written in utf-8 .*set files\.encoding, e\.g\. windows-1252"):
            staged(home, path)
        assert not (home.root / "log").exists()

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [("a.xlsx", b"PK", "save a spreadsheet as CSV"), ("a.csv", b"", "is empty"), ("a.parquet", b"PAR1no", "not a whole Parquet file")],
    )
    def test_a_file_that_cannot_be_read(self, home: Home, tmp_path: Path, name: str, content: bytes, said: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableFileError, match=said):
            staged(home, tmp_path / name)

    def test_a_wrong_mapping_stores_nothing(self, home: Home, tmp_path: Path) -> None:
        source = staged(home, write(tmp_path / "f.csv"), event__occurred_at__format="%d/%m/%Y", max_rejected=0.05)
        with pytest.raises(RejectedFilesError, match=r"(?s)4 of 4 rows cannot be taken.*4 x event.occurred_at: does not fit the format"):
            source.check()

    def test_another_shop_in_the_same_home_is_refused(self, home: Home, tmp_path: Path) -> None:
        bring_in(home, staged(home, write(tmp_path / "f.csv")))
        with pytest.raises(ValueError, match=r"shop\.currency: this home holds the shop 'little' with currency 'EUR', not 'GBP'"):
            bring_in(home, staged(home, write(tmp_path / "g.csv", ROWS[:2]), source="tills", shop__currency="GBP"))

    def test_columns_may_be_called_anything_and_excels_byte_order_mark_is_no_part_of_a_name(self, home: Home, tmp_path: Path) -> None:
        odd = 'problem,t_id,na"me,chunk,_row,file,id,value'
        path = tmp_path / "f.csv"
        header = ",".join('"' + name.replace('"', '""') + '"' for name in odd.split(","))
        path.write_bytes(("\ufeff" + "\n".join([header, *ROWS]) + "\n").encode())
        names = dict(zip(HEADER.split(","), odd.split(","), strict=True))
        source = staged(
            home, path, event__id=names["order"], event__occurred_at__column=names["at"], event__identifiers={"user_id": names["customer"]},
            event__store_id=names["branch"], item__id=names["sku"], item__attributes={"type": names["name"]},
            item__quantity={"column": names["qty"]}, item__amount={"column": names["price"], "per": "unit"},
        )  # fmt: skip
        assert taken(source) == taken(staged(Home(tmp_path / "other"), write(tmp_path / "plain.csv")))

    def test_columns_that_differ_only_by_case_are_refused(self, home: Home, tmp_path: Path) -> None:
        with pytest.raises(UnreadableFileError, match="differ only by case"):
            staged(home, write(tmp_path / "f.csv", header=HEADER.replace("name", "SKU")))


class TestTwoFiles:
    def test_overlapping_exports_count_each_event_once(self, home: Home, tmp_path: Path) -> None:
        source = staged(home, write(tmp_path / "day1.csv", ROWS[:3]), write(tmp_path / "month.csv", ROWS))
        assert len(taken(source)) == 3
        assert source.staged().repeated == 3

    def test_an_id_with_other_content_in_another_file_is_rejected_as_a_whole(self, home: Home, tmp_path: Path) -> None:
        changed = [ROWS[0], ROWS[1].replace("3.10", "9.99")]
        source = staged(home, write(tmp_path / "a.csv"), write(tmp_path / "b.csv", changed))
        [rejection] = source.rejections()
        assert (rejection.field, rejection.rows) == ("event.id", 4)
        assert "two files with different content" in rejection.reason
        assert [e["event_id"] for e in taken(source)] == ["little-purchase-2", "little-purchase-3"]

    def test_an_export_cut_into_parts_can_be_joined(self, home: Home, tmp_path: Path) -> None:
        source = staged(home, write(tmp_path / "a.csv", ROWS[:1]), write(tmp_path / "b.csv", ROWS[1:]), event__across_files="join")
        assert [len(e["items"]) for e in taken(source)] == [2, 1, 1]

    def test_a_later_file_that_contradicts_the_log_becomes_a_dead_letter(self, home: Home, tmp_path: Path) -> None:
        bring_in(home, staged(home, write(tmp_path / "a.csv")))
        report = bring_in(home, staged(home, write(tmp_path / "b.csv", [ROWS[3].replace("5.00", "6.00"), *ROWS[:2]])))
        assert (report.appended, report.repeated, report.conflicting) == (0, 1, 1)
        [letter] = EventLog(home, "Europe/Paris").letters.read()
        assert "give a corrected event an id of its own" in letter["reason"]

    def test_a_mended_row_is_taken_on_the_next_import(self, home: Home, tmp_path: Path) -> None:
        path = write(tmp_path / "a.csv", (*ROWS, "9,2024-03-09 10:00:00,a,x,two,1.00,7,n"))
        bring_in(home, staged(home, path))
        write(path, (*ROWS, "9,2024-03-09 10:00:00,a,x,2,1.00,7,n"))
        report = bring_in(home, staged(home, path))
        assert (report.appended, report.repeated) == (1, 3)


class TestAttributesOfItems:
    HEADER = "order,at,customer,sku,qty,price,branch,name,weight,tags"
    OWN: ClassVar[dict[str, Any]] = {
        "type": "name", "weight_g": {"column": "weight", "holds": "number"}, "tags": {"column": "tags", "holds": "list"},
    }  # fmt: skip

    def rows(self, weight: str = "1250.5") -> list[str]:
        return [f"{k},2024-03-0{k} 10:00:00,7,a,1,1.00,north,Apple,{weight},fruit|fresh" for k in (1, 2)] + [
            "3,2024-03-03 10:00:00,8,b,1,1.00,north,Bread,,"
        ]

    def test_any_number_typed_come_into_the_catalogue(self, home: Home, tmp_path: Path) -> None:
        bring_in(home, staged(home, write(tmp_path / "f.csv", self.rows(), self.HEADER), item__attributes=self.OWN))
        rows = {row["item_id"]: row for row in Catalogue(home).read("items").to_pylist()}
        assert (rows["a"]["weight_g"], rows["a"]["tags"], rows["a"]["type"]) == (1250.5, ["fruit", "fresh"], "Apple")
        assert (rows["b"]["weight_g"], rows["b"]["tags"]) == (None, None)
        assert rows["a"]["department"] is None

    def test_a_later_import_may_know_others(self, home: Home, tmp_path: Path) -> None:
        bring_in(home, staged(home, write(tmp_path / "f.csv")))
        later = ["9,2024-03-09 10:00:00,7,z,1,1.00,north,Zest,3,x"]
        bring_in(home, staged(home, write(tmp_path / "g.csv", later, self.HEADER), source="tills", item__attributes=self.OWN))
        rows = {row["item_id"]: row for row in Catalogue(home).read("items").to_pylist()}
        assert rows["z"]["weight_g"] == 3.0
        assert rows["a"]["weight_g"] is None

    def test_what_answers_show_is_mapped_and_a_bad_link_is_told_with_its_row(self, home: Home, tmp_path: Path) -> None:
        shown = {"name": "name", "price_minor": "weight", "image_url": "tags"}
        rows = ["1,2024-03-01 10:00:00,7,a,1,1.00,north,Apple,399,https://shop.example/a.jpg"]
        bring_in(home, staged(home, write(tmp_path / "f.csv", rows, self.HEADER), item__attributes=shown))
        [row] = Catalogue(home).read("items").to_pylist()
        assert (row["name"], row["price_minor"], row["image_url"]) == ("Apple", 399.0, "https://shop.example/a.jpg")
        for bad, field in (("399,javascript:1", "image_url"), ("-1,https://shop.example/a.jpg", "price_minor")):
            told, _ = only_reason(
                home, tmp_path, [f"1,2024-03-01 10:00:00,7,a,1,1.00,north,Apple,{bad}"], self.HEADER, item__attributes=shown
            )
            assert told == f"item.attributes.{field}"

    def test_what_is_no_number_is_told_with_its_row(self, home: Home, tmp_path: Path) -> None:
        field, reason = only_reason(home, tmp_path, self.rows("heavy"), self.HEADER, item__attributes=self.OWN)
        assert field == "item.attributes.weight_g"
        assert "is no number with the decimal sign '.'" in reason
        assert "row 2: heavy" in reason

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("brnd", "name", "did you mean 'brand'"),
            ("colour", "name", "one of your own says what it holds"),
            ("brand", {"column": "name", "holds": "list"}, "brand is a text in every catalogue"),
            ("Colour", {"column": "name", "holds": "text"}, "small letters"),
            ("popularity", {"column": "name", "holds": "text"}, "the catalogue itself uses that name"),
            ("colour", {"column": "name", "holds": "colour"}, "holds"),
        ],
    )
    def test_a_mistake_in_a_mapping_is_told(self, name: str, value: Any, said: str) -> None:
        with pytest.raises(MappingError, match=said):
            mapped(item__attributes={name: value})

    def test_a_domain_that_does_not_exist_is_told_with_those_that_do(self) -> None:
        with pytest.raises(MappingError, match=r"shop\.domain: there is no domain 'groceries': use one of grocery, retail"):
            mapped(shop__domain="groceries")

    def test_an_event_of_another_domain_is_refused_with_those_that_there_are(self) -> None:
        assert mapped(shop__domain="retail", event__name={"value": "add_to_wishlist"}).event_names()[-2] == "add_to_wishlist"
        with pytest.raises(MappingError, match=r"event\.name.*add_to_wishlist"):
            mapped(shop__domain="grocery", event__name={"value": "add_to_wishlist"})


class TestASecondImport:
    """What a shop is described by may be spread over several mappings, and over commands."""

    NAMED: ClassVar[dict[str, Any]] = {
        "margin_rate": 0.4, "phone_region": "FR", "churn_horizon_days": 84, "private_brands": ("Ours", "Own"), "broad_campaign_types": ("leaflet",),
    }  # fmt: skip
    ANEW: ClassVar[dict[str, Any]] = {
        "margin_rate": 0.3, "phone_region": None, "churn_horizon_days": None, "private_brands": (), "broad_campaign_types": ("mailing", "poster"),
    }  # fmt: skip
    IDENTITY = ("name", "timezone", "currency", "domain")
    POLICY = ConsentPolicy(purposes={"analytics": "opt-in", "personalization": "opt-in"}, permissions={"email": "opt-out"})

    @pytest.fixture
    def described(self, home: Home, tmp_path: Path) -> Shop:
        """A home whose shop is told in full, and no field of it is what it is by default."""
        changes = {f"shop__{field}": list(value) if isinstance(value, tuple) else value for field, value in self.NAMED.items()}
        bring_in(home, staged(home, write(tmp_path / "first.csv"), **changes))
        msgspec.structs.replace(Shop.load(home), consent=self.POLICY).save(home)
        shop = Shop.load(home)
        plain = Shop(name=shop.name, timezone=shop.timezone, currency=shop.currency, data_end=datetime(2000, 1, 1, tzinfo=UTC))
        for field in set(Shop.__struct_fields__) - set(self.IDENTITY):
            assert getattr(shop, field) != getattr(plain, field), f"{field}: give it another value here"
        return shop

    def test_keeps_what_its_mapping_does_not_name(self, home: Home, tmp_path: Path, described: Shop) -> None:
        bring_in(home, staged(home, write(tmp_path / "second.csv", ROWS[:2]), source="tills"))
        assert Shop.load(home) == described, "its data ends earlier, and it says nothing more"

    @pytest.mark.parametrize("field", list(NAMED))
    def test_changes_what_its_mapping_names_and_nothing_else(self, home: Home, tmp_path: Path, described: Shop, field: str) -> None:
        rows = [ROWS[3].replace("2024-03-03", "2024-05-09")]
        anew = self.ANEW[field]
        mapping = said(source="tills")
        mapping["shop"][field] = list(anew) if isinstance(anew, tuple) else anew
        source = MappedFiles(home, [str(write(tmp_path / "second.csv", rows))], Mapping.parse(yaml.safe_dump(mapping).encode(), "m.yaml"))
        source.stage()
        bring_in(home, source)
        later = datetime(2024, 5, 9, 22, tzinfo=UTC)
        assert Shop.load(home) == msgspec.structs.replace(described, **{field: anew}, data_end=later)

    def test_what_is_set_while_it_runs_stays(self, home: Home, tmp_path: Path, described: Shop) -> None:
        source = staged(home, write(tmp_path / "second.csv", ROWS[:2]), source="tills")
        strict = ConsentPolicy(purposes={"analytics": "opt-in"}, permissions={})
        bring_in(home, source, advance=lambda done: msgspec.structs.replace(described, consent=strict).save(home))
        assert Shop.load(home).consent == strict

    def test_of_the_demos_data_keeps_the_policy_and_refuses_another_shop(self) -> None:
        source = CompleteJourney(households=1)
        first = source.shop(None)
        set_since = msgspec.structs.replace(first, consent=self.POLICY, margin_rate=0.4, phone_region="US", private_brands=())
        assert source.shop(set_since) == msgspec.structs.replace(set_since, private_brands=("Private",)), "what it names, and no more"
        with pytest.raises(ValueError, match=r"shop\.currency: this home holds the shop"):
            source.shop(msgspec.structs.replace(first, currency="EUR"))


class SourceContract:
    """What every source must hold to."""

    def make(self, home: Home, tmp_path: Path) -> EventSource:
        raise NotImplementedError

    @staticmethod
    def digest(home: Home) -> Any:
        files = EventLog(home, "UTC").files()
        return connect().execute("SELECT count(*), bit_xor(hash(event_id || content_hash)) FROM read_parquet(?)", [files]).fetchall()

    def test_it_gives_as_many_events_as_it_says_in_order_of_time_and_from_anywhere(self, home: Home, tmp_path: Path) -> None:
        source = self.make(home, tmp_path)
        events = [json.loads(a.raw) for batch in source.events() for a in batch]
        assert len(events) == source.count()
        times = [e["occurred_at"] for e in events]
        assert times == sorted(times)
        middle = len(events) // 2
        assert [json.loads(a.raw) for batch in source.events(middle) for a in batch] == events[middle:]

    def test_the_same_again_stores_nothing_new(self, home: Home, tmp_path: Path) -> None:
        bring_in(home, self.make(home, tmp_path))
        before = self.digest(home)
        assert bring_in(home, self.make(home, tmp_path)).reused
        again = bring_in(home, self.make(home, tmp_path), again=True)
        assert again.appended == 0
        assert again.repeated == before[0][0]
        assert self.digest(home) == before

    def test_a_crash_between_two_batches_loses_and_doubles_nothing(self, home: Home, tmp_path: Path) -> None:
        whole = Home(tmp_path / "whole")
        bring_in(whole, self.make(whole, tmp_path))

        def crash(done: int) -> None:
            if done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            bring_in(home, self.make(home, tmp_path), crash)
        assert bring_in(home, self.make(home, tmp_path)).complete
        assert self.digest(home) == self.digest(whole)


class TestMappedFilesAsASource(SourceContract):
    @pytest.fixture(autouse=True)
    def _small_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("features.sources.mapped.BATCH", 7)

    def make(self, home: Home, tmp_path: Path) -> EventSource:
        rows = [f"{k // 3},2024-03-{1 + k % 28:02} 10:00:00,s{k},x,1,1.00,{k // 6},n" for k in range(99)]
        return staged(home, write(tmp_path / "f.csv", rows))


class TestCompleteJourneyAsASource(SourceContract):
    def make(self, home: Home, tmp_path: Path) -> EventSource:
        return CompleteJourney(households=25)


def test_an_import_killed_at_any_moment_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    orders = range(30_000)
    rows = [f"{k},2024-03-{1 + k % 28:02} 10:00:00,s{k % 50 + line},x,1,1.00,{k // 7},n" for k in orders for line in (0, 1)]
    path = write(tmp_path / "f.csv", rows)
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(yaml.safe_dump(said()))
    home = Home(tmp_path / "home")
    arguments = [sys.executable, "-W", "ignore", "-m", "features", "import", str(path), "--mapping", str(mapping)]
    environment = {**os.environ, "UBIQUO_HOME": str(home.root)}
    seen = set()
    for delay in (0.6, 1.2, 1.8, 2.4):
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.add((home.events.exists(), (home.root / "imports" / "little.stage.duckdb").exists()))
    done = command(*arguments[4:], home=home.root)
    assert done.returncode == 0, done.stdout + done.stderr
    log = EventLog(home, "Europe/Paris")
    query = "SELECT count(*), count(DISTINCT event_id), sum(len(items)) FROM read_parquet(?)"
    assert connect().execute(query, [log.files()]).fetchall() == [(30_000, 30_000, 60_000)]
    assert not list((home.root / "imports").glob("*.duckdb*")), "the stage is thrown away"
    assert seen


class TestGuess:
    def test_a_guess_over_the_file_imports_it_once_the_owner_has_filled_it_in(self, home: Home, tmp_path: Path) -> None:
        path = write(tmp_path / "sales-2024.csv")
        proposal = propose(path)
        assert proposal.roles["event.id"] == "order"
        with pytest.raises(MappingError, match=r"consent\.basis"):
            Mapping.parse(proposal.text.encode(), "proposal")
        mapping = Mapping.parse(proposal.text.replace("TO BE FILLED IN", "terms").encode(), "proposal")
        source = MappedFiles(home, [str(path)], mapping)
        source.stage()
        assert [len(e["items"]) for e in taken(source)] == [2, 1, 1]
        assert taken(source)[0]["items"][0]["amount_minor"] == 250

    def test_it_asks_where_day_and_month_cannot_be_told_apart(self, tmp_path: Path) -> None:
        path = write(tmp_path / "f.csv", ["1,03/04/2024,a,x,1,1.00,7,n", "2,05/06/2024,a,x,1,1.00,7,n"])
        assert any("day or month first?" in doubt for doubt in propose(path).doubts)

    def test_it_sees_encoding_delimiter_decimal_comma_and_cancellations(self, tmp_path: Path) -> None:
        rows = ["1;13.04.2024;a;Äpfel;1;1.234,50;7;n", "2;14.04.2024;b;Öl;1;2,00;7;n", "S3;15.04.2024;b;Öl;-1;2,00;7;n"]
        path = write(tmp_path / "f.csv", rows, HEADER.replace(",", ";"), "windows-1252")
        guessed = yaml.safe_load(propose(path).text)
        assert guessed["files"] == {"encoding": "windows-1252", "delimiter": ";", "decimal": ",", "thousands": "."}
        assert guessed["event"]["occurred_at"]["format"] == "%d.%m.%Y"
        assert guessed["refunds"]["when"] == [{"column": "order", "matches": "^S"}]

    def test_it_reads_german_headers_and_passes_over_a_few_placeholders(self, tmp_path: Path) -> None:
        header = "Bestellnr;Bestelldatum;Artikelnr;Bezeichnung;Menge;Einzelpreis;Kundennr;Filiale"
        rows = [f"{k};13.04.2024 10:00;A{k};Ding;{'k.A.' if k == 7 else 1};2,50;{k % 9};Nord" for k in range(60)]
        found = propose(write(tmp_path / "f.csv", rows, header)).roles
        assert (
            found | {"event.id": "Bestellnr", "event.occurred_at": "Bestelldatum", "item.id": "Artikelnr", "item.quantity": "Menge"}
            == found
        )
        assert found | {"item.amount": "Einzelpreis", "event.identifiers.user_id": "Kundennr", "event.store_id": "Filiale"} == found

    def test_the_command_writes_a_file_and_replaces_none(self, tmp_path: Path) -> None:
        path, out = write(tmp_path / "f.csv"), tmp_path / "mapping.yaml"
        assert command("features", "guess", str(path), "--out", str(out), home=tmp_path).returncode == 0
        again = command("features", "guess", str(path), "--out", str(out), home=tmp_path)
        assert again.returncode == 1
        assert "does not replace" in again.stdout


class TestTheCommand:
    def test_a_dry_run_shows_the_first_events_and_the_rejects_and_stores_nothing(self, tmp_path: Path) -> None:
        path = write(tmp_path / "f.csv", (*ROWS, "9,2024-03-01 10:00:00,a,x,two,1.00,7,n"))
        (tmp_path / "mapping.yaml").write_text(yaml.safe_dump(said()))
        done = command("features", "import", str(path), "--mapping", str(tmp_path / "mapping.yaml"), "--dry-run", home=tmp_path / "home")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "little-purchase-1" in done.stdout
        assert re.search(r"1 .*item\.quantity.*is no number", done.stdout)
        assert not list((tmp_path / "home").rglob("*.parquet"))
        assert not list((tmp_path / "home").rglob("*.duckdb"))

    def test_a_dry_run_tells_which_events_the_log_would_reject(self, tmp_path: Path) -> None:
        path = write(tmp_path / "f.csv", [ROWS[1].replace(",7,", ",ada@example.org,"), ROWS[3].replace(",8,", ",no mail at all,")])
        (tmp_path / "mapping.yaml").write_text(yaml.safe_dump(said(event__identifiers={"email": "customer"})))
        done = command("features", "import", str(path), "--mapping", str(tmp_path / "mapping.yaml"), "--dry-run", home=tmp_path / "home")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "of the first 2 events 1 would be rejected" in done.stdout
        assert "identifiers.email" in done.stdout

    def test_without_a_mapping_it_names_the_command_that_proposes_one(self, tmp_path: Path) -> None:
        done = command("features", "import", str(write(tmp_path / "f.csv")), home=tmp_path / "home")
        assert done.returncode == 1
        assert "features guess" in done.stdout


@pytest.fixture(scope="module")
def wholesaler(tmp_path_factory: pytest.TempPathFactory) -> Home:
    if not SHARED.exists():
        pytest.skip("the Online Retail data does not lie beside this checkout")
    home = Home(tmp_path_factory.mktemp("wholesaler"))
    done = command("features", "import", str(SHARED), "--mapping", "online-retail", home=home.root)
    assert done.returncode == 0, done.stdout + done.stderr
    return home


class TestOnlineRetail:
    """A shop that the software was not written for, by the mapping that ships."""

    def test_lines_and_pennies_are_those_of_the_file(self, wholesaler: Home) -> None:
        sums: dict[str, list[int]] = {"purchase": [0, 0], "refund": [0, 0]}
        extra = re.compile(r"(?i)^(POST|DOT|C2|M|D|S|B|CRUK|BANK CHARGES|AMAZONFEE|gift_.*)$")
        with gzip.open(SHARED, "rt", encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                cancelled = row["InvoiceNo"].startswith("C")
                if (
                    extra.match(row["StockCode"].strip())
                    or row["InvoiceNo"].startswith("A")
                    or (Decimal(row["Quantity"]) < 0 and not cancelled)
                ):
                    continue
                total = sums["refund" if cancelled else "purchase"]
                total[0] += 1
                total[1] += int((abs(Decimal(row["Quantity"])) * Decimal(row["UnitPrice"]) * 100).quantize(Decimal(1), ROUND_HALF_UP))
        stored = connect().execute(
            """SELECT name, sum(len(items)), sum(list_sum(list_transform(items, lambda i: i.amount_minor)))
               FROM read_parquet(?) GROUP BY name ORDER BY name""",
            [EventLog(wholesaler, "Europe/London").files()],
        )
        assert stored.fetchall() == [(name, *sums[name]) for name in ("purchase", "refund")]

    def test_no_postage_among_the_items_and_nobody_where_no_customer_is_named(self, wholesaler: Home) -> None:
        ids = set(Catalogue(wholesaler).read("items")["item_id"].to_pylist())
        assert not ids & {"POST", "M", "DOT", "D"}
        assert "85123A" in ids
        query = "SELECT count(*) FILTER (identity_key IS NULL), count(*) FROM read_parquet(?)"
        [(anonymous, everyone)] = connect().execute(query, [EventLog(wholesaler, "Europe/London").files()]).fetchall()
        assert 0.05 < anonymous / everyone < 0.15
