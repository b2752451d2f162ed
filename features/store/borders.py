"""The borders between fifths of the customers, measured on the rows of a materialization."""

from __future__ import annotations

from datetime import datetime

import msgspec
import numpy as np
import pyarrow.parquet as pq

from features.catalogue.shop import Shop
from features.definitions.domain import domain_named
from features.definitions.standing import BORDERS, Borders
from features.state.disk import DamagedStateError, write_atomically
from features.state.home import Home
from features.store.feature_store import FeatureStore

FIFTHS = (0.2, 0.4, 0.6, 0.8)


def measure_borders(home: Home, store: FeatureStore, as_of: datetime) -> Borders | None:
    """Measure the borders on everybody's rows at *as_of* and put them in force; those of a later moment stay.

    Returns those in force; None where nobody has bought anything yet.
    """
    try:
        standing = Borders.load(home)
    except DamagedStateError:
        # this makes it anew
        standing = None
    if standing is not None and standing.as_of > as_of:
        return standing
    rfm = domain_named(Shop.load(home).domain).leaving.rfm
    table = pq.read_table(store.snapshot("customer_activity", as_of), columns=["visit_days_total", *rfm])
    bought = table["visit_days_total"].to_numpy(zero_copy_only=False) > 0
    if not bought.any():
        return standing
    columns = [table[name].to_numpy(zero_copy_only=False).astype(np.float64)[bought] for name in rfm]
    # a border is a value that somebody has: whoever has it lies below
    recency, frequency, money = (
        tuple(float(border) for border in np.nanquantile(column, FIFTHS, method="inverted_cdf")) for column in columns
    )
    found = msgspec.convert(
        {"as_of": as_of, "customers": int(bought.sum()), "rfm": rfm, "recency": recency, "frequency": frequency, "money": money}, Borders
    )
    write_atomically(home.root / BORDERS, msgspec.json.format(msgspec.json.encode(found), indent=2))
    return found
