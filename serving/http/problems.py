"""What a request that cannot be answered is answered with."""

from __future__ import annotations

import msgspec


class Problem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """RFC 9457 problem details, with the field at fault."""

    title: str
    status: int
    detail: str
    type: str = "about:blank"
    field: str | None = None


class HttpProblem(Exception):
    """A request that cannot be answered, on its way to becoming a ``Problem``."""

    def __init__(self, status: int, title: str, detail: str, field: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.retry_after = retry_after
        self.problem = Problem(title=title, status=status, detail=detail, field=field)
