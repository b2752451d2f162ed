"""Where a customer stands among the shop's others and in their own rhythm: told from one row and a few borders, when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

import msgspec

from features.definitions.domain import Leaving
from features.state.disk import DamagedStateError
from features.state.home import Home

BORDERS = "borders.json"
"""The file of a home that holds the borders between fifths of its customers, written by each materialization."""
Kind = Literal["number", "text"]
STANDING: Mapping[str, Kind] = {
    "rfm_recency": "number", "rfm_frequency": "number", "rfm_money": "number", "rfm_segment": "text", "lifecycle": "text",
    "value_tier": "text", "churn_probability": "number", "churn_risk": "text",
}  # fmt: skip
"""What can be told, and what each holds."""
BUILT_IN: Mapping[str, str] = {
    "champions": "rfm_segment == 'champions'", "loyal": "rfm_segment == 'loyal'", "promising": "rfm_segment == 'promising'",
    "regular": "rfm_segment == 'regular'", "at_risk": "rfm_segment == 'at_risk'", "hibernating": "rfm_segment == 'hibernating'",
    "lost": "rfm_segment == 'lost'", "prospects": "lifecycle == 'prospect'", "new": "lifecycle == 'new'", "active": "lifecycle == 'active'",
    "slipping": "lifecycle == 'slipping'", "gone": "lifecycle == 'gone'", "high_value": "value_tier == 'high'",
    "high_churn_risk": "churn_risk == 'high'",
}  # fmt: skip
"""The segments that every home has; one that the home's own file names so takes its place."""
LEAST_PATIENCE_DAYS = 7
"""Within a week nobody is late, however often they come."""
RISKY_ODDS = 2.0
"""At so many times the odds of the average customer the risk of leaving is high, at the inverse low."""


class Borders(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What parts the customers who have bought into fifths, four numbers each, from the least to the most.

    Attributes:
        as_of: the moment of the rows.
        customers: how many there were.
        rfm: the features that are parted: recency, frequency, money.
    """

    as_of: datetime
    customers: int
    rfm: tuple[str, str, str]
    recency: tuple[float, float, float, float]
    frequency: tuple[float, float, float, float]
    money: tuple[float, float, float, float]

    @classmethod
    def load(cls, home: Home) -> Borders | None:
        """Those of a home; None before its first materialization.

        Raises:
            DamagedStateError: the file is damaged.
        """
        path = home.root / BORDERS
        if not path.exists():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DamagedStateError(f"{path} is damaged ({error}): python -m features materialize makes it anew") from None


class Risk(Protocol):
    """What tells how likely a customer is to leave."""

    @property
    def usual(self) -> float | None:
        """The share of customers who leave; None where that is not known."""

    def probability(self, row: Mapping[str, Any]) -> float | None:
        """How likely the customer of a row is to leave; None where nobody can tell."""


@dataclass(frozen=True)
class CustomerStanding:
    """What tells where customers of one shop stand.

    Attributes:
        leaving: what leaving means in the shop's trade.
        borders: None before the first materialization: then no fifth is known.
        risk: None where nothing tells it.
    """

    leaving: Leaving
    borders: Borders | None = None
    risk: Risk | None = None

    @property
    def reads(self) -> frozenset[str]:
        """Features of the customer's row without which none of ``STANDING`` can be told; the risk reads further ones beside them."""
        return frozenset({"recency_days", "tenure_days", "visit_days_total", "gap_p90_days", *self.leaving.rfm})

    def of(self, name: str, told: Mapping[str, Any]) -> Any:
        """One of ``STANDING`` of the customer of whom *told* is known; None where it cannot be told."""
        if name == "churn_probability":
            return None if self.risk is None else self.risk.probability(told)
        if name == "churn_risk":
            return self._risk_of(told.get("churn_probability"))
        if name == "lifecycle":
            return self.lifecycle(told)
        if name == "rfm_segment":
            return self._segment(told)
        if name == "value_tier":
            money = told.get("rfm_money")
            return None if money is None else "high" if money == 5 else "low" if money <= 2 else "medium"
        return self._fifth(("rfm_recency", "rfm_frequency", "rfm_money").index(name), told)

    def lifecycle(self, told: Mapping[str, Any]) -> str | None:
        """``prospect``, ``new``, ``active``, ``slipping`` or ``gone``.

        New is whose first purchase is no longer ago than the trade's horizon. Late is who stays away for longer than nine of ten of their
        own intervals; gone, for twice that and the trade's horizon, or so long that the trade gives them up.
        """
        recency, tenure = told.get("recency_days"), told.get("tenure_days")
        if recency is None or tenure is None:
            return "prospect" if told.get("visit_days_total") == 0 else None
        if tenure <= self.leaving.horizon_days:
            return "new"
        usual = told.get("gap_p90_days")
        patience = max(self.leaving.horizon_days if usual is None else usual, LEAST_PATIENCE_DAYS)
        if recency > min(max(2 * patience, self.leaving.horizon_days), self.leaving.max_recency_days):
            return "gone"
        return "slipping" if recency > patience else "active"

    def _fifth(self, number: int, told: Mapping[str, Any]) -> int | None:
        """1 to 5: the best fifth of customers has 5."""
        value = told.get(self.leaving.rfm[number])
        if self.borders is None or self.borders.rfm != self.leaving.rfm or value is None or not told.get("visit_days_total"):
            return None
        above = sum(bool(value > border) for border in (self.borders.recency, self.borders.frequency, self.borders.money)[number])
        # who came lately has few days
        return 5 - above if number == 0 else 1 + above

    def _segment(self, told: Mapping[str, Any]) -> str | None:
        recency, frequency, money = (told.get(name) for name in ("rfm_recency", "rfm_frequency", "rfm_money"))
        stage = told.get("lifecycle")
        if stage in ("new", "prospect"):
            return "new" if stage == "new" else "prospects"
        if recency is None or frequency is None or money is None:
            return None
        worth = frequency + money
        if recency >= 3:
            if recency >= 4 and frequency >= 4 and money >= 4:
                return "champions"
            return "loyal" if worth >= 7 else "promising" if recency >= 4 and worth <= 4 else "regular"
        return "at_risk" if worth >= 6 else "hibernating" if recency == 2 else "lost"

    def _risk_of(self, probability: float | None) -> str | None:
        usual = None if self.risk is None else self.risk.usual
        if probability is None or usual is None or not 0 < usual < 1:
            return None
        odds, average = probability / max(1 - probability, 1e-9), usual / (1 - usual)
        return "high" if odds >= RISKY_ODDS * average else "low" if odds <= average / RISKY_ODDS else "medium"
