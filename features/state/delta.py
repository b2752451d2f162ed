"""deltalake, with an allocator that gives memory back: the names that the tables need of it.

The library brings a jemalloc of its own, whose arenas keep what they have freed until something else is asked of the same arena. A
service that compacts its tables grew by a hundred megabytes in some minutes and stayed there. It reads its settings once, when it
is loaded.
"""

from __future__ import annotations

import os

os.environ.setdefault("_RJEM_MALLOC_CONF", "narenas:1,dirty_decay_ms:0,muzzy_decay_ms:0")

from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, WriterProperties, write_deltalake
from deltalake.exceptions import DeltaError

HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
"""What deltalake is to leave to us after a commit."""
__all__ = [
    "HOOKS",
    "CommitProperties",
    "DeltaError",
    "DeltaTable",
    "PostCommitHookProperties",
    "WriterProperties",
    "write_deltalake",
]
