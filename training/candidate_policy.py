"""A policy that somebody thinks of, as a file of chances, beside the decisions that were logged."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import pyarrow as pa

from training.off_policy import Evidence, NotJudgeableError

Reward = Literal["shown", "clicked", "accepted", "redeemed", "bought"]
REWARDS: tuple[Reward, ...] = get_args(Reward)
COLUMNS = ("decision_id", "place", "probability")
MODEL_COLUMNS = ("q_logged", "q_target")
_LOGGED = ["decision_id", "kind", "customer_id", "held_out", "closed", "place", "propensity"]
_NUMBER = "file row"


class Weighed(NamedTuple):
    """The decisions that a policy can be judged by, one a row.

    Attributes:
        evidence: propensities and probabilities are products over a decision's places, the reward and what a model foretold are sums.
        kinds: of which kinds the decisions are.
        left_out: how many decisions do not count, by the reason.
    """

    evidence: Evidence
    kinds: tuple[str, ...]
    left_out: dict[str, int]


def read_candidate(path: Path) -> pd.DataFrame:
    """Read and check a policy's file: Parquet or CSV.

    Columns: ``decision_id, place`` (from 1), ``probability``, and both or neither of ``q_logged, q_target``. ``probability`` is the
    chance that the policy chooses for this place what was logged there, given what stands in the places above.

    Returns:
        one row a place, with the number of its row in the file, from 1.

    Raises:
        ValueError: the file cannot be read so; the message names the row and the column.
    """
    if path.suffix == ".parquet":
        frame = pd.read_parquet(path)
    elif path.suffix == ".csv":
        frame = pd.read_csv(path, dtype={"decision_id": str})
    else:
        raise ValueError(f"{path}: give a .parquet or a .csv file")
    told = [name for name in MODEL_COLUMNS if name in frame]
    if missing := [name for name in COLUMNS if name not in frame]:
        raise ValueError(
            f"{path.name}: no column {', '.join(missing)}: give {', '.join(COLUMNS)}, and {' and '.join(MODEL_COLUMNS)} if known"
        )
    if len(told) == 1:
        raise ValueError(f"{path.name}: {told[0]} alone: {' and '.join(MODEL_COLUMNS)} go together")
    frame = frame[[*COLUMNS, *told]].reset_index(drop=True)
    frame.insert(0, _NUMBER, np.arange(1, len(frame) + 1))
    _refuse(path, frame, "decision_id", frame["decision_id"].isna(), "is empty")
    frame["decision_id"] = frame["decision_id"].astype(str)
    for name in ("place", "probability", *told):
        numbers = pd.to_numeric(frame[name], errors="coerce").astype(float)
        _refuse(path, frame, name, ~np.isfinite(numbers), "is no finite number")
        frame[name] = numbers
    _refuse(path, frame, "place", (frame["place"] < 1) | (frame["place"] % 1 != 0), "is no place: count from 1")
    _refuse(path, frame, "probability", ~frame["probability"].between(0, 1), "is not in [0, 1]")
    _refuse(path, frame, "place", frame.duplicated(["decision_id", "place"]), "was told of this decision before")
    return frame.astype({"place": int})


def weigh(rows: pa.Table, candidate: pd.DataFrame, reward: Reward) -> Weighed:
    """The decisions of ``training.decisions.joined`` that *candidate* (see ``read_candidate``) tells of, as evidence.

    A decision counts if all the time for its outcome has passed, it was not held out, something in it was drawn (a propensity below
    1), and the file names every place that was drawn. A place that was not drawn and is not named is the same under both policies.

    Raises:
        ValueError: the file names a place that its decision does not have.
        NotJudgeableError: no decision counts, or the policy does otherwise in a place where the logged one had no choice.
    """
    logged = rows.select([*_LOGGED, reward]).to_pandas()
    known = candidate["decision_id"].isin(logged["decision_id"])
    both = logged.merge(candidate, on=["decision_id", "place"], how="outer", indicator="found")
    strange = both[(both["found"] == "right_only") & both["decision_id"].isin(logged["decision_id"])]
    if len(strange):
        first = strange.sort_values(_NUMBER).iloc[0]
        raise ValueError(f"row {first[_NUMBER]:.0f}: decision {first['decision_id']} has no place {first['place']}")
    kinds = logged.loc[logged["decision_id"].isin(candidate["decision_id"]), "kind"].unique()
    both = both[(both["found"] != "right_only") & both["kind"].isin(kinds)]
    named, drawn = both["found"] == "both", both["propensity"] < 1
    decisions = pd.DataFrame(
        {
            "held out": both["held_out"].astype(bool),
            f"not closed: what is {reward} in time may yet come": ~both["closed"].astype(bool),
            "logged without a propensity": both["propensity"].isna(),
            "nothing was drawn": ~drawn.groupby(both["decision_id"]).transform("any"),
            "not in the file, or not every place that was drawn": ~named.groupby(both["decision_id"]).transform("any") | (drawn & ~named),
        }
    )
    left_out = {"not in the log": int(candidate.loc[~known, "decision_id"].nunique())}
    for why in decisions.columns:
        out = decisions[why].groupby(both["decision_id"]).transform("any")
        left_out[why] = int(both.loc[out, "decision_id"].nunique())
        both, decisions = both[~out], decisions[~out]
    left_out = {why: count for why, count in left_out.items() if count}
    if both.empty:
        because = "; ".join(f"{count} {why}" for why, count in left_out.items()) or "the file is empty"
        hint = ": ask with explore: true, so that there is something to judge by" if "nothing was drawn" in left_out else ""
        raise NotJudgeableError(f"there is no decision to judge by ({because}){hint}")
    return Weighed(_evidence(both, reward), tuple(sorted(kinds)), left_out)


def _evidence(places: pd.DataFrame, reward: Reward) -> Evidence:
    """One row a decision: chances multiply over its places, rewards add up."""
    otherwise = places[(places["propensity"] == 1) & ~np.isclose(places["probability"].fillna(1.0), 1.0)]
    if len(otherwise):
        first = otherwise.sort_values(_NUMBER).iloc[0]
        raise NotJudgeableError(
            f"row {first[_NUMBER]:.0f}: place {first['place']} of decision {first['decision_id']} was not drawn (propensity 1), and the "
            f"policy takes what stands there with probability {first['probability']:g} only: the log holds nothing of what else it does "
            f"({len(otherwise)} such rows)"
        )
    places = places.assign(
        probability=places["probability"].fillna(1.0),
        reward=places[reward].astype(float),
        # whoever asked without a customer is nobody else
        whose=places["customer_id"].fillna("decision:" + places["decision_id"]),
    )
    grouped = places.groupby("decision_id", sort=True)
    told = [grouped[name].sum().to_numpy() for name in MODEL_COLUMNS if name in places]
    return Evidence(
        grouped["whose"].first().tolist(),
        grouped["propensity"].prod().to_numpy(),
        grouped["probability"].prod().to_numpy(),
        grouped["reward"].sum().to_numpy(),
        *told,
    )


def _refuse(path: Path, frame: pd.DataFrame, column: str, wrong: pd.Series, why: str) -> None:
    if wrong.any():
        first = frame[wrong].iloc[0]
        raise ValueError(f"{path.name}, row {first[_NUMBER]}: {column} {first[column]} {why} ({int(wrong.sum())} such rows)")
