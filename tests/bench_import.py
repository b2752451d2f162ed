"""The mapped import at one and at ten million rows: is its time linear and its memory bounded? ``make bench`` prints the table.

The rows are invented: orders of about four lines over three years, from 200,000 customers and 50,000 items, a tenth anonymous.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import yaml
from scene import ROOT, surroundings

MAPPING = {
    "source": "bench", "shop": {"name": "bench", "timezone": "Europe/Paris", "currency": "EUR"},
    "consent": {"basis": "invented", "purposes": ["analytics", "personalization"]},
    "event": {
        "id": "order_id", "name": {"value": "purchase"}, "identifiers": {"user_id": "customer"},
        "occurred_at": {"column": "at", "format": "%Y-%m-%d %H:%M:%S", "timezone": "Europe/Paris"},
    },
    "item": {"id": "sku", "quantity": {"column": "qty"}, "amount": {"column": "price", "per": "unit"}},
}  # fmt: skip
SIZES = tuple(int(size) for size in os.environ.get("ROWS", "1000000 10000000").split())


def write_rows(path: Path, rows: int) -> None:
    """Each order's lines lie together, as an export has them, but orders in no order of time."""
    query = f"""
        SELECT k // 4 AS order_id,
               strftime(TIMESTAMP '2021-01-01' + INTERVAL (hash(k // 4) % 94000000) SECOND, '%Y-%m-%d %H:%M:%S') AS at,
               'sku-' || hash(k) % 50000 AS sku, 1 + hash(k + 1) % 5 AS qty, (100 + hash(k + 2) % 9900) / 100.0 AS price,
               CASE WHEN hash(k // 4 + 7) % 10 > 0 THEN hash(k // 4) % 200000 END AS customer
        FROM range({rows}) AS rows(k)"""
    duckdb.connect().execute(f"COPY ({query}) TO '{path}' (HEADER)").fetchall()


def peak_children_mb() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    base = 0.0
    print("| rows | seconds | rows a second | times the time of 1M | peak memory MB | events |\n|---|---|---|---|---|---|")
    for rows in SIZES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_rows(folder / "rows.csv", rows)
            (folder / "mapping.yaml").write_text(yaml.safe_dump(MAPPING))
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "features",
                "import",
                str(folder / "rows.csv"),
                "--mapping",
                str(folder / "mapping.yaml"),
            ]
            started = time.perf_counter()
            done = subprocess.run(
                command, cwd=ROOT, env={**surroundings(), "UBIQUO_HOME": str(folder / "home")}, capture_output=True, text=True
            )
            seconds = time.perf_counter() - started
            assert done.returncode == 0, done.stdout + done.stderr
            base = base or seconds
            stored = next(word for word in done.stdout.split("bench:")[-1].split() if word.isdigit())
            print(
                f"| {rows:,} | {seconds:.0f} | {rows / seconds:,.0f} | {seconds / base:.1f} | {peak_children_mb():.0f} | {stored} |",
                flush=True,
            )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    os.chdir(ROOT)
    main()
