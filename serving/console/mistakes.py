"""What is wrong with what was typed into a form."""

from __future__ import annotations


class Mistakes(dict[str, str]):
    """By field what is wrong with it; the empty text for a field with which nothing is."""

    def __missing__(self, field: str) -> str:
        """Nothing is wrong with it."""
        return ""
