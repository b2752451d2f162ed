"""Speed as ratios: each route beside the bare HTTP floor of this machine, in one run. ``make bench`` prints the table.

It needs the demo's state: run ``make demo TOUR_ONLY=1`` first (or set UBIQUO_HOME to another trained home).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from scene import NEW_YEAR, ROOT, free_port, loyalty_cards, start_service, stop_service

from features.state.home import Home
from training.bootstrap import open_registry

FLOOR = """
import json
BODY = json.dumps({"items": [{"item_id": str(k), "score": 0.5, "reason": "popular now"} for k in range(10)]}).encode()
HEAD = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
async def app(scope, receive, send):
    if scope["type"] == "http":
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": HEAD})
        await send({"type": "http.response.body", "body": BODY})
"""

POLICY = b"""
control_group: {share: 0.05, salt: bench}
contact:
  caps: [{most: 500, per: day}, {most: 900, per: week, channels: [email, push, mail]}, {most: 500, per: month, each: offer}]
  quiet_hours: {from: "03:00", to: "04:00", channels: [sms]}
"""
"""Caps that nobody reaches: what they cost, not what they refuse."""


async def one_connection(port: int, path: str, bodies: Sequence[bytes], count: int, seconds: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for k in range(count):
        body = bodies[k % len(bodies)]
        started = time.perf_counter()
        writer.write(
            b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (path.encode(), len(body), body)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(length)
        seconds.append(time.perf_counter() - started)
    writer.close()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def cpu_seconds(pid: int) -> float:
    """What a process and its children have computed so far."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return float(sum(times.user + times.system for times in (process.cpu_times() for process in family)))


async def measure(port: int, path: str, bodies: Sequence[bytes], count: int, pid: int) -> tuple[float, float, float, float]:
    """p50 and p99 in ms over one connection, the server's CPU ms a request, and requests a second over 16."""
    alone: list[float] = []
    await one_connection(port, path, bodies, 200, [])
    before = cpu_seconds(pid)
    await one_connection(port, path, bodies, count, alone)
    spent = (cpu_seconds(pid) - before) / count * 1e3
    together: list[float] = []
    started = time.perf_counter()
    await asyncio.gather(*(one_connection(port, path, bodies[k:] + bodies[:k], count // 8, together) for k in range(16)))
    rate = len(together) / (time.perf_counter() - started)
    alone.sort()
    return alone[len(alone) // 2] * 1e3, alone[int(len(alone) * 0.99)] * 1e3, spent, rate


def some_items(home: Home) -> list[str]:
    """Items that the champion knows, as many are asked about as are bought: the popular ones more often."""
    loaded = open_registry(home).load("recommendations@champion").model
    order = loaded.shelf.by_popularity[:2000]
    return [loaded.shelf.ids[place] for place in order[::10]]


def main() -> None:
    home = Home.from_environment()
    who: list[dict[str, Any]] = [{"identifiers": {"loyalty_card": card}} for card in loyalty_cards(home)[:400]]
    items = some_items(home)
    routes = {
        "/v1/recommendations (for you)": ("/v1/recommendations", [json.dumps(w).encode() for w in who]),
        "/v1/recommendations (also like)": ("/v1/recommendations", [json.dumps({**w, "listing": "also_like"}).encode() for w in who]),
        "/v1/next-best-offer": ("/v1/next-best-offer", [json.dumps(w).encode() for w in who]),
        "/v1/churn": ("/v1/churn", [json.dumps(w).encode() for w in who]),
        "/v1/similar-items": ("/v1/similar-items", [json.dumps({"item_id": item}).encode() for item in items]),
    }
    port = free_port()
    folder = home.root / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "floor.py").write_text(FLOOR)
    floor = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "floor:app", "--port", str(port), "--no-access-log", "--log-level", "error"], cwd=folder
    )
    by_mail = [json.dumps({**w, "channel": "mail"}).encode() for w in who]
    governed = {"/v1/next-best-offer by mail, as the policy allows": ("/v1/next-best-offer", by_mail)}
    policy = home.root / "policy.yaml"
    standing = policy.read_bytes() if policy.exists() else None
    try:
        while not listens(port):
            time.sleep(0.05)
        base = asyncio.run(measure(port, "/", [b"{}"], 20_000, floor.pid))
        print("| route | CPU ms a request | p50 ms | p99 ms | requests/s | times the floor's CPU | share of the floor's rate |")
        print("|---|---|---|---|---|---|---|")
        print(f"| bare uvicorn, the same kind of answer | {base[2]:.2f} | {base[0]:.2f} | {base[1]:.2f} | {base[3]:.0f} | 1 | 1 |")
        policy.unlink(missing_ok=True)
        memory = told(home, {**routes, "/v1/next-best-offer by mail": ("/v1/next-best-offer", by_mail)}, base)
        policy.write_bytes(POLICY)
        told(home, governed, base)
        print(f"\nMemory of the service (all its processes): {memory / 1e6:.0f} MB")
    finally:
        floor.terminate()
        policy.unlink(missing_ok=True)
        if standing is not None:
            policy.write_bytes(standing)


def told(home: Home, routes: Mapping[str, tuple[str, Sequence[bytes]]], base: Sequence[float]) -> int:
    """Print a line a route, and return how much memory the service held."""
    service = start_service(home, UBIQUO_CLOCK=f"from:{NEW_YEAR.isoformat()}", UBIQUO_RATE_LIMIT="1000000/second")
    try:
        for name, (path, bodies) in routes.items():
            p50, p99, cpu, rate = asyncio.run(measure(service.port, path, bodies, 2000, service.process.pid))
            print(f"| {name} | {cpu:.2f} | {p50:.2f} | {p99:.2f} | {rate:.0f} | {cpu / base[2]:.1f} | {rate / base[3]:.3f} |", flush=True)
        family = [psutil.Process(service.process.pid), *psutil.Process(service.process.pid).children(recursive=True)]
        return sum(p.memory_info().rss for p in family)
    finally:
        stop_service(service)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    os.chdir(ROOT)
    main()
