"""Catalogue tables from files: every mistake by line, field and reason, and the last good table in force until there is none."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scene import TinyShop, command

from features.catalogue.nearest import Stores
from features.catalogue.tables import STORES, Catalogue
from features.sources.catalogue_file import CatalogueError, load
from features.sources.mapping_parts import Files
from features.state.home import Home

OFFERS = "offer_id,campaign_id,campaign_type,channel,valid_from,valid_until,item_ids"
GOOD_OFFER = "o1,c1,A,email,2018-01-02,2018-01-31,i1|i2"


def file(tmp_path: Path, *lines: str, name: str = "f.csv") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_good_table_replaces_the_one_in_force(tiny: TinyShop, tmp_path: Path) -> None:
    load(tiny.home, "items", file(tmp_path, "item_id,brand,recommendable", "x1,Acme,yes", "x2,,no")).save()
    rows = Catalogue(tiny.home).read("items").to_pylist()
    assert [(r["item_id"], r["brand"], r["recommendable"]) for r in rows] == [("x1", "Acme", True), ("x2", None, False)]


def test_an_offer_ends_with_the_whole_of_its_last_day_in_the_shops_zone(tiny: TinyShop, tmp_path: Path) -> None:
    load(tiny.home, "offers", file(tmp_path, OFFERS, GOOD_OFFER)).save()
    [offer] = Catalogue(tiny.home).read("offers").to_pylist()
    assert offer["valid_from"] == datetime(2018, 1, 2, 5, tzinfo=UTC)
    assert offer["valid_until"] == datetime(2018, 2, 1, 5, tzinfo=UTC)
    assert offer["item_ids"] == ["i1", "i2"]


def test_a_shops_own_attributes_are_typed(tiny: TinyShop, tmp_path: Path) -> None:
    path = file(tmp_path, "item_id,weight_g,tags,colour,ignored", "x1,250.5,vegan|new,red,z", "x2,,,,")
    load(tiny.home, "items", path, own=["weight_g:number", "tags:list", "colour:text"]).save()
    rows = Catalogue(tiny.home).read("items").to_pylist()
    assert [(r["weight_g"], r["tags"], r["colour"]) for r in rows] == [(250.5, ["vegan", "new"], "red"), (None, None, None)]
    assert "ignored" not in rows[0]


def test_a_list_keeps_its_parts_whatever_they_hold_and_an_unknown_number_is_none(tiny: TinyShop, tmp_path: Path) -> None:
    path = tmp_path / "i.parquet"
    rows = [{"item_id": "x1", "weight_g": float("nan"), "tags": ["a|b", " c ", None, ""]}, {"item_id": "x2", "weight_g": 2.5, "tags": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = load(tiny.home, "items", path, own=["weight_g:number", "tags:list"]).rows
    assert [(r["weight_g"], r["tags"]) for r in found] == [(None, ["a|b", "c"]), (2.5, None)]


def test_an_attribute_that_the_file_has_not_is_refused_and_one_that_goes_is_told(tiny: TinyShop, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"--attribute weight_g: .*f\.csv has no such column"):
        load(tiny.home, "items", file(tmp_path, "item_id,weight", "x1,2"), own=["weight_g:number"])
    load(tiny.home, "items", file(tmp_path, "item_id,weight_g", "x1,2"), own=["weight_g:number"]).save()
    again = load(tiny.home, "items", file(tmp_path, "item_id,weight_g", "x1,2"))
    assert again.lost() == ["weight_g"]


@pytest.mark.parametrize(
    ("own", "line", "said"),
    [
        ("weight_g:number", "heavy", "line 2: weight_g: 'heavy' is no number"),
        ("weight_g:number", "inf", "line 2: weight_g: 'inf' is no number"),
        ("weight_g:heavy", "1", "say what it holds: weight_g:text|number|list"),
        ("weight_g", "1", "say what it holds"),
        ("Weight:number", "1", "small letters"),
        ("popularity:number", "1", "the catalogue itself uses that name"),
        ("brand:list", "1", "every catalogue knows it as a text"),
    ],
)
def test_what_is_wrong_with_an_attribute_is_told(tiny: TinyShop, tmp_path: Path, own: str, line: str, said: str) -> None:
    path = file(tmp_path, "item_id,weight_g", f"x1,{line}")
    with pytest.raises(CatalogueError, match=said.replace("|", r"\|")):
        load(tiny.home, "items", path, own=[own])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_come_as_lists_where_the_file_has_them(tiny: TinyShop, tmp_path: Path, kind: str) -> None:
    row = dict(zip(OFFERS.split(","), GOOD_OFFER.split(","), strict=True)) | {"item_ids": ["i1", "i2"]}
    path = file(tmp_path, json.dumps(row), name="o.jsonl")
    if kind == "parquet":
        path = tmp_path / "o.parquet"
        pq.write_table(pa.Table.from_pylist([row]), path)
    assert load(tiny.home, "offers", path).rows[0]["item_ids"] == ["i1", "i2"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (GOOD_OFFER, "line 3: offer_id: 'o1' is on line 2 too"),
        ("o2,c1,B,email,2018-01-02,2018-01-31,i1", "line 3: campaign_type: 'B', but line 2 of the same campaign says 'A'"),
        ("o2,c2,A,pigeon,2018-01-02,2018-01-31,i1", "line 3: channel: 'pigeon' is not one of store"),
        ("o2,c2,A,email,2018-02-02,2018-01-31,i1", "line 3: valid_until: lies before valid_from"),
        ("o2,c2,A,email,02/01/2018,2018-01-31,i1", "line 3: valid_from: '02/01/2018' is neither a date like"),
        ("o2,c2,A,email,2018-01-02,2018-01-31,i1|zz", "line 3: item_ids: 'zz' is not in the items' catalogue"),
        ("o2,c2,A,email,2018-01-02,2018-01-31,", "line 3: item_ids: is empty"),
        (",c2,A,email,2018-01-02,2018-01-31,i1", "line 3: offer_id: is empty"),
        ("o2,c2,A,email,2018-01-02", "line 3: $: 5 fields where the header has 7"),
    ],
)
def test_a_mistake_is_told_by_line_field_and_reason_and_changes_nothing(tiny: TinyShop, tmp_path: Path, line: str, told: str) -> None:
    before = Catalogue(tiny.home).digest("offers")
    with pytest.raises(CatalogueError) as error:
        load(tiny.home, "offers", file(tmp_path, OFFERS, GOOD_OFFER, line))
    assert told in str(error.value)
    assert "the offers in force stay as they were" in str(error.value)
    assert Catalogue(tiny.home).digest("offers") == before


def test_all_mistakes_are_told_at_once(tiny: TinyShop, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"(?s)3 mistakes.*line 2: item_id: is empty.*line 3: recommendable: 'maybe'.*line 4: item_id"):
        load(tiny.home, "items", file(tmp_path, "item_id,recommendable", ",yes", "a,maybe", "a,yes"))


def test_an_empty_file_does_not_take_every_item_away(tiny: TinyShop, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="an empty table would take every one away"):
        load(tiny.home, "items", file(tmp_path, "item_id,brand"))


def test_stores_and_columns_of_other_names(tiny: TinyShop, tmp_path: Path) -> None:
    path = file(tmp_path, "Filiale,Ort", "12,Bonn")
    with pytest.raises(CatalogueError, match="no column 'store_id'"):
        load(tiny.home, "stores", path)
    load(tiny.home, "stores", path, ["Filiale=store_id", "Ort=city"]).save()
    assert Catalogue(tiny.home).read("stores").to_pylist() == [
        {"store_id": "12", "name": None, "city": "Bonn", "region": None, "country": None, "latitude": None, "longitude": None}
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1,91,2", "line 2: latitude: '91' is no number between -90 and 90"),
        ("1,48.8,east", "line 2: longitude: 'east' is no number between -180 and 180"),
        ("1,48.8,", "line 2: longitude: is empty: a place has both"),
    ],
)
def test_a_place_that_is_none_is_told(tiny: TinyShop, tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(CatalogueError, match=said):
        load(tiny.home, "stores", file(tmp_path, "store_id,latitude,longitude", line))


def test_the_nearest_store_is_found_as_the_crow_flies() -> None:
    places = {"paris": (48.8566, 2.3522), "london": (51.5074, -0.1278), "suva": (-18.1416, 178.4419), "nowhere": (None, None)}
    rows = [{"store_id": name, "latitude": lat, "longitude": lon} for name, (lat, lon) in places.items()]
    stores = Stores(pa.Table.from_pylist(rows, STORES))
    assert stores.ids == ["paris", "london", "suva"]
    found = stores.nearest(51.5074, -0.1278)
    assert found is not None
    assert found == ("london", pytest.approx(0.0, abs=1e-6))
    # Paris to London is 343.6 km; across the date line is near
    lille = stores.nearest(50.6292, 3.0573)
    assert lille is not None
    assert lille == ("paris", pytest.approx(203.6, abs=1.0))
    across = stores.nearest(-18.0, -179.5)
    assert across is not None
    assert across[0] == "suva"
    assert Stores(STORES.empty_table()).nearest(0, 0) is None


def test_a_csv_from_excel_is_named_and_read(tiny: TinyShop, tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_bytes("item_id;brand\nä1;Öko\n".encode("windows-1252"))
    with pytest.raises(CatalogueError, match="divided by ';': --delimiter ';' says so"):
        load(tiny.home, "items", path, files=Files(encoding="windows-1252"))
    assert load(tiny.home, "items", path, files=Files(encoding="windows-1252", delimiter=";")).rows[0]["brand"] == "Öko"


def test_the_command_ends_in_order_with_a_mistake_and_without(tiny: TinyShop, tmp_path: Path) -> None:
    bad = command("features", "catalogue", "items", str(file(tmp_path, "item_id", "a", "a")), home=tiny.home.root)
    assert bad.returncode == 1
    assert "line 3: item_id: 'a' is on line 2 too" in bad.stdout
    good = command("features", "catalogue", "items", str(file(tmp_path, "item_id", "a", "b")), home=tiny.home.root)
    assert "2 rows in force" in good.stdout
    assert Home(tiny.home.root).catalogue.exists()


class TestWhatAnswersShow:
    def test_names_prices_pictures_and_pages_are_kept(self, tiny: TinyShop, tmp_path: Path) -> None:
        path = file(
            tmp_path, "sku,title,price,image_url,url", "x1,Milk 1 l,3.99,https://shop.example/m.jpg?w=1,http://shop.example/milk", "x2,,,,"
        )
        found = load(tiny.home, "items", path, ["sku=item_id", "title=name"])
        found.save()
        rows = Catalogue(tiny.home).read("items").to_pylist()
        shown = [(r["name"], r["price_minor"], r["image_url"], r["url"]) for r in rows]
        assert shown == [("Milk 1 l", 399.0, "https://shop.example/m.jpg?w=1", "http://shop.example/milk"), (None, None, None, None)]
        assert found.remarks() == ["1 links begin with http://: pages and mails that are sent over https do not show such pictures"]

    def test_a_table_without_them_has_no_such_columns(self, tiny: TinyShop, tmp_path: Path) -> None:
        load(tiny.home, "items", file(tmp_path, "item_id,price_minor", "x1,250")).save()
        table = Catalogue(tiny.home).read("items")
        assert "url" not in table.column_names
        assert table["price_minor"].to_pylist() == [250.0]

    @pytest.mark.parametrize(
        ("column", "value", "said"),
        [
            ("image_url", "javascript:alert(1)", "line 2: image_url: 'javascript:alert(1)' is no link: write it like https://"),
            ("url", "//shop.example/x", "line 2: url: .*is no link"),
            ("url", "https://ada:secret@shop.example/x", "line 2: url: .*is no link"),
            ("url", "https://shop.example/a b", "line 2: url: .*is no link"),
            ("url", "https://shop.example/" + "x" * 2_048, "line 2: url: is longer than 2048 characters"),
            ("name", "x" * 257, "line 2: name: is longer than 256 characters"),
            ("price", "free", "line 2: price: 'free' is no price: write it like 3.99"),
            ("price_minor", "-1", "line 2: price_minor: '-1' is no price: write it like 399"),
            ("price", "Infinity", "line 2: price: 'Infinity' is no price"),
        ],
    )
    def test_a_mistake_is_told_with_its_line(self, tiny: TinyShop, tmp_path: Path, column: str, value: str, said: str) -> None:
        with pytest.raises(CatalogueError, match=said.replace("(", r"\(").replace(")", r"\)")):
            load(tiny.home, "items", file(tmp_path, f"item_id,{column}", f"x1,{value}"))
