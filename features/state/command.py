"""How every command ends: what its user can fix in one line and exit code 1, anything else in a traceback."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from features.state.disk import DamagedStateError
from features.state.home import configure_process
from features.state.ports import LeaseTakenError, MissingStateError, MovedOnError

EngineOption = Annotated[
    str | None, typer.Option("--engine", help="What computes it: duckdb, or spark on many machines; default: UBIQUO_ENGINE, or duckdb.")
]


def run(app: Callable[[], object], console: Console, *mendable: type[Exception]) -> None:
    """Run *app*; besides missing state and wrong values, errors of *mendable* kinds are told without a traceback."""
    own = MissingStateError, DamagedStateError, LeaseTakenError, MovedOnError
    told: tuple[type[Exception], ...] = (*own, ValueError, OSError, *mendable)
    configure_process()
    warnings.filterwarnings("ignore")
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        app()
    except told as error:
        # its words may hold brackets, which are no markup
        console.print(Text.assemble(("error:", "red"), f" {error}"), soft_wrap=True, highlight=False)
        sys.exit(1)
