"""Which engine works out the features of an installation: what its settings, or the option of a command, say."""

from __future__ import annotations

from typing import get_args

import msgspec

from features.definitions.compute import Compute
from features.state.home import Home
from features.state.settings import EngineName
from features.store.duckdb_compute import DuckDBCompute


def with_engine(home: Home, engine: str | None) -> Home:
    """The home with the *engine* that a command was told to use; as its settings say where it was told nothing.

    Raises:
        ValueError: there is no such engine.
        MissingStateError: Spark cannot run here; the message names the fix.
    """
    if engine is not None:
        home = Home(home.root, msgspec.structs.replace(home.settings, engine=engine))
    if home.settings.engine not in get_args(EngineName):
        raise ValueError(f"--engine {home.settings.engine!r}: use one of {', '.join(get_args(EngineName))}")
    if is_spark(home):
        from features.store.spark_session import check_spark

        check_spark()
    return home


def is_spark(home: Home) -> bool:
    """Whether Spark works for a home."""
    return home.settings.engine == "spark"


def compute_of(home: Home) -> Compute:
    """What works out features for a home."""
    if not is_spark(home):
        return DuckDBCompute(home)
    from features.store.spark_compute import SparkCompute

    return SparkCompute(home)
