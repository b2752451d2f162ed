"""The array loops of a request that NumPy cannot do without walking the catalogue; compiled once, kept beside the code."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Places = NDArray[np.int32]


@njit(cache=True, nogil=True)
def _spread(
    offsets: Any, targets: Any, weights: Any, sources: Any, strengths: Any, marks: Any, touched: Any, sums: Any
) -> Any:  # pragma: no cover - compiled
    # indices without a sign: with one each is asked whether it counts from the end
    found, one, two = np.uintp(0), np.uintp(1), np.uintp(2)
    for k in range(len(sources)):
        source, first, second = np.uintp(sources[k]), strengths[0, k], strengths[1, k]
        at, end = np.uintp(offsets[source]), np.uintp(offsets[source + one])
        while at < end:
            target, weight = np.uintp(targets[at]), weights[at]
            at += one
            if marks[target] == 0:
                marks[target] = 1
                touched[found] = target
                found += one
            sums[two * target] += first * weight
            sums[two * target + one] += second * weight
    return found


@njit(cache=True, nogil=True)
def _take(marks: Any, sums: Any, touched: Any, out: Any) -> None:  # pragma: no cover - compiled
    for k in range(len(touched)):
        place = touched[k]
        marks[place] = 0
        out[0, k], out[1, k] = sums[2 * place], sums[2 * place + 1]
        sums[2 * place] = 0.0
        sums[2 * place + 1] = 0.0


@njit(cache=True, nogil=True)
def _look_up(touched: Any, sums: Any, places: Any, slots: Any, out: Any) -> None:  # pragma: no cover - compiled
    for slot in range(len(touched)):
        slots[touched[slot]] = slot
    for k in range(len(places)):
        slot = slots[places[k]]
        for kind in range(sums.shape[0]):
            out[kind, k] = sums[kind, slot] if slot >= 0 else 0.0
    for slot in range(len(touched)):
        slots[touched[slot]] = -1


@njit(cache=True, nogil=True)
def _blank(touched: Any, sums: Any, places: Any, slots: Any) -> None:  # pragma: no cover - compiled
    for slot in range(len(touched)):
        slots[touched[slot]] = slot
    for k in range(len(places)):
        slot = slots[places[k]]
        if slot >= 0:
            for kind in range(sums.shape[0]):
                sums[kind, slot] = 0.0
    for slot in range(len(touched)):
        slots[touched[slot]] = -1


@njit(cache=True, nogil=True)
def _strongest(values: Any, places: Any, limit: Any, heap: Any) -> Any:  # pragma: no cover - compiled
    """A heap of the *limit* greatest positive values, the least on top; of equals the earlier place is greater."""
    size = 0
    for k in range(len(values)):
        value = values[k]
        if value <= 0.0:
            continue
        if size == limit:
            top = heap[0]
            if value < values[top] or (value == values[top] and places[k] > places[top]):
                continue
            at = 0
            while True:
                child = 2 * at + 1
                if child >= size:
                    break
                right = child + 1
                if right < size:
                    one, other = heap[right], heap[child]
                    if values[one] < values[other] or (values[one] == values[other] and places[one] > places[other]):
                        child = right
                one = heap[child]
                if values[one] > value or (values[one] == value and places[one] < places[k]):
                    break
                heap[at] = one
                at = child
            heap[at] = k
        else:
            at = size
            size += 1
            while at > 0:
                parent = (at - 1) // 2
                one = heap[parent]
                if values[one] < value or (values[one] == value and places[one] > places[k]):
                    break
                heap[at] = one
                at = parent
            heap[at] = k
    return size


@njit(cache=True, nogil=True)
def _affinities(codes: Any, shares: Any, widths: Any, held: Any, weights: Any, places: Any, out: Any) -> None:  # pragma: no cover
    total = 0.0
    for k in range(len(held)):
        total += weights[k]
    for name in range(codes.shape[0]):
        mass = np.zeros(widths[name], np.float32)
        for k in range(len(held)):
            code = codes[name, held[k]]
            if code >= 0:
                mass[code] += weights[k]
        for k in range(len(places)):
            code = codes[name, places[k]]
            out[k, name] = mass[code] / total * shares[name, places[k]] if code >= 0 and total > 0.0 else 0.0


@njit(cache=True, nogil=True)
def _loudest(
    offsets: Any, sources: Any, weights: Any, mine: Any, strengths: Any, places: Any, slots: Any, out: Any
) -> None:  # pragma: no cover - compiled
    for k in range(len(mine)):
        slots[mine[k]] = k
    for n in range(len(places)):
        best, loudest = 0.0, -1
        for at in range(offsets[places[n]], offsets[places[n] + 1]):
            slot = slots[sources[at]]
            if slot >= 0 and strengths[slot] * weights[at] > best:
                best, loudest = strengths[slot] * weights[at], slot
        out[n] = loudest
    for k in range(len(mine)):
        slots[mine[k]] = -1


class _Room:
    """Arrays as long as the catalogue, made once a thread."""

    def __init__(self, size: int) -> None:
        self.marks, self.sums = np.zeros(size, np.uint8), np.zeros(2 * size, np.float32)
        self.slots, self.touched = np.full(size, -1, np.int32), np.empty(size, np.int32)


class Bench:
    """Room to work in, one a thread, for catalogues of at most *size* items; left clean after each call."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._own = threading.local()

    def spread(self, offsets: Any, targets: Any, weights: Any, sources: Places, strengths: Floats) -> tuple[Places, Floats]:
        """What *sources* say of their targets: the places that they reach, and for each row of *strengths* the weighted sums.

        Costs as much as the sources have targets.

        Args:
            offsets, targets, weights: a sparse matrix, sources by targets.
            strengths: ``(1 or 2, sources)``.

        Returns:
            ``(reached,)`` and ``(2, reached)``; of one row of strengths the same twice.
        """
        room = self._room()
        if len(strengths) == 1:
            strengths = np.concatenate([strengths, strengths])
        found = _spread(offsets, targets, weights, sources, strengths, room.marks, room.touched, room.sums)
        places: Places = room.touched[:found].copy()
        said = np.empty((2, len(places)), np.float32)
        _take(room.marks, room.sums, places, said)
        return places, said

    def look_up(self, touched: Places, sums: Floats, places: Places) -> Floats:
        """The sums at *places*, zero where nothing reached: ``(kinds, places)``."""
        out = np.empty((len(sums), len(places)), np.float32)
        _look_up(touched, sums, places, self._room().slots, out)
        return out

    def loudest(self, offsets: Any, sources: Any, weights: Any, mine: Places, strengths: Floats, places: Places) -> NDArray[np.intp]:
        """Which of *mine* (its index) says most for each of *places*; -1 where none speaks for it.

        Args:
            offsets, sources, weights: a sparse matrix, targets by sources.
        """
        out = np.empty(len(places), np.intp)
        _loudest(offsets, sources, weights, mine, strengths, places, self._room().slots, out)
        return out

    def without(self, touched: Places, sums: Floats, places: Places) -> Floats:
        """The sums with zero at *places*."""
        left = sums.copy()
        _blank(touched, left, places, self._room().slots)
        return left

    def _room(self) -> _Room:
        if not hasattr(self._own, "room"):
            self._own.room = _Room(self._size)
        room: _Room = self._own.room
        return room


def strongest(values: Floats, places: Places, limit: int) -> NDArray[np.intp]:
    """The indices of the *limit* greatest positive values, greatest first; of equals the earlier place goes first."""
    heap = np.empty(max(limit, 1), np.intp)
    size = _strongest(values, places, limit, heap) if limit > 0 else 0
    picks = heap[:size]
    return picks[np.lexsort((places[picks], -values[picks]))]


def affinities(codes: Places, shares: Floats, widths: Any, held: Places, weights: Floats, places: Places) -> Floats:
    """How much of what a customer holds shares each attribute with the items at *places*, times the item's share of that value.

    Args:
        codes: ``(attributes, items)``, -1 for unknown.
        shares: ``(attributes, items)``, each item's share of the sales of all that have its value.
        widths: how many values each attribute has.

    Returns:
        ``(places, attributes)``.
    """
    out = np.empty((len(places), len(codes)), np.float32)
    _affinities(codes, shares, widths, held, weights, places, out)
    return out
