"""The one Spark session of a process: where it runs, and what it is told."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from features.state.file_lease import Scratch
from features.state.home import Home
from features.state.ports import MissingStateError
from features.store.duckdb_compute import SPILL, clear_spills

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOCAL = "local[2]"
"""Where Spark runs if nobody says: in this process's machine, two tasks at a time."""
LOCAL_PARTITIONS = 8
"""Into how many parts a join or sort is divided there; Adaptive Query Execution makes them fewer where they are small."""
ROOT = Path(__file__).resolve().parent.parent.parent
_scratches: list[Scratch] = []


def check_spark() -> None:
    """See that Spark can run here.

    Raises:
        MissingStateError: the package or Java is not there; the message names the fix.
    """
    if importlib.util.find_spec("pyspark") is None:
        raise MissingStateError("Spark is not installed: pip install 'ubiquo[spark]', or leave --engine spark out")
    # spark-submit has started Java already
    if "PYSPARK_GATEWAY_PORT" not in os.environ and java() is None:
        raise MissingStateError("Spark needs Java 17 or later: install it (apt-get install openjdk-17-jre-headless) or set JAVA_HOME")


def java() -> str | None:
    """The Java that Spark would start."""
    home = os.environ.get("JAVA_HOME")
    return shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")


def open_session(home: Home) -> SparkSession:
    """The session of this process, started where there is none yet.

    It runs at the master that ``SPARK_MASTER``, spark-submit or ``spark-defaults.conf`` names; else in this machine, where what it writes
    to the disk lies in the home until the process ends.
    """
    check_spark()
    from pyspark.sql import SparkSession

    if (running := SparkSession.getActiveSession()) is not None:
        return running
    builder = SparkSession.builder.appName("ubiquo")
    told: dict[str, bool | float | int | str | None] = {
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        # times are microseconds in UTC, as DuckDB and Arrow have them
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
        "spark.sql.caseSensitive": "true",
        "spark.ui.showConsoleProgress": "false",
        # as features are many, plans are long; nobody reads the texts that Spark makes of each
        "spark.sql.maxPlanStringLength": "1000",
    }
    if home.settings.spark_master:
        builder = builder.master(home.settings.spark_master)
    if home.settings.spark_master.startswith("local") or (not home.settings.spark_master and not _has_master()):
        clear_spills(home)
        _scratches.append(Scratch(home.root, SPILL))
        # else the workers would be of whatever Python comes first
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        told |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.executorEnv.PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "spark.local.dir": str(_scratches[-1].folder),
            "spark.sql.warehouse.dir": str(_scratches[-1].folder / "warehouse"),
            "spark.sql.shuffle.partitions": f"{LOCAL_PARTITIONS}",
            "spark.default.parallelism": f"{LOCAL_PARTITIONS}",
        }
        if not home.settings.spark_master:
            builder = builder.master(LOCAL)
    session = builder.config(map=told).getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return session


def _has_master() -> bool:
    """Whether spark-submit or Spark's own file of defaults says where to run."""
    if "PYSPARK_GATEWAY_PORT" in os.environ or "--master" in os.environ.get("PYSPARK_SUBMIT_ARGS", ""):
        return True
    folder = os.environ.get("SPARK_CONF_DIR") or os.path.join(os.environ.get("SPARK_HOME", ""), "conf")
    defaults = Path(folder) / "spark-defaults.conf"
    return defaults.is_file() and any(line.split()[:1] == ["spark.master"] for line in defaults.read_text().splitlines())
