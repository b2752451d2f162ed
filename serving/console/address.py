"""Where the console is, and what the gate before it and its pages tell each other."""

from __future__ import annotations

ROOT = "/console"
SIGN_IN = f"{ROOT}/sign-in"
STATIC = f"{ROOT}/static/"
COOKIE = "ubiquo_key"
"""The cookie that keeps a reader's API key."""
READER = "ubiquo.reader"
"""Where in an ASGI scope the key of whoever looks at the console stands; None where nobody has signed in."""


def is_console(path: str) -> bool:
    """Whether it is an address of the console."""
    return path == ROOT or path.startswith(f"{ROOT}/")
