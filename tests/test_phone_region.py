"""A phone number as people of the shop's country write it names the same customer, wherever it comes in."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scene import NEW_YEAR, TinyShop, event

from features.commands.people import found
from features.people.consent import Consents
from features.people.identity import Identities
from features.people.listed import read_list
from features.sources import segment
from features.state.clock import fixed_clock
from features.store.feature_store import FeatureStore
from serving.__main__ import _customer
from serving.intake.inbox import Inbox
from serving.intake.intake import Intake

LOCAL, AT = "020 7946 0958", NEW_YEAR - timedelta(days=1)


@pytest.fixture
def intake(tiny: TinyShop) -> Intake:
    store, identities = FeatureStore(tiny.home), Identities(tiny.home)
    store.apply()
    return Intake(
        tiny.home, fixed_clock(NEW_YEAR), Inbox(tiny.home, fixed_clock(NEW_YEAR)), store, identities, Consents(tiny.home, tiny.shop.consent)
    )


def test_events_segments_messages_lists_and_commands_read_it_alike(tiny: TinyShop, intake: Intake, tmp_path: Path) -> None:
    [refused] = intake.accept([event("e0", "login", AT, card=None, identifiers={"phone": LOCAL})]).events
    assert "set phone_region in the shop" in str(refused.reason)
    # an import of another process names it while the service runs
    msgspec.structs.replace(tiny.shop, phone_region="GB").save(tiny.home)
    assert intake.refresh_region() == "GB"
    said: list[Any] = [event("e1", "login", AT, card=None, identifiers={"phone": LOCAL})]
    said.append(event("e2", "identify", AT, identifiers={"loyalty_card": "1", "phone": "+44 20 7946 0958"}))
    assert intake.accept(said).accepted == 2
    message = {"type": "identify", "messageId": "s1", "userId": "u1", "traits": {"phone": LOCAL}, "timestamp": AT.isoformat()}
    assert intake.accept([message], "segment", lambda told, at: segment.to_event(told, at, "USD")).accepted == 1
    intake.drain()
    whose = intake.identities.resolve({"loyalty_card": "1"})
    assert whose is not None
    for given in ({"phone": LOCAL}, {"phone": "+442079460958"}, {"user_id": "u1"}):
        assert intake.identities.resolve(given, "GB") == whose  # type: ignore[arg-type]
    assert _customer(tiny.home, f"phone:{LOCAL}") == found(tiny.home, Identities(tiny.home), f"phone:{LOCAL}") == whose
    path = tmp_path / "list.csv"
    path.write_text(f"Phone Number\n{LOCAL}\n")
    assert read_list(path, Identities(tiny.home), "GB").customers == [whose]
    intake.close()
