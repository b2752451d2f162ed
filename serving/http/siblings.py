"""The metrics of every process of one service: whichever of them is asked tells those of all, each with its process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

TELL_SECONDS = 2.0
"""How old the metrics of another process may be."""
FORGET_SECONDS = 30.0
"""How long the last word of a process that tells nothing more is repeated."""


class Siblings:
    """Tells the metrics of this process and of those beside it; where there are none, its own as they are.

    Args:
        registry: of this process.
        folder: where each process puts its own; '' where it is alone.
    """

    def __init__(self, registry: CollectorRegistry, folder: str) -> None:
        self._registry, self._folder = registry, Path(folder) if folder else None
        self._stop = threading.Event()
        if self._folder is not None:
            threading.Thread(target=self._tell, name="ubiquo-metrics", daemon=True).start()

    def told(self) -> bytes:
        """All of them, in Prometheus's text format."""
        if self._folder is None:
            return generate_latest(self._registry)
        texts = {str(os.getpid()): generate_latest(self._registry).decode()}
        for path in self._folder.glob("*.prom"):
            try:
                is_young = time.time() - path.stat().st_mtime < FORGET_SECONDS
                if is_young:
                    texts.setdefault(path.stem, path.read_text())
            except OSError:
                # it has just ended
                continue
        together = CollectorRegistry(auto_describe=False)
        together.register(_Merged(texts))
        return generate_latest(together)

    def close(self) -> None:
        """Tell nothing more."""
        self._stop.set()

    def _tell(self) -> None:
        assert self._folder is not None
        own = self._folder / f"{os.getpid()}.prom"
        while not self._stop.wait(TELL_SECONDS):
            part = own.with_suffix(".part")
            try:
                part.write_bytes(generate_latest(self._registry))
                part.replace(own)
            except FileNotFoundError:
                # whoever started this process has gone, and its folder with it
                return
            except OSError:
                # a full disk: there may be room the next time
                part.unlink(missing_ok=True)


class _Merged(Collector):
    """The metrics of several processes, each sample with the number of its process as ``worker``."""

    def __init__(self, texts: dict[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        """Every metric, with the samples of all processes."""
        found: dict[str, Metric] = {}
        for worker, text in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text):
                merged = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.add_sample(sample.name, {**sample.labels, "worker": worker}, sample.value)
        return found.values()
