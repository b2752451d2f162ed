"""The tables of every lasting database on a server, revision by revision; SQLite's are made by the code that uses them.

A change of a table that has been released is a new file in ``versions``, and its revision stands last in ``REVISIONS``.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
REVISIONS = ("r0001", "r0002")
"""Every revision that this code knows, the newest last."""
HEAD = REVISIONS[-1]
