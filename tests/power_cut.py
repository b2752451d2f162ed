"""A writer whose disk is copied while it writes: it takes events in, drains, compacts and erases, and tells what it has promised."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

from scene import NEW_YEAR, SECRET, event

os.environ["UBIQUO_SECRET"] = SECRET

import pyarrow as pa

from features.catalogue.shop import Shop
from features.catalogue.tables import ITEM_CONTEXT, ITEMS, OFFERS, Catalogue
from features.people.consent import Consents
from features.people.identity import Identities
from features.state import delta_writes
from features.state.clock import running_clock
from features.state.home import Home
from features.state.tables import DeltaFolder
from features.store.event_log import EventLog
from features.store.feature_store import FeatureStore
from serving.intake.inbox import Inbox
from serving.intake.intake import Intake

ERASE_EVERY, MAINTAIN_EVERY = 12, 7


def make(root: Path) -> Home:
    """A home with a shop and an item."""
    home = Home(root)
    Shop(name="tiny", timezone="America/New_York", currency="USD", data_end=NEW_YEAR).save(home)
    item = {
        "item_id": "i1",
        "department": "D",
        "category": "C",
        "type": "T",
        "brand": "N",
        "manufacturer": "M",
        "size": "1",
        "recommendable": True,
    }
    catalogue = Catalogue(home)
    catalogue.save("items", pa.Table.from_pylist([item]), ITEMS)
    catalogue.save("offers", OFFERS.empty_table(), OFFERS)
    catalogue.save("item_context", ITEM_CONTEXT.empty_table(), ITEM_CONTEXT)
    return home


def main(root: Path) -> None:
    home = make(root) if not (root / "shop.json").exists() else Home(root)
    store, identities = FeatureStore(home), Identities(home)
    store.apply()
    shop = Shop.load(home)
    intake = Intake(home, running_clock(NEW_YEAR), Inbox(home, running_clock(NEW_YEAR)), store, identities, Consents(home, shop.consent))
    log = EventLog(home, shop.timezone)
    print("ready", flush=True)
    for n in range(100_000):
        names = [f"{os.getpid()}-{n}-{k}" for k in range(5)]
        answer = intake.accept([event(name, "login", NEW_YEAR - timedelta(days=1), f"card-{n % 7}") for name in names])
        assert answer.accepted == 5
        print("stored", *names, flush=True)
        if n % 3 == 0:
            intake.drain()
        if n % MAINTAIN_EVERY == 0:
            delta_writes.COMPACT_ABOVE_FILES = 3
            log.maintain(kept_seconds=0.0)
        if n % ERASE_EVERY == ERASE_EVERY - 1:
            intake.drain()
            print("erasing", *names[:2], flush=True)
            with home.lease.hold("log"):
                DeltaFolder(home.events).erase("event_id", names[:2])
            print("erased", *names[:2], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
