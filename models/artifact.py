"""How a model lies on disk: a folder of plain files, a manifest with a checksum of each, no pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1


class DamagedArtifactError(ValueError):
    """A model's files are not those that were saved; the message names the file."""


def seal(folder: Path, kind: str) -> None:
    """Write the manifest of a finished folder."""
    sums = {p.name: _digest(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != "manifest.json"}
    manifest = {"format": FORMAT_VERSION, "kind": kind, "files": sums}
    (folder / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def verify(folder: Path, kind: str) -> None:
    """Check a folder against its manifest.

    Raises:
        DamagedArtifactError: it is of another kind or format, or a file is missing or altered.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise DamagedArtifactError(f"{path} is missing: register the model again (python -m training)")
    manifest: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    if manifest["format"] != FORMAT_VERSION or manifest["kind"] != kind:
        raise DamagedArtifactError(f"{path} is of a {manifest['kind']} model, format {manifest['format']}; {kind} was asked for")
    for name, digest in manifest["files"].items():
        if not (folder / name).exists() or _digest(folder / name) != digest:
            raise DamagedArtifactError(f"{folder / name} is missing or altered: register the model again (python -m training)")


def write_ids(path: Path, ids: Sequence[str]) -> None:
    """Write an id map: position to id."""
    path.write_bytes(msgspec.json.encode(list(ids)))


def read_ids(path: Path) -> list[str]:
    """Read an id map."""
    return msgspec.json.decode(path.read_bytes(), type=list[str])


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write plain arrays as npz."""
    np.savez(path, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read an npz file; objects in it are refused."""
    with np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def _digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
