"""Over real HTTP: answers, mistakes, events that change answers, parity, batch, crash."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from scene import NEW_YEAR, ROOT, SMALL_CUT, Service, command, copy_home, eventually, free_port, loyalty_cards, start_service, stop_service

from features.catalogue.tables import Catalogue
from features.sources.catalogue_file import load as load_catalogue
from features.state.clock import moment_of
from features.state.home import Home
from features.state.ports import DECISIONS
from features.store.decision_log import flushed
from features.store.event_log import EventLog
from features.store.feature_store import FeatureStore
from features.store.snapshots import compute
from features.store.timeline import open_timeline
from models.inputs import Input
from models.registry import NoChampionError, Registry, model_names
from serving.bootstrap import model_settings, open_engine
from serving.decide.champions import _describe
from serving.decide.engine import Engine
from serving.decide.questions import NextBestOfferRequest, SimilarItemsRequest
from serving.decide.who import NOBODY
from serving.http.openapi import CUSTOMER_ROUTES, PAGE_ROUTES, ROUTES, RULE_ROUTES

COUNTER = iter(range(1_000_000))


def cards(home: Home, count: int, skip: int = 0) -> list[str]:
    """Loyalty cards of the small cut, in a fixed order."""
    return loyalty_cards(home)[skip : skip + count]


def about(card: str, **more: Any) -> dict[str, Any]:
    return {"identifiers": {"loyalty_card": card}, **more}


def view(service: Service, card: str, item: str, name: str = "view_item", **more: Any) -> dict[str, Any]:
    at = service.ask("churn", about(card))["as_of"]
    return {
        "event_id": f"t-{service.port}-{next(COUNTER)}", "name": name, "occurred_at": at, "identifiers": {"loyalty_card": card},
        "channel": "web", "items": [{"item_id": item}] if item else [], **more,
    }  # fmt: skip


def scores(service: Service, card: str, limit: int = 100) -> dict[str, float]:
    answer = service.ask("recommendations", about(card, listing="also_like", limit=limit))
    return {i["item_id"]: i["score"] for i in answer["items"]}


@pytest.mark.parametrize("path", ["recommendations", "next-best-offer", "churn"])
def test_every_answer_carries_its_provenance(service: Service, path: str) -> None:
    [card] = cards(service.home, 1)
    answer = service.ask(path, about(card))
    assert {"decision_id", "as_of", "customer_id", "model", "feature_at", "feature_age_seconds", "fallback"} <= set(answer)
    assert answer["model"].startswith(path)
    choices = answer.get("items") or answer.get("offers") or [answer]
    for choice in choices:
        assert {"score", "source", "reason"} <= set(choice)
        assert choice["reason"]


def test_an_unknown_customer_gets_popular_items_and_is_told_so(service: Service) -> None:
    for who in ({"customer_id": "nobody"}, {"identifiers": {"cookie": "new"}}, {}):
        answer = service.ask("recommendations", who)
        assert "nothing is known" in answer["fallback"]
        assert len(answer["items"]) == 10
    churn = service.ask("churn", {"customer_id": "nobody"})
    assert churn["probability"] is None
    assert churn["fallback"] == "no purchase is known of this customer"


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("recommendations", {"limit": "ten"}, 400, "limit"),
        ("recommendations", {"limit": 0}, 400, "limit"),
        ("recommendations", {"limit": 101}, 400, "limit"),
        ("recommendations", {"colour": 1}, 400, "colour"),
        ("recommendations", {"include": {"colour": ["red"]}}, 400, "include.colour"),
        ("recommendations", {"listing": "hers"}, 400, "listing"),
        ("recommendations", {"identifiers": {"e-mail": "a@b.c"}}, 400, "identifiers"),
        ("recommendations", {"identifiers": {"email": "nobody"}}, 400, "identifiers.email"),
        ("recommendations", {"customer_id": "a", "identifiers": {"cookie": "b"}}, 400, "customer_id"),
        ("recommendations", b"{not json", 400, "$"),
        ("recommendations", b"\xff\xfe", 400, "$"),
        ("recommendations", b"[]", 400, "$"),
        ("events", b"[" * 100_000, 400, "$"),
        ("similar-items", {}, 400, "item_id"),
        ("events", {"events": []}, 400, "events"),
        ("events", {"events": "all"}, 400, "events"),
        ("events", {"event_id": "x"}, 400, "name"),
        ("events", b"[" + b"1," * 600_000 + b"1]", 413, None),
        ("nothing", {}, 404, None),
    ],
)
def test_a_mistake_is_answered_with_a_problem_that_names_the_field(
    service: Service, path: str, body: Any, status: int, field: str | None
) -> None:
    code, problem = service.post(f"/v1/{path}", body)
    assert code == status == problem["status"]
    assert problem.get("field") == field
    assert problem["detail"]


@pytest.mark.parametrize(("path", "status"), [("/v1/events", 413), ("/bento/churn", 413), ("/v1/nothing", 413)])
def test_a_client_that_sends_far_too_much_still_reads_the_answer(service: Service, path: str, status: int) -> None:
    for _ in range(5):  # a connection closed on an unread body fails most times, not every time
        code, problem = service.post(path, b" " * 12_000_000)
        assert code == status == problem["status"]


def test_a_body_of_unknown_length_is_bounded_too(service: Service) -> None:
    chunks = (b" " * 100_000 for _ in range(60))
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    connection.request("POST", "/v1/events", chunks, {"content-type": "application/json"}, encode_chunked=True)
    with connection.getresponse() as response:
        assert response.status == 413
    connection.close()


def test_filters_hold_over_http(service: Service) -> None:
    [card] = cards(service.home, 1)
    everything = service.ask("recommendations", about(card, limit=100))["items"]
    produce = service.ask("recommendations", about(card, limit=100, include={"department": ["PRODUCE"]}))["items"]
    rest = service.ask("recommendations", about(card, limit=100, exclude={"department": ["PRODUCE"]}))["items"]
    assert len(produce) == 100
    assert not {i["item_id"] for i in produce} & {i["item_id"] for i in rest}
    banned = [i["item_id"] for i in everything[:5]]
    without = service.ask("recommendations", about(card, limit=100, exclude_item_ids=banned))["items"]
    assert not {i["item_id"] for i in without} & set(banned)


def test_viewing_an_item_raises_what_is_like_it_for_the_customer_at_once(service: Service) -> None:
    card = cards(service.home, 1, skip=11)[0]
    before = scores(service, card)
    item = list(before)[-1]
    answer = service.ask("similar-items", {"item_id": item, "limit": 100})["items"]
    near = [i["item_id"] for i in answer if i["source"] == "similar"]
    assert near
    service.ask("events", view(service, card, item))
    after = scores(service, card)
    assert item not in after
    assert sum(i in near for i in after) > sum(i in near for i in before)
    assert list(after)[:10] != list(before)[:10]


def test_what_a_customer_does_is_felt_in_their_next_list(service: Service) -> None:
    """Over 100 customers: a look at something new, and a purchase of what the list held first, change the items of most lists."""
    changed = {"view_item": 0, "purchase": 0}
    everyone = cards(service.home, 100, skip=30)
    for number, card in enumerate(everyone):
        name = "purchase" if number % 2 else "view_item"
        asked = about(card, listing="for_you" if name == "purchase" else "also_like")
        item = service.ask("recommendations", asked)["items"][0 if name == "purchase" else 5]["item_id"]
        before = [i["item_id"] for i in service.ask("recommendations", about(card))["items"]]
        service.ask("events", view(service, card, item, name))
        after = [i["item_id"] for i in service.ask("recommendations", about(card))["items"]]
        changed[name] += set(after) != set(before)
    assert changed["view_item"] > 25
    assert changed["purchase"] > 25


@pytest.mark.parametrize("listing", ["buy_again", "email", "trending", "basket", "session", "similar", "bought_together", "up_sell"])
def test_every_list_is_answered_over_http(service: Service, listing: str) -> None:
    [card] = cards(service.home, 1)
    item = service.ask("recommendations", about(card))["items"][0]["item_id"]
    answer = service.ask("recommendations", about(card, listing=listing, item_ids=[item], limit=5))
    assert answer["items"] or listing in ("up_sell", "bought_together")
    assert len({i["item_id"] for i in answer["items"]}) == len(answer["items"])
    if listing == "buy_again":
        assert all("expected_at" in i or "bought" in i["reason"] for i in answer["items"])
        assert any("expected_at" in i for i in answer["items"])
    if listing in ("similar", "bought_together", "up_sell"):
        assert all(i["because_of"] == item for i in answer["items"] if "because_of" in i)


def test_a_list_takes_promotions_diversity_and_tells_the_rankers_reasons(service: Service) -> None:
    [card] = cards(service.home, 1)
    plain = service.ask("recommendations", about(card, limit=20))["items"]
    promoted = plain[15]["item_id"]
    shown = service.ask("recommendations", about(card, promoted={promoted: 2}, explain=True))["items"]
    assert shown[1]["item_id"] == promoted
    assert shown[1]["source"] == "promotion"
    assert shown[1]["propensity"] == 1.0
    assert any("contributions" in i for i in shown)
    varied = service.ask("recommendations", about(card, diversity=1.0))["items"]
    assert [i["item_id"] for i in varied] != [i["item_id"] for i in plain[:10]]
    recent = service.ask("recommendations", about(card, exclude_bought_within_days=36500, limit=20))["items"]
    assert not [i for i in recent if i["source"] == "frequency"]


def test_an_event_that_says_nothing_changes_nothing(service: Service) -> None:
    card = cards(service.home, 1, skip=12)[0]
    before = scores(service, card)
    for name in ("login", "store_visit", "call"):
        service.ask("events", view(service, card, "", name))
    after = scores(service, card)
    assert list(after) == list(before)
    assert list(after.values()) == pytest.approx(list(before.values()), rel=1e-5)


def test_another_customers_event_changes_nothing(service: Service) -> None:
    mine, theirs = cards(service.home, 2, skip=13)
    before = scores(service, mine)
    service.ask("events", view(service, theirs, list(before)[-1]))
    after = scores(service, mine)
    assert list(after) == list(before)
    assert list(after.values()) == pytest.approx(list(before.values()), rel=1e-5)


def test_an_event_reaches_the_log_once_and_the_aggregates_soon(service: Service) -> None:
    card = cards(service.home, 1, skip=15)[0]
    bought = view(service, card, "1082185", "purchase")
    assert service.ask("events", bought)["accepted"] == 1
    assert service.ask("events", bought)["duplicates"] == 1
    conflict = {**bought, "items": [{"item_id": "other"}]}
    assert service.post("/v1/events", conflict)[1]["field"] == "event_id"
    batch = service.ask("events", {"events": [bought, conflict, {**bought, "event_id": bought["event_id"] + "b"}]})
    assert [e["status"] for e in batch["events"]] == ["duplicate", "rejected", "accepted"]
    log = EventLog(service.home, "America/New_York")
    eventually(lambda: len(log.hashes_of([bought["event_id"], bought["event_id"] + "b"])) == 2)
    eventually(lambda: "other" in str(log.letters.read()))
    eventually(lambda: moment_of_feature(service, card) > NEW_YEAR)
    assert service.ask("events", bought)["duplicates"] == 1


def moment_of_feature(service: Service, card: str) -> Any:
    return msgspec.convert(service.ask("churn", about(card))["feature_at"], type=type(NEW_YEAR))


def test_exploring_logs_the_chance_and_not_exploring_logs_certainty(service: Service) -> None:
    card = cards(service.home, 1)[0]
    explored = [service.ask("recommendations", about(card, limit=3, explore=True))["items"] for _ in range(20)]
    assert all(i["propensity"] == 1.0 for items in explored for i in items[:2])
    assert all(0 < items[2]["propensity"] < 1 for items in explored)
    assert all(i["propensity"] == 1.0 for i in service.ask("recommendations", about(card, limit=3))["items"])


def test_the_vectors_that_were_served_equal_a_fresh_replay_of_the_log(service: Service) -> None:
    """Parity for 500 customers: integers and texts exactly, floats to one part in a billion."""
    asked = {}
    for card in cards(service.home, 500, skip=5):
        for path in ("churn", "recommendations"):
            answer = service.ask(path, about(card))
            asked[answer["decision_id"]] = path
    table = service.home.tables[DECISIONS]
    eventually(lambda: set(asked) <= {d["decision_id"] for d in flushed(table)}, 30)
    decisions = [d for d in flushed(table) if d["decision_id"] in asked]
    assert len(decisions) == 1000
    compared, touched = 0, 0
    store = FeatureStore(service.home)
    for kind, name in (("churn", "customer_activity"), ("recommendations", "customer_state")):
        mine = [d for d in decisions if asked[d["decision_id"]] == kind]
        moments = sorted({d["features"][f"{name}_at"] for d in mine})
        for at in moments:
            moment = moment_of(at)
            customers = [d["customer_id"] for d in mine if d["features"][f"{name}_at"] == at]
            [(_, table)] = list(compute(open_timeline(service.home, moment, customers), store.views[name], {moment: None}))
            replayed = {row["customer_id"]: store.expanded(row, moment, ("history", "cart")) for row in table.to_pylist()}
            touched += len(customers) if moment > NEW_YEAR else 0
            for decision in (d for d in mine if d["features"][f"{name}_at"] == at):
                row = replayed[decision["customer_id"]]
                for feature, served in decision["features"].items():
                    if isinstance(served, float):
                        assert row[feature] == pytest.approx(served, rel=1e-9), feature
                    else:
                        assert row[feature] == served, feature
                    compared += 1
    assert compared > 500 * 50
    assert touched >= 4, "some of them must have had live events"


def test_batch_gives_the_answers_of_http_at_the_same_moment(trained: Home, tmp_path: Path) -> None:
    trained = copy_home(trained, tmp_path / "home")
    fixed = start_service(trained, UBIQUO_CLOCK=f"fixed:{NEW_YEAR.isoformat()}")
    decided = set[str]()
    try:
        chosen = cards(trained, 25, skip=600)
        for kind, suffix in (("churn", "jsonl"), ("recommendations", "parquet"), ("next-best-offer", "jsonl")):
            out = tmp_path / f"{kind}.{suffix}"
            done = command("serving", "score", kind, "--as-of", "2018-01-01", "--out", str(out), "--limit", "4", home=trained.root)
            assert done.returncode == 0, done.stdout + done.stderr
            lines = pq.read_table(out).to_pylist() if suffix == "parquet" else [json.loads(x) for x in out.read_text().splitlines()]
            by_customer: dict[str, list[dict[str, Any]]] = {}
            for line in lines:
                by_customer.setdefault(line["customer_id"], []).append(line)
            assert len(by_customer) == SMALL_CUT, "every customer is in the file"
            decided |= {line["decision_id"] for line in lines}
            for card in chosen:
                answer = fixed.ask(kind, about(card) if kind == "churn" else about(card, limit=4))
                choices = answer.get("items") or answer.get("offers") or [answer]
                mine = by_customer[answer["customer_id"]]
                assert [x["id"] for x in mine] == [c.get("item_id") or c.get("offer_id") for c in choices]
                for x, c in zip(mine, choices, strict=True):
                    assert x["score"] == (c["score"] if c["score"] is None else pytest.approx(c["score"], rel=1e-9))
                assert [x["reason"] for x in mine] == [c["reason"] for c in choices]
                assert {x["fallback"] for x in mine} == {answer["fallback"]}
                decided.add(answer["decision_id"])
    finally:
        stop_service(fixed)
    times = Counter(row["decision_id"] for row in flushed(trained.tables[DECISIONS]))
    assert {times[each] for each in decided} == {1}, "each once, whether it was answered over HTTP or in a batch beside the service"


def test_a_moment_that_the_log_does_not_reach_is_refused_by_batch_and_by_materialize(trained: Home, tmp_path: Path) -> None:
    for arguments in (("serving", "score", "churn", "--as-of", "2018-02-01", "--out", str(tmp_path / "x.jsonl")),
                      ("features", "materialize", "--as-of", "2018-02-01")):  # fmt: skip
        done = command(*arguments, home=trained.root)
        assert done.returncode == 1
        assert "the log ends 201" in done.stdout
        assert "Import what is missing, or use --as-of" in done.stdout


def test_a_batch_into_a_file_of_unknown_kind_is_refused_and_leaves_nothing(trained: Home, tmp_path: Path) -> None:
    done = command("serving", "score", "churn", "--out", str(tmp_path / "x.xlsx"), home=trained.root)
    assert done.returncode == 1
    assert ".csv, .parquet or .jsonl" in done.stdout
    wrong = command("serving", "score", "churns", "--out", str(tmp_path / "x.jsonl"), home=trained.root)
    assert wrong.returncode == 1
    assert "next-best-offer" in wrong.stdout
    assert list(tmp_path.iterdir()) == []


def test_bentomls_own_client_gets_the_same_answer(service: Service) -> None:
    import bentoml

    card = cards(service.home, 1)[0]
    with bentoml.SyncHTTPClient(f"http://127.0.0.1:{service.port}") as client:
        answer = client.recommendations(request=about(card, limit=4))
    over_http = service.ask("recommendations", about(card, limit=4))
    assert [i["item_id"] for i in answer["items"]] == [i["item_id"] for i in over_http["items"]]


def test_health_metrics_and_description_are_there(service: Service) -> None:
    for path in ("/livez", "/healthz", "/readyz"):
        assert service.get(path)[0] == 200
    status, metrics = service.get("/metrics")
    assert status == 200
    assert 'ubiquo_requests_total{route="/v1/churn",status="200"}' in metrics
    status, text = service.get("/openapi.json")
    description = json.loads(text)
    assert status == 200
    described = {*ROUTES, *CUSTOMER_ROUTES, *PAGE_ROUTES, *RULE_ROUTES, *(f"/v1/{name}" for name in model_names())}
    assert set(description["paths"]) == described
    assert service.get("/v1/churn")[0] == 405


def test_a_wish_that_does_not_fit_its_attribute_is_told_what_does(service: Service) -> None:
    card = cards(service.home, 1)[0]
    for wish, field, said in (
        ({"colour": ["red"]}, "include.colour", "is not an attribute to filter by"),
        ({"Department": ["PRODUCE"]}, "include.Department", "did you mean 'department'?"),
        ({"departement": ["PRODUCE"]}, "include.departement", "did you mean 'department'?"),
        ({"department": {"min": 1}}, "include.department", "it holds texts"),
    ):
        status, problem = service.post("/v1/recommendations", about(card, include=wish))
        assert (status, problem["field"]) == (400, field)
        assert said in problem["detail"]


def test_a_value_that_no_item_has_is_answered_with_a_note_that_names_the_nearest(service: Service) -> None:
    about_them = about(cards(service.home, 1)[0], limit=3)
    answer = service.ask("recommendations", {**about_them, "include": {"department": ["Produce"]}})
    assert answer["items"] == []
    assert answer["notes"] == ["include.department: nothing in the catalogue has 'Produce': did you mean 'PRODUCE'?"]
    answer = service.ask("recommendations", {**about_them, "include": {"department": ["PRODUCE"]}, "exclude": {"department": ["zzz"]}})
    assert len(answer["items"]) == 3
    assert answer["notes"] == ["exclude.department: nothing in the catalogue has 'zzz'"]
    many = service.ask("recommendations", {**about_them, "exclude": {"department": [f"PRODUCE{k}" for k in range(900)]}})
    assert len(many["notes"]) == 5
    assert service.ask("recommendations", about_them)["notes"] == []


@pytest.mark.parametrize(
    ("path", "body", "field", "said"),
    [
        ("recommendations", {"identifiers": {"userId": "7"}}, "identifiers", "did you mean 'user_id'?"),
        ("recommendations", {"userId": "7"}, "userId", "did you mean 'identifiers.user_id'?"),
        ("recommendations", {"Limit": 3}, "Limit", "did you mean 'limit'?"),
        ("recommendations", {"listing": "for_yuo"}, "listing", "did you mean 'for_you'?"),
        ("recommendations", {"channel": "e-mail"}, "channel", "did you mean 'email'?"),
        ("profile", {"identifiers": {"loyaltyCard": "7"}}, "identifiers", "did you mean 'loyalty_card'?"),
    ],
)
def test_a_name_that_is_not_known_brings_the_one_that_is_meant(
    service: Service, path: str, body: dict[str, Any], field: str, said: str
) -> None:
    status, problem = service.post(f"/v1/{path}", body)
    assert (status, problem["field"]) == (400, field)
    assert problem["detail"].endswith(said)


def test_a_model_that_is_only_named_is_trained_served_and_scored_beside_its_kind(trained: Home, tmp_path: Path) -> None:
    """Two horizons of one kind: an entry in mlflow.yaml is all that it takes."""
    home = copy_home(trained, tmp_path / "home")
    settings = yaml.safe_load((ROOT / "mlflow.yaml").read_text())
    entry = {
        **settings["models"]["churn"],
        "kind": "churn",
        "horizon_days": 56,
        "experiment": "ubiquo/churn-56",
        "registered_name": "churn-56",
    }
    settings["models"]["churn-56"] = entry
    path = tmp_path / "mlflow.yaml"
    path.write_text(yaml.safe_dump(settings))
    done = command("training", "churn-56", home=home.root, UBIQUO_MLFLOW=str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no visit in 56 days" in done.stdout
    out = tmp_path / "churn-56.jsonl"
    done = command("serving", "score", "churn-56", "--out", str(out), home=home.root, UBIQUO_MLFLOW=str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(out.read_text().splitlines()) == SMALL_CUT
    running = start_service(home, UBIQUO_MLFLOW=str(path))
    try:
        found = [(running.ask("churn", about(card)), running.ask("churn-56", about(card))) for card in cards(home, 40)]
        both = [(near["probability"], far["probability"]) for near, far in found if near["probability"] is not None]
        assert {(near["horizon_days"], far["horizon_days"]) for near, far in found} == {(28, 56)}
        assert np.mean([far < near for near, far in both]) > 0.7, "to stay away for longer is rarer"
        order = running.ask("days-to-next-order", about(cards(home, 1)[0]))
        assert (order["unit"], order["probability"], order["horizon_days"]) == ("days", None, 28)
        assert order["score"] is None or 0 <= order["score"] <= 28
        assert "/v1/churn-56" in running.get("/openapi.json")[1]
    finally:
        stop_service(running)


def test_where_no_model_recommends_items_similar_items_say_so(trained: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UBIQUO_HOME", str(trained.root))
    settings = model_settings(trained)
    engine = Engine(trained, Registry(replace(settings, models={"churn": settings.models["churn"]})))
    with pytest.raises(NoChampionError, match=r"no model that mlflow\.yaml names recommends items"):
        engine.similar_items(SimilarItemsRequest(item_id="1"), NEW_YEAR)


def test_a_champion_of_the_time_before_models_carried_their_phrases_speaks_on(trained: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UBIQUO_HOME", str(trained.root))
    engine, spoken = open_engine(trained), []
    model = engine._loaded["churn"].model.model
    row = {each.name: 5.0 for each in model.inputs}
    for each in (model.inputs, tuple(Input(x.name) for x in model.inputs)):
        model.inputs = each
        _describe(model, trained)
        spoken.append(model.answer(row))
    assert spoken[0] == spoken[1]


def test_a_port_in_use_is_told_before_anything_starts(service: Service) -> None:
    done = command("serving", "--port", str(service.port), home=service.home.root)
    assert done.returncode == 1
    assert "cannot be used" in done.stdout


def test_with_a_key_every_question_needs_it(trained: Home, tmp_path: Path) -> None:
    trained = copy_home(trained, tmp_path / "home")
    locked = start_service(trained, UBIQUO_API_KEY="a secret")
    try:
        assert locked.post("/v1/churn", {})[0] == 401
        assert locked.post("/v1/churn", {}, authorization="Bearer wrong")[0] == 401
        assert locked.post("/v1/churn", {}, authorization="Bearer a secret")[0] == 200
        assert locked.post("/bento/churn", {"request": {}})[0] == 401
        assert locked.post("/bento/churn", {"request": {}}, authorization="Bearer a secret")[0] == 200
    finally:
        stop_service(locked)


def test_a_registry_without_a_champion_is_refused_with_the_mend(trained: Home, tmp_path: Path) -> None:
    for name in ("shop.json", "log"):
        source = trained.root / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    done = command("serving", "--port", str(free_port()), home=tmp_path)
    assert done.returncode == 1
    assert "python -m training all" in done.stdout


def test_new_offers_are_taken_without_a_restart(trained: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shop.json", "catalogue"):
        source = trained.root / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    engine = Engine(Home(tmp_path), Registry(model_settings(trained)))
    assert engine.refresh() == []
    item = Catalogue(trained).read("items")["item_id"][0].as_py()
    path = tmp_path / "offers.csv"
    path.write_text(
        "offer_id,campaign_id,campaign_type,channel,valid_from,valid_until,item_ids\n"
        f"new-1,new,A,email,2017-12-30,2018-02-01,{item}\n"
    )  # fmt: skip
    load_catalogue(Home(tmp_path), "offers", path).save()
    assert engine.refresh() == ["next-best-offer/1 with new offers"]
    answer, _ = engine.next_best_offer("next-best-offer", NextBestOfferRequest(), NOBODY, {}, NEW_YEAR)
    assert [offer.offer_id for offer in answer.offers] == ["new-1"]
    assert engine.refresh() == []


def test_what_was_acknowledged_before_a_crash_is_there_after_it(trained: Home, tmp_path: Path) -> None:
    trained = copy_home(trained, tmp_path / "home")
    first = start_service(trained)
    card = cards(trained, 1, skip=700)[0]
    before = scores(first, card)
    item = list(before)[-1]
    sent = [view(first, card, item, "purchase") for _ in range(5)]
    for each in sent:
        assert first.ask("events", each)["accepted"] == 1
    stop_service(first, signal.SIGKILL)
    second = start_service(trained)
    try:
        assert item not in scores(second, card)
        assert [second.ask("events", each)["duplicates"] for each in sent] == [1] * 5
        log = EventLog(trained, "America/New_York")
        eventually(lambda: len(log.hashes_of([each["event_id"] for each in sent])) == 5)
        bought = second.ask("recommendations", about(card, limit=100, listing="buy_again"))["items"]
        [mine] = [i for i in bought if i["item_id"] == item]
        assert "bought 5 times" in mine["reason"]
    finally:
        stop_service(second)


def test_a_customer_who_is_in_the_log_but_not_yet_online_keeps_her_past(trained: Home, tmp_path: Path) -> None:
    trained = copy_home(trained, tmp_path / "home")
    running = start_service(trained)
    try:
        card = cards(trained, 1, skip=710)[0]
        customer = running.ask("recommendations", about(card))["customer_id"]
        with sqlite3.connect(trained.feast / "online.db", timeout=30) as online:
            for (table,) in online.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE '%state%'").fetchall():
                online.execute(f"DELETE FROM {table} WHERE instr(entity_key, ?) > 0", (customer.encode(),))
        assert running.ask("recommendations", about(card))["fallback"]
        running.ask("events", view(running, card, "1082185"))

        def remembered() -> bool:
            answer = running.ask("recommendations", about(card, limit=100))
            return sum("bought" in i["reason"] for i in answer["items"]) > 20

        eventually(remembered)
    finally:
        stop_service(running)


def test_ports_are_free_again_after_a_service_ends(trained: Home, tmp_path: Path) -> None:
    trained = copy_home(trained, tmp_path / "home")
    running = start_service(trained)
    stop_service(running)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", running.port))
