"""Any shop's files come in: what `guess` makes of headers in several languages, of common shop software, and of a whole invented shop."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from fashion_shop import FashionShop, euros
from scene import ROOT, command

from features.catalogue.shop import Shop
from features.catalogue.tables import Catalogue
from features.catalogue.yaml_file import load_yaml
from features.events.spelling import words_of
from features.sources.guessing import Proposal, propose
from features.sources.headers import plain_header
from features.sources.importing import bring_in
from features.sources.mapped import MappedFiles
from features.sources.mapping import Mapping
from features.state.home import Home
from features.store.event_log import EventLog, connect

ITEMS, LINES = 20, 2


def cents(item: int) -> int:
    return 104_000 + 3_750 * item


def file(tmp_path: Path, header: str, rows: list[str], name: str = "f.csv", encoding: str = "utf-8") -> Path:
    path = tmp_path / name
    path.write_bytes(("\n".join([header, *rows]) + "\n").encode(encoding))
    return path


def italian(tmp_path: Path) -> Path:
    """Tills that count receipts anew each day and in each shop; times with a point; sizes that the article's code does not tell."""
    rng, rows = random.Random(1), []
    for day in range(1, 25):
        for store in ("Milano", "Roma"):
            for number in range(1, 6):
                for line in range(LINES):
                    item, quantity = rng.randrange(ITEMS), rng.randint(1, 2)
                    money = f"{euros(cents(item))};{euros(cents(item) * quantity)}"
                    rows.append(
                        f"{day:02}/03/2024;1{number}.3{line};{store};{number};T{number * 7 + day};A{item};Maglia {item};"
                        f"{'rosso' if item % 2 else 'blu'};{rng.choice('SML')};{quantity};{money}"
                    )
    header = "Data;Ora;Negozio;N. scontrino;Tessera;Codice articolo;Descrizione prodotto;Colore;Taglia;Quantità;Prezzo;Importo"
    return file(tmp_path, header, rows, encoding="windows-1252")


def german(tmp_path: Path) -> Path:
    rows = []
    for number in range(200):
        for item in (number % ITEMS, (number * 7 + 3) % ITEMS):
            money = f"{euros(cents(item))};{euros(2 * cents(item))}"
            rows.append(
                f"B{number};{1 + number % 28:02}.03.2024;10:{number % 60:02};Bonn;K{number % 30};{number % 30};A{item};Hose {item};"
                f"{'rot' if item % 2 else 'blau'};{36 + item % 4 * 2};2;{money}"
            )
    header = "Belegnummer;Datum;Uhrzeit;Filiale;Kundenkarte;Kundennummer;Artikelnummer;Artikelbezeichnung;Farbe;Größe;Menge;Preis;Betrag"
    return file(tmp_path, header, rows, encoding="windows-1252")


def shopify(tmp_path: Path) -> Path:
    """What is the whole order's stands on its first line alone."""
    header = (
        "Name,Email,Financial Status,Paid at,Accepts Marketing,Currency,Subtotal,Shipping,Taxes,Total,Discount Code,Created at,Lineitem quantity,"
        "Lineitem name,Lineitem price,Lineitem compare at price,Lineitem sku,Lineitem fulfillment status,Billing Name,Billing City,Billing Country,"
        "Billing Phone,Cancelled at,Vendor,Id"
    )
    rows = []
    for number in range(1001, 1100):
        at = f"2024-03-{1 + number % 28:02} 10:00:00 +0100"
        for line in range(LINES):
            item = (number * 3 + line * 7) % ITEMS
            order, billing = (f"paid,{at},yes,EUR,50.00,5.00,9.00,{55 + number % 7}.00,", f"Ada L,Milano,IT,'+39 02 1234{number},,")
            order, billing = (order, billing) if line == 0 else (",,,,,,,,", ",,,,,")
            rows.append(
                f"#{number},c{number % 40}@example.org,{order},{at},{line + 1},Shirt {item} - Red / M,{20 + item}.00,,SKU{item},fulfilled,"
                f"{billing.rstrip(',')}{',' * (billing.count(',') - billing.rstrip(',').count(',') - 1)},Acme,{number + 5 * 10**9}"
            )
    return file(tmp_path, header, rows)


def woocommerce(tmp_path: Path) -> Path:
    header = (
        "Order Number,Order Status,Order Date,First Name (Billing),Last Name (Billing),Email (Billing),Phone (Billing),Order Total Amount,SKU,Item #,"
        "Item Name,Quantity (- Refund),Item Cost"
    )
    rows = [
        f"{n},{'cancelled' if n == 7 else 'completed'},2024-03-{1 + n % 28:02} 10:{n % 60:02},A,B,c{n % 40}@example.org,+39 02 123456{n % 10},"
        f"{50 + n % 9},W{(n + 7 * k) % ITEMS},{k + 1},Thing {(n + 7 * k) % ITEMS},{k + 1},{20 + (n + 7 * k) % ITEMS}.50"
        for n in range(1, 100) for k in range(LINES)
    ]  # fmt: skip
    return file(tmp_path, header, rows)


def magento(tmp_path: Path) -> Path:
    header = "increment_id,created_at,status,store_id,customer_id,customer_email,order_currency_code,grand_total,sku,name,qty_ordered,qty_invoiced,price,row_total"
    rows = [
        f"{100000000 + n},2024-03-{1 + n % 28:02} 10:{n % 60:02}:00,complete,1,{n % 40},c{n % 40}@example.org,EUR,{50 + n % 9}.0000,"
        f"M{(n + 7 * k) % ITEMS},Thing {(n + 7 * k) % ITEMS},{k + 1}.0000,{k + 1}.0000,{20.5 + (n + 7 * k) % ITEMS:.4f},"
        f"{(20.5 + (n + 7 * k) % ITEMS) * (k + 1):.4f}"
        for n in range(1, 100) for k in range(LINES)
    ]  # fmt: skip
    return file(tmp_path, header, rows)


ROLES = {
    italian: {
        "event.id": "N. scontrino", "event.occurred_at": "Data", "event.identifiers.loyalty_card": "Tessera", "event.store_id": "Negozio",
        "item.id": "Codice articolo", "item.quantity": "Quantità", "item.amount": "Importo", "item.attributes.name": "Descrizione prodotto",
        "item.attributes.colour": "Colore", "item.attributes.price": "Prezzo",
    },
    german: {
        "event.id": "Belegnummer", "event.occurred_at": "Datum", "event.identifiers.loyalty_card": "Kundenkarte",
        "event.identifiers.user_id": "Kundennummer", "event.store_id": "Filiale", "item.id": "Artikelnummer", "item.quantity": "Menge",
        "item.amount": "Betrag", "item.attributes.name": "Artikelbezeichnung", "item.attributes.colour": "Farbe",
        "item.attributes.size": "Größe", "item.attributes.price": "Preis",
    },
    shopify: {
        "event.id": "Name", "event.occurred_at": "Created at", "event.identifiers.email": "Email", "event.identifiers.phone": "Billing Phone",
        "event.traits.country": "Billing Country", "item.id": "Lineitem sku",
        "item.quantity": "Lineitem quantity", "item.amount": "Lineitem price", "item.attributes.name": "Lineitem name",
        "item.attributes.manufacturer": "Vendor",
    },
    woocommerce: {
        "event.id": "Order Number", "event.occurred_at": "Order Date", "event.identifiers.email": "Email (Billing)",
        "event.identifiers.phone": "Phone (Billing)", "item.id": "SKU", "item.quantity": "Quantity (- Refund)", "item.amount": "Item Cost",
        "item.attributes.name": "Item Name",
    },
    magento: {
        "event.id": "increment_id", "event.occurred_at": "created_at", "event.identifiers.user_id": "customer_id",
        "event.identifiers.email": "customer_email", "event.currency": "order_currency_code", "event.store_id": "store_id", "item.id": "sku",
        "item.quantity": "qty_ordered", "item.amount": "row_total", "item.attributes.name": "name", "item.attributes.price": "price",
    },
}  # fmt: skip


def imported(home: Home, path: Path, proposal: Proposal) -> list[dict[str, Any]]:
    """The events of a file by a proposal in which its owner has filled in nothing but the basis of consent; no row may be lost."""
    mapping = Mapping.parse(proposal.text.replace("TO BE FILLED IN", "terms of 2024").encode(), "proposal")
    source = MappedFiles(home, [str(path)], mapping)
    source.stage()
    told = source.staged()
    assert (told.rejected, told.held_back) == (0, 0), source.rejections()
    events = [json.loads(arrival.raw) for batch in source.events() for arrival in batch]
    report = bring_in(home, source)
    assert (report.appended, report.rejected, report.conflicting) == (len(events), 0, 0)
    return events


@pytest.mark.parametrize("family", list(ROLES))
def test_each_family_of_headers_is_read_and_imports_without_a_word_changed(tmp_path: Path, family: Any) -> None:
    path = family(tmp_path)
    proposal = propose(path)
    assert {role: name for role, name in proposal.roles.items() if "(" not in role} == ROLES[family]
    events = imported(Home(tmp_path / "home"), path, proposal)
    lines = [line for each in events for line in each["items"]]
    assert all(each["identifiers"] for each in events)
    assert all(line["amount_minor"] > 0 for line in lines)


def test_italian_tills_count_anew_each_day_and_write_day_and_hour_apart(tmp_path: Path) -> None:
    path = italian(tmp_path)
    proposal = propose(path)
    said = yaml.safe_load(proposal.text)
    assert said["event"]["id"] == {"columns": ["Negozio", "Data", "N. scontrino"]}
    assert said["event"]["occurred_at"] == {"columns": ["Data", "Ora"], "format": "%d/%m/%Y %H.%M", "timezone": "Europe/Rome"}
    assert said["files"] == {"encoding": "windows-1252", "delimiter": ";", "decimal": ",", "thousands": "."}
    assert any("Taglia differs between lines of one item" in doubt for doubt in proposal.doubts)
    events = imported(Home(tmp_path / "home"), path, proposal)
    assert len(events) == 24 * 2 * 5
    assert {line["amount_minor"] for each in events for line in each["items"]} <= {cents(k) * n for k in range(ITEMS) for n in (1, 2)}


def test_orders_that_came_to_nothing_are_skipped_where_each_row_says_so(tmp_path: Path) -> None:
    path = woocommerce(tmp_path)
    events = imported(Home(tmp_path / "home"), path, propose(path))
    assert len(events) == 98
    assert "f-purchase-7" not in {each["event_id"] for each in events}


def test_an_order_that_stands_on_several_lines_with_its_total_on_one_is_paid_by_its_lines(tmp_path: Path) -> None:
    path = shopify(tmp_path)
    events = imported(Home(tmp_path / "home"), path, propose(path))
    assert {sum(line["amount_minor"] for line in each["items"]) for each in events} <= {2000 + 4000 + 100 * k for k in range(3 * ITEMS)}
    assert {each["identifiers"]["phone"][:8] for each in events} == {"'+39 02 "}


@pytest.mark.parametrize(
    ("rows", "role"),
    [(["kein@mail", "nix", "a@b"], "email"), (["123", "keine Angabe 00", "1234567890123456789"], "phone")],
)
def test_a_column_of_broken_addresses_is_left_out_and_said(tmp_path: Path, rows: list[str], role: str) -> None:
    lines = [f"{k},2024-03-01,a{k % 3},1,2.00,{rows[k % 3]}" for k in range(30)]
    proposal = propose(file(tmp_path, f"order,date,sku,qty,price,{role}", lines))
    assert f"event.identifiers.{role}" not in proposal.roles


@pytest.mark.parametrize(
    ("cell", "files"),
    [
        ("1.234,56", {"delimiter": ";", "decimal": ",", "thousands": "."}),
        ("€ 1.234,56", {"delimiter": ";", "decimal": ",", "thousands": "."}),
        ("1'234.50", {"delimiter": ";", "thousands": "'"}),
        ("1 234,50", {"delimiter": ";", "decimal": ",", "thousands": " "}),
        ("1.234", {"delimiter": ";", "decimal": ",", "thousands": "."}),
        ("12.50", {"delimiter": ";"}),
    ],
)
def test_how_numbers_are_written_is_seen(tmp_path: Path, cell: str, files: dict[str, str]) -> None:
    rows = [f"{k};01.03.2024;a{k % 3};1;{cell}" for k in range(9)]
    proposal = propose(file(tmp_path, "order;date;sku;qty;price", rows))
    assert yaml.safe_load(proposal.text)["files"] == files
    assert any("more than a thousand" in doubt for doubt in proposal.doubts) is (cell == "1.234")


def test_a_header_is_compared_without_its_accents_and_signs() -> None:
    assert [plain_header(h) for h in ("N° Scontrino", "CustomerID", "Größe (EU)", "Lineitem sku", "Q.tà")] == [
        "n scontrino", "customer id", "grosse eu", "lineitem sku", "q ta",
    ]  # fmt: skip


def test_web_events_are_translated_and_what_is_none_of_ours_is_skipped(tmp_path: Path) -> None:
    kinds = ["Product Viewed", "aggiungi al carrello", "page_view", "Heartbeat"]
    lines = [
        json.dumps({"event": kinds[k % 4], "ts": 1709280000 + k, "visitor": {"cookie": f"c{k % 7}"}, "sku": f"a{k % 5}"}) for k in range(40)
    ]
    path = file(tmp_path, lines[0], lines[1:], "web.jsonl")
    events = imported(Home(tmp_path / "home"), path, propose(path))
    assert {each["name"] for each in events} == {"view_item", "add_to_cart", "page_view"}
    assert (len(events), events[0]["occurred_at"], events[0]["channel"]) == (30, "2024-03-01T08:00:00.000000Z", "web")


class TestAFashionShop:
    """Receipts, products and web events of one shop, brought in by the commands that `guess` names."""

    @pytest.fixture(scope="class")
    def files(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[FashionShop, tuple[Path, Path, Path]]:
        shop = FashionShop(customers=30, days=120, products=40)
        return shop, shop.write(tmp_path_factory.mktemp("fashion"))

    def test_the_same_seed_gives_the_same_files(self, files: Any, tmp_path: Path) -> None:
        again = FashionShop(customers=30, days=120, products=40).write(tmp_path)
        assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files[1]]

    def test_all_that_it_recorded_comes_in(self, files: Any, tmp_path: Path) -> None:
        shop, (orders, products, web) = files
        home = Home(tmp_path / "home")
        bought = imported(home, orders, propose(orders))
        looked = imported(home, web, propose(web, Shop.load(home)))
        lines = [line.split(";") for line in shop.orders]
        assert len(bought) == len({(fields[0], fields[2], fields[4]) for fields in lines})
        money = {name: sum(i["amount_minor"] for e in bought if e["name"] == name for i in e["items"]) for name in ("purchase", "refund")}
        told = [int(fields[-1].replace(".", "").replace(",", "")) for fields in lines]
        assert money == {"purchase": sum(t for t in told if t > 0), "refund": -sum(t for t in told if t < 0)}
        assert {each["channel"] for each in bought} == {"store", "web"}
        assert len(looked) == len(shop.events)
        # whoever signed in on the web is the one who holds the card
        files_of_the_log = EventLog(home, "Europe/Rome").files()
        [(known,)] = connect().execute("SELECT count(*) FROM read_parquet(?) WHERE identity_key IS NOT NULL", [files_of_the_log]).fetchall()
        assert known >= len(looked)
        told_of = propose(products).catalogue
        assert told_of is not None
        done = command(*shlex.split(told_of.replace("\\\n", ""))[2:], home=home.root)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = {row["item_id"]: row for row in Catalogue(home).read("items").to_pylist()}
        assert len(rows) == len(shop.products)
        for each in shop.products:
            row = rows[each.code]
            assert (row["name"], row["colour"], row["style"], row["size"], row["price_minor"]) == (
                each.name, each.colour, each.style, each.size, each.cents,
            )  # fmt: skip


class TestTheReference:
    """docs/import.md tells every key."""

    TEXT = (ROOT / "docs" / "import.md").read_text()

    def test_each_key_of_the_schema_stands_in_it(self) -> None:
        keys = words_of(Mapping)[0]
        assert len(keys) > 40
        assert [key for key in keys if not re.search(rf"`{key}(:[^`]*)?`", self.TEXT)] == []

    def test_the_mapping_that_it_shows_is_one_and_its_examples_are_yaml(self) -> None:
        [block] = re.findall(r"```yaml\n(.*?)```", self.TEXT, re.S)
        mapping = Mapping.parse(block.encode(), "docs/import.md")
        assert {"Negozio", "Data", "Ora", "N. scontrino", "Tessera", "Codice articolo"} <= set(mapping.columns())
        examples = re.findall(r"^\|.*\| `([a-z_]+: [^`]*)` \|$", self.TEXT, re.M)
        assert len(examples) > 30
        for example in examples:
            assert isinstance(load_yaml(example.encode()), dict), example
