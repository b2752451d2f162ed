"""Of whom it makes sense to ask when they come again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np


class Eligibility(msgspec.Struct, frozen=True):
    """Customers who came often enough to be known, and lately enough to be there still."""

    min_visit_days: int = 3
    max_recency_days: int = 91

    def why_not(self, row: Mapping[str, Any]) -> str | None:
        """None if the question makes sense for the customer of this feature row, else why it does not."""
        if row.get("recency_days") is None or np.isnan(row["recency_days"]):
            return "no purchase is known of this customer"
        if row["recency_days"] > self.max_recency_days:
            return f"no visit in the last {self.max_recency_days} days: already gone"
        if row["visit_days_total"] < self.min_visit_days:
            return f"fewer than {self.min_visit_days} visit days so far: too new to tell"
        return None

    @classmethod
    def from_about(cls, about: Mapping[str, Any]) -> Eligibility:
        """What an artifact says of it; one of the time before models carried theirs says nothing."""
        return msgspec.convert(about.get("eligibility", {}), cls)
