"""The store that is nearest to a place."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

EARTH_KM = 6371.0088
"""The mean radius of the earth."""


class Stores:
    """Stores whose place is known."""

    def __init__(self, table: pa.Table) -> None:
        known = [row for row in table.to_pylist() if row["latitude"] is not None and row["longitude"] is not None]
        self.ids = [row["store_id"] for row in known]
        self._places = np.radians([(row["latitude"], row["longitude"]) for row in known]).reshape(-1, 2)

    def nearest(self, latitude: float, longitude: float) -> tuple[str, float] | None:
        """The nearest store and how many kilometres away it is, as the crow flies; None where no store has a place."""
        if not self.ids:
            return None
        distances = kilometres(self._places, np.radians([latitude, longitude]))
        first = int(np.argmin(distances))
        return self.ids[first], float(distances[first])


def kilometres(places: NDArray[np.float64], place: NDArray[np.float64]) -> NDArray[np.float64]:
    """The great-circle distances (haversine) from each of *places* ``(n, 2)`` to *place*, latitude and longitude in radians."""
    half = np.sin((places - place) / 2.0) ** 2
    square = half[:, 0] + np.cos(places[:, 0]) * np.cos(place[0]) * half[:, 1]
    found: NDArray[np.float64] = 2.0 * EARTH_KM * np.arcsin(np.sqrt(np.clip(square, 0.0, 1.0)))
    return found
