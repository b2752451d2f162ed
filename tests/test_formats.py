"""What leaves for other tools: columns that they load, no formulas, lists of customers read back, and decisions logged once."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from scene import NEW_YEAR, TinyShop, customer, event

from features.definitions.domain import domain_named
from features.definitions.segments import Vocabulary
from features.definitions.standing import BUILT_IN, Borders, CustomerStanding
from features.people.identity import Identities
from features.people.listed import ListError, read_list
from features.state.disk import write_atomically
from features.state.home import Home
from features.store.decision_log import BatchDecisions, DecisionLog
from features.store.outputs import outputs, owners_of
from serving.decide.addresses import missing
from serving.decide.batch import Delivery, whole
from serving.decide.batch_files import CsvFile
from serving.decide.formats import FORMATS, encoded, format_named, header
from serving.privacy.held_files import BatchFiles
from serving.privacy.holdings import Subject

ZONE = ZoneInfo("America/New_York")
ADA = {"external_id": "7", "email": "ada@example.org", "phone": "+442079460958"}
TOLD = {"segment": "loyal"}


class TestFormats:
    @pytest.mark.parametrize(
        ("name", "columns"),
        [
            ("plain", ["customer_id", "external_id", "email", "phone", "segment"]),
            ("excel", ["customer_id", "external_id", "email", "phone", "segment"]),
            ("braze", ["external_id", "email", "phone", "ubiquo_segment"]),
            ("klaviyo", ["Email", "Phone Number", "External ID", "ubiquo_segment"]),
            ("audience", ["Email", "Phone"]),
        ],
    )
    def test_each_tool_finds_the_columns_that_it_loads(self, name: Any, columns: list[str]) -> None:
        assert list(FORMATS[format_named(name)].row("c_1", ADA, TOLD)) == columns

    def test_an_ad_platform_gets_hashes_alone(self) -> None:
        told = FORMATS["audience"].row("c_1", {**ADA, "email": " Ada@Example.org "}, TOLD)
        assert told == FORMATS["audience"].row("c_1", ADA, TOLD)
        assert all(len(value) == 64 for value in told.values())

    def test_braze_knows_whom_it_does_not_know_by_ubiquos_own_id(self) -> None:
        assert FORMATS["braze"].row("c_1", {"email": "a@b.org"}, {})["external_id"] == "c_1"

    @pytest.mark.parametrize("text", ["=1+1", "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "＝1+1"])
    @pytest.mark.parametrize("name", ["plain", "excel", "braze", "klaviyo"])
    def test_no_text_becomes_a_formula(self, name: Any, text: str) -> None:
        written = encoded([{"a": text}], ["a"], FORMATS[format_named(name)], ",", ZONE).decode()
        [[value]] = csv.reader(io.StringIO(written, newline=""))
        assert value == f"'{text}"

    def test_numbers_stay_numbers_and_phones_stay_phones_where_no_spreadsheet_reads_them(self) -> None:
        assert FORMATS["excel"].harmless(-3.5) == -3.5
        assert FORMATS["klaviyo"].harmless("+442079460958") == "+442079460958"
        assert FORMATS["excel"].harmless("+442079460958") == "'+442079460958"

    def test_excel_reads_letters_and_times(self) -> None:
        form = FORMATS["excel"]
        assert header(["Käse"], form).startswith(b"\xef\xbb\xbf")
        assert form.harmless(NEW_YEAR, ZONE) == "2018-01-01 00:00:00"
        assert FORMATS["plain"].harmless(NEW_YEAR, ZONE) == NEW_YEAR.isoformat()

    def test_an_unknown_tool_is_refused_by_name(self) -> None:
        with pytest.raises(ValueError, match="--for 'word' is not one of plain, excel, braze"):
            format_named("word")

    @pytest.mark.parametrize(
        ("delivery", "out", "channel", "said"),
        [
            (Delivery("klaviyo"), "x.csv", "email", "add --with-contact"),
            (Delivery("excel", with_contact=True), "x.csv", None, "--with-contact: say with --channel"),
            (Delivery("excel", with_contact=True), "x.csv", "web", "--with-contact: say with --channel"),
            (Delivery("excel"), "x.parquet", None, "--for excel: it loads a CSV"),
            (Delivery(delimiter=";;"), "x.csv", None, "--delimiter"),
            (Delivery(), "x.xlsx", None, "end the name in .csv, .parquet or .jsonl"),
        ],
    )
    def test_what_cannot_be_is_told_before_anything_is_written(self, delivery: Delivery, out: str, channel: Any, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            delivery.check(Path(out), channel)

    def test_who_has_no_address_is_not_reached(self) -> None:
        assert missing({"phone": "1"}, "email") == "no e-mail address is known"
        assert missing({"email": "a"}, "sms") == "no phone number is known"
        assert missing({}, "mail") is None


class Breaks:
    def __str__(self) -> str:
        raise RuntimeError("the disk is gone")


class TestFiles:
    def write(self, home: Home, out: Path, rows: list[tuple[str, dict[str, Any]]]) -> None:
        form = FORMATS["plain"]
        with whole(home, out, lambda part, owners: CsvFile(part, owners, ["name"], form, ",", ZONE)) as writer:
            writer.write_rows(rows)

    def test_an_erasure_finds_rows_that_do_not_say_whose_they_are(self, tiny: TinyShop, tmp_path: Path) -> None:
        out = tmp_path / "x.csv"
        self.write(tiny.home, out, [("a", {"name": "Ada"}), ("b", {"name": "two\nlines"}), ("c", {"name": "Cy"})])
        place, subject = BatchFiles(tiny.home), Subject(["b"], [], [])
        assert len(list(place.find(subject))) == 1
        assert place.erase(subject) == 1
        assert list(csv.reader(out.open())) == [["name"], ["Ada"], ["Cy"]]
        assert msgspec.json.decode(owners_of(out).read_bytes()) == ["a", "c"]
        assert out.stat().st_mode & 0o077 == 0, "nobody else may read it"

    def test_a_batch_that_breaks_leaves_the_file_before(self, tiny: TinyShop, tmp_path: Path) -> None:
        out = tmp_path / "x.csv"
        self.write(tiny.home, out, [("a", {"name": "Ada"})])
        with pytest.raises(RuntimeError):
            self.write(tiny.home, out, [("b", {"name": "Bo"}), ("c", {"name": Breaks()})])
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["x.csv", "x.csv.customers"]
        assert "Ada" in out.read_text()

    def test_what_a_killed_batch_left_goes_with_the_next_erasure(self, tiny: TinyShop, tmp_path: Path) -> None:
        out = tmp_path / "x.csv"
        with whole(tiny.home, out, lambda part, owners: CsvFile(part, owners, ["name"], FORMATS["plain"], ",", ZONE)) as writer:
            writer.write_rows([("b", {"name": "Bo"})])
            left = [path.read_bytes() for path in tmp_path.glob(".x.csv*.part")]
            names = list(tmp_path.glob(".x.csv*.part"))
        for path, content in zip(names, left, strict=True):
            path.write_bytes(content)
        assert set(names) <= {path.resolve() for path in outputs(tiny.home)} | set(names)
        place = BatchFiles(tiny.home)
        write_atomically(tiny.home.root / "outputs.json", msgspec.json.encode([str(path) for path in names]))
        assert place.erase(Subject(["somebody"], [], [])) == len(names)
        assert list(tmp_path.glob(".x.csv*.part")) == []


class TestDecisionsOfABatch:
    def decision(self, number: int, choices: Any = ()) -> dict[str, Any]:
        return {
            "decision_id": f"d{number}", "kind": "churn", "customer_id": f"c{number}", "as_of": NEW_YEAR, "model": "churn/1", "feature_at": 1,
            "fallback": None, "request": {}, "choices": list(choices), "features": {"recency_days": number}, "assignment": {},
        }  # fmt: skip

    def run(self, home: Home, *decisions: dict[str, Any]) -> BatchDecisions:
        batch = BatchDecisions(home)
        for each in decisions:
            batch.add(each)
        batch.flush()
        return batch

    def test_the_same_batch_run_again_logs_nothing_twice_beside_a_running_service(self, tiny: TinyShop) -> None:
        service = DecisionLog(tiny.home)
        service.append(self.decision(1))
        assert self.run(tiny.home, self.decision(2), self.decision(3)).logged == 2
        again = self.run(tiny.home, self.decision(2), self.decision(3), self.decision(4))
        assert (again.logged, again.known) == (1, 2)
        service.close()
        assert sorted(row["decision_id"] for row in service.read()) == ["d1", "d2", "d3", "d4"]

    def test_another_answer_under_the_same_id_takes_its_place(self, tiny: TinyShop) -> None:
        self.run(tiny.home, self.decision(1, [{"item_id": "a"}]), self.decision(2))
        assert self.run(tiny.home, self.decision(1, [{"item_id": "b"}]), self.decision(2)).logged == 1
        log = DecisionLog(tiny.home)
        assert {row["decision_id"]: row["choices"] for row in log.read()} == {"d1": [{"item_id": "b"}], "d2": []}
        log.close()


class TestLists:
    @pytest.fixture
    def known(self, tiny: TinyShop) -> Identities:
        tiny.add(
            event("e1", "identify", NEW_YEAR - timedelta(days=1), card="1", identifiers={"loyalty_card": "1", "phone": "+442079460958"}),
            event("e2", "identify", NEW_YEAR - timedelta(days=1), card="2", identifiers={"loyalty_card": "2", "email": "bo@example.org"}),
        )
        return Identities(tiny.home)

    @pytest.mark.parametrize(
        "text",
        [
            "phone\n020 7946 0958\n", "Email;Phone Number\n;020 7946 0958\n", "phone:020 7946 0958\n", "loyalty_card\n1\n1\n",
            "\ufeffexternal_id,email\n1,\n", "loyalty_card:1\n",
        ],
    )  # fmt: skip
    def test_a_list_is_read_in_the_shops_region_in_whatever_shape(self, known: Identities, tmp_path: Path, text: str) -> None:
        path = tmp_path / "list.csv"
        path.write_text(text, encoding="utf-8")
        assert read_list(path, known, "GB") == ([customer("1")], 0)

    def test_who_is_not_known_is_counted_and_an_id_stands_for_itself(self, known: Identities, tmp_path: Path) -> None:
        path = tmp_path / "list.txt"
        path.write_text(f"{customer('2')}\nloyalty_card:77\nnobody\n\n")
        assert read_list(path, known, None) == ([customer("2")], 2)

    @pytest.mark.parametrize(
        ("text", "said"), [("phone\nnonsense\n", "line 2: phone"), ("email\nnone at all\n", "line 2: email"), ("", "is empty")]
    )
    def test_a_mistake_is_told_with_its_line(self, known: Identities, tmp_path: Path, text: str, said: str) -> None:
        path = tmp_path / "list.csv"
        path.write_text(text)
        with pytest.raises(ListError, match=said):
            read_list(path, known, "GB")


class TestStanding:
    BORDERS = Borders(
        datetime(2018, 1, 1, tzinfo=UTC), 100, ("recency_days", "baskets_182", "spend_minor_182"), (2, 4, 10, 26), (8, 16, 28, 49),
        (100, 200, 300, 400),
    )  # fmt: skip

    def words(self, text: bytes = b"") -> Vocabulary:
        return Vocabulary.parse(text, "segments.yaml", "grocery", CustomerStanding(domain_named("grocery").leaving, self.BORDERS))

    def told(self, recency: int, baskets: int, spend: int, words: Vocabulary | None = None, **more: Any) -> Any:
        row = {
            "recency_days": recency, "tenure_days": 300, "visit_days_total": 50, "gap_p90_days": 10.0, "baskets_182": baskets,
            "spend_minor_182": spend,
        }  # fmt: skip
        return (words or self.words()).told({**row, **more}, {})

    @pytest.mark.parametrize(
        ("row", "segment"),
        [
            ((1, 60, 500), "champions"), ((8, 60, 500), "loyal"), ((1, 5, 50), "promising"), ((1, 20, 250), "regular"),
            ((30, 60, 500), "at_risk"), ((20, 5, 50), "hibernating"), ((40, 5, 50), "lost"),
        ],
    )  # fmt: skip
    def test_a_customer_is_in_one_segment_of_recency_frequency_and_money(self, row: Any, segment: str) -> None:
        told = self.told(*row)
        held = [name for name, text in BUILT_IN.items() if text.startswith("rfm_segment") and told[name]]
        assert (told["rfm_segment"], held) == (segment, [segment])

    def test_the_border_belongs_to_the_fifth_below(self) -> None:
        assert [self.told(1, baskets, 50)["rfm_frequency"] for baskets in (8, 9, 49, 50)] == [1, 2, 4, 5]
        assert [self.told(days, 5, 50)["rfm_recency"] for days in (2, 3, 26, 27)] == [5, 4, 2, 1]

    @pytest.mark.parametrize(
        ("changed", "stage"),
        [
            ({"tenure_days": 20}, "new"), ({"recency_days": 9}, "active"), ({"recency_days": 11}, "slipping"), ({"recency_days": 28}, "slipping"),
            ({"recency_days": 29}, "gone"), ({"recency_days": 5, "gap_p90_days": 1.0}, "active"), ({"recency_days": 92, "gap_p90_days": 80.0}, "gone"),
            ({"recency_days": None, "tenure_days": None, "visit_days_total": 0}, "prospect"),
        ],
    )  # fmt: skip
    def test_the_life_of_a_customer_goes_by_their_own_rhythm(self, changed: dict[str, Any], stage: str) -> None:
        assert self.told(1, 20, 250, **changed)["lifecycle"] == stage

    def test_the_shops_own_segment_takes_the_place_and_may_build_on_the_others(self) -> None:
        words = self.words(b"segments:\n  loyal: recency_days < 3.0\n  best: champions && value_tier == 'high'\n")
        told = self.told(1, 60, 500, words)
        assert (told["loyal"], told["best"], told["champions"]) == (True, True, True)
        assert "baskets_182" not in words.needs(words.parse_condition("recency_days > 1.0"))
        # what is read of a row must be read for them, whatever a model itself asks
        assert {"rfm_segment", "champions", "recency_days", "spend_minor_182"} <= words.needs(words.parse_condition("best"))

    def test_without_borders_nobody_is_in_a_fifth(self) -> None:
        words = Vocabulary.parse(b"", "segments.yaml", "grocery")
        told = words.told({"recency_days": 1, "tenure_days": 300, "visit_days_total": 9, "baskets_182": 9, "spend_minor_182": 9}, {})
        assert (told["rfm_segment"], told["champions"], told["lifecycle"], told["churn_risk"]) == (None, False, "active", None)

    def test_the_risk_is_beside_what_is_usual(self) -> None:
        class Fixed:
            usual = 0.2

            def probability(self, row: Any) -> float:
                return float(row["p"])

        words = Vocabulary.parse(b"", "segments.yaml", "grocery", CustomerStanding(domain_named("grocery").leaving, self.BORDERS, Fixed()))
        assert [words.told({"p": p}, {})["churn_risk"] for p in (0.1, 0.2, 0.34, 0.05)] == ["low", "medium", "high", "low"]
