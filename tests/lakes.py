"""A bucket of an S3 server for tests, and a look at everything in it that is not ours."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import boto3


def lake_environment(url: str) -> dict[str, str]:
    """What deltalake is to read of where the store is."""
    keys = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}
    return {**keys, "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}


@dataclass(frozen=True)
class Lake:
    """One bucket, looked at by another client than ours."""

    url: str
    bucket: str

    @classmethod
    def made(cls, url: str) -> Lake:
        made = cls(url, f"shop-{uuid.uuid4().hex[:12]}")
        made._client.create_bucket(Bucket=made.bucket)
        return made

    @property
    def address(self) -> str:
        """What ``UBIQUO_LAKE`` is to say."""
        return f"s3://{self.bucket}/ubiquo"

    @property
    def _client(self) -> Any:
        keys = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.url, **keys)

    def names(self) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return [each["Key"] for page in pages for each in page.get("Contents", [])]

    def get(self, name: str) -> bytes:
        content: bytes = self._client.get_object(Bucket=self.bucket, Key=name)["Body"].read()
        return content

    def put(self, name: str, content: bytes) -> None:
        self._client.put_object(Bucket=self.bucket, Key=name, Body=content)

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=self.bucket, Key=name)

    def content(self) -> dict[str, bytes]:
        """Every object, by its name."""
        return {name: self.get(name) for name in self.names()}


class Gate:
    """What stands between us and a store, and can be shut, or lose an answer, or hold a request up."""

    def __init__(self, upstream: str) -> None:
        self._to = ("127.0.0.1", int(upstream.rpartition(":")[2]))
        self.shut = False
        self.deaf: Callable[[bytes], bool] = lambda request: False
        """Whether the answer to a request, which the store gets, is lost."""
        self.meets: Callable[[bytes], None] = lambda request: None
        """Called with each request before the store gets it."""
        self.changed: Callable[[bytes], bytes] = lambda request: request
        """What the store gets in place of a request."""
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._door.getsockname()[1]}"
        threading.Thread(target=self._open, daemon=True).start()

    def _open(self) -> None:
        while True:
            try:
                client, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._to) as store:
            lost = threading.Event()
            threading.Thread(target=self._answer, args=(client, store, lost), daemon=True).start()
            while (request := client.recv(1_000_000)) and not self.shut:
                self.meets(request)
                if self.deaf(request):
                    lost.set()
                store.sendall(self.changed(request))

    @staticmethod
    def _answer(client: socket.socket, store: socket.socket, lost: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while (answer := store.recv(1_000_000)) and not lost.is_set():
                client.sendall(answer)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._door.close()


def await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until something listens on *port*."""
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "it has ended"
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")
