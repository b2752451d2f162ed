"""What many processes and servers cost and bring, beside one process on files: ratios of one run. ``make bench`` prints the table.

It needs the demo's state (``make demo TOUR_ONLY=1``, or UBIQUO_HOME), redis-server and PostgreSQL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bench import cpu_seconds, one_connection
from postgres import PostgresCluster, programs
from scene import ROOT, Service, command, copy_home, free_port, loyalty_cards
from servers import RedisServer

from features.state.home import Home

CONNECTIONS, QUESTIONS, SECONDS = 16, 600, 8.0
NUMBER = b"#number#"
"""Stands in an event's id for how many requests were sent before."""


@contextmanager
def serving(home: Home, workers: int = 1, **environment: str) -> Iterator[Service]:
    """A service of real processes, as ``python -m serving`` starts it."""
    port, said = free_port(), {**os.environ, "PYTHONPATH": str(ROOT), "UBIQUO_HOME": str(home.root), **environment}
    line = [sys.executable, "-W", "ignore", "-m", "serving", "--port", str(port), "--workers", str(workers)]
    with open(home.root / "bench.log", "ab") as log:
        process = subprocess.Popen(line, env=said, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    service = Service(home, port, process)
    try:
        ready = 0
        while ready < 5:
            assert process.poll() is None, (home.root / "bench.log").read_text()[-2_000:]
            with suppress(OSError):
                ready = ready + 1 if service.get("/readyz")[0] == 200 else 0
            time.sleep(0.5)
        if workers > 1:
            time.sleep(8)
        yield service
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def asked_for(port: int, path: str, bodies: Sequence[bytes], seconds: float, told: multiprocessing.Queue[tuple[int, int]]) -> None:
    """Keep many connections busy from a process of its own: bytes out, bytes in, as little of this machine's time as can be."""
    import selectors

    chosen, requests = selectors.DefaultSelector(), [_request(path, body) for body in bodies]
    for k in range(CONNECTIONS):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(anew(requests[k % len(requests)], k))
        chosen.register(connection, selectors.EVENT_READ, bytearray())
    until, answered, wrong, sent = time.monotonic() + seconds, 0, 0, CONNECTIONS
    while time.monotonic() < until:
        for key, _ in chosen.select(0.2):
            held = key.data
            held += key.fileobj.recv(262_144)  # type: ignore[union-attr]
            head, separator, body = bytes(held).partition(b"\r\n\r\n")
            if separator and len(body) >= _length(head):
                answered, wrong = answered + 1, wrong + (b" 200 " not in head[:20])
                held.clear()
                key.fileobj.sendall(anew(requests[sent % len(requests)], sent))  # type: ignore[union-attr]
                sent += 1
    told.put((answered, wrong))


def anew(request: bytes, number: int) -> bytes:
    """A request with ids of events that no request of another *number* has: a repeat would be a duplicate, which costs less to take."""
    return request.replace(NUMBER, b"%0*d" % (len(NUMBER), number))


def _request(path: str, body: bytes) -> bytes:
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (path.encode(), len(body)) + body


def _length(head: bytes) -> int:
    return next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))


def rate(service: Service, path: str, bodies: Sequence[bytes], seconds: float = SECONDS) -> float:
    """How many requests are answered a second."""
    told: multiprocessing.Queue[tuple[int, int]] = multiprocessing.Queue()
    client = multiprocessing.Process(target=asked_for, args=(service.port, path, bodies, seconds, told))
    client.start()
    answered, wrong = told.get()
    client.join()
    assert wrong <= answered // 10, f"{wrong} of {answered} answers were no answers"
    return (answered - wrong) / seconds


def cost(service: Service, path: str, bodies: Sequence[bytes]) -> tuple[float, float]:
    """The median time of an answer over one connection in ms, and what the service's processes compute for it in ms."""
    seconds: list[float] = []
    asyncio.run(one_connection(service.port, path, bodies, 100, []))
    before = cpu_seconds(service.process.pid)
    asyncio.run(one_connection(service.port, path, bodies, QUESTIONS, seconds))
    spent = (cpu_seconds(service.process.pid) - before) / QUESTIONS * 1e3
    return sorted(seconds)[len(seconds) // 2] * 1e3, spent


def batches(count: int) -> list[bytes]:
    """Requests of a hundred events each; ``anew`` makes them others each time that they are sent."""
    return [
        json.dumps({"events": [
            {"event_id": f"{uuid.uuid4().hex}-{NUMBER.decode()}", "name": "view_item", "occurred_at": "2017-12-31T12:00:00Z", "channel": "web",
             "identifiers": {"cookie": f"bench-{n % 40}-{k}"}, "items": [{"item_id": "1082185"}]} for k in range(100)
        ]}).encode() for n in range(count)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["workers", "servers"])
    only = parser.parse_args().only
    source, folder = Home.from_environment(), programs()
    assert folder is not None, "PostgreSQL is not installed"
    os.environ.setdefault("UBIQUO_CLOCK", "from:2018-01-01T05:00:00Z")
    with tempfile.TemporaryDirectory(prefix="ubiquo-many-") as scratch:
        files = copy_home(source, Path(scratch) / "files")
        asked = [json.dumps({"identifiers": {"loyalty_card": card}}).encode() for card in loyalty_cards(files)[:200]]
        if only != "servers":
            workers(files, asked)
        if only != "workers":
            servers(files, folder, Path(scratch), asked)


def workers(files: Home, asked: Sequence[bytes]) -> None:
    found = {}
    for count in (1, 2):
        with serving(files, count, UBIQUO_RATE_LIMIT="100000/second") as service:
            rate(service, "/v1/recommendations", asked, 3.0)
            found[count] = rate(service, "/v1/recommendations", asked)
    print(f"recommendations a second, {CONNECTIONS} connections: {found[1]:.0f} with one process, {found[2]:.0f} with two: "
          f"{found[2] / found[1]:.2f} times", flush=True)  # fmt: skip


def servers(files: Home, folder: Path, scratch: Path, asked: Sequence[bytes]) -> None:
    cluster, redis = PostgresCluster(folder), RedisServer(Path(tempfile.mkdtemp(dir=scratch)))
    try:
        far, url = copy_home(files, scratch / "far"), cluster.new_database()
        variables = {"UBIQUO_DATABASE": url, "UBIQUO_REDIS": f"127.0.0.1:{redis.port}", "UBIQUO_RATE_LIMIT": "100000/second"}
        began = time.monotonic()
        done = command("serving", "migrate", "--to", url, home=far.root, fresh=True)
        assert done.returncode == 0, done.stdout + done.stderr
        print(f"migration of the home: {time.monotonic() - began:.1f} s", flush=True)
        done = command("features", "materialize", home=far.root, fresh=True, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        told: dict[str, tuple[tuple[float, float], tuple[float, float], float]] = {}
        for name, home, more in (("files", files, {"UBIQUO_RATE_LIMIT": "100000/second"}), ("servers", far, variables)):
            with serving(home, **more) as service:
                lists, offers = cost(service, "/v1/recommendations", asked), cost(service, "/v1/next-best-offer", asked)
                events = rate(service, "/v1/events", batches(600)) * 100
            told[name] = lists, offers, events
            print(f"{name}: recommendations p50 {lists[0]:.2f} ms, CPU {lists[1]:.2f} ms; offers p50 {offers[0]:.2f} ms, CPU {offers[1]:.2f} "
                  f"ms; {events:.0f} events a second acknowledged, on the disk", flush=True)  # fmt: skip
        near, far_ = told["files"], told["servers"]
        for k, what in enumerate(("recommendations", "offers")):
            print(
                f"{what}: PostgreSQL and Redis cost {far_[k][0] / near[k][0]:.2f} times the time, {far_[k][1] / near[k][1]:.2f} times the CPU"
            )  # type: ignore[index]
        print(f"intake: PostgreSQL takes {far_[2] / near[2]:.2f} times what SQLite takes")
    finally:
        redis.stop()
        cluster.stop()


if __name__ == "__main__":
    main()
