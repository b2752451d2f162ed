"""The segments file as pages change it: a segment is added, and everything else in it, its comments too, stays as it was written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import yaml

from features.catalogue.shop import Shop
from features.definitions.segments import SEGMENTS, Vocabulary
from features.definitions.standing import BUILT_IN
from features.state.disk import write_atomically
from features.state.home import Home

_WORD = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?<![\w.])[A-Za-z_]\w*""")
"""A text in quotes, or a name that is no field of something."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")


def add_segment(home: Home, name: str, condition: str) -> None:
    """Name a condition; the file is written whole or not at all.

    Raises:
        ValueError: the name is none, or taken; the condition or the file is wrong. The message says which, and the fix.
    """
    if not _NAME.match(name):
        raise ValueError(f"{name!r} is no name of a segment: use small letters, digits and underscores, a letter first")
    path, domain = home.root / SEGMENTS, Shop.load(home).domain
    # of two who save at once neither may undo the other
    with home.lease.hold("segments"):
        text = path.read_bytes() if path.exists() else b""
        standing = Vocabulary.parse(text, SEGMENTS, domain)
        if name in standing.names:
            raise ValueError(f"{name!r} is the name of something else already: choose another")
        standing.parse_condition(condition)
        own = {each: known.text for each, known in standing.segments.items() if BUILT_IN.get(each) != known.text}
        whole = _with(text.decode(), name, json.dumps(spelled_out(condition, own), ensure_ascii=False)).encode()
        # what is not in order is never written
        Vocabulary.parse(whole, SEGMENTS, domain)
        write_atomically(path, whole)


def spelled_out(condition: str, segments: Mapping[str, str]) -> str:
    """A condition with the conditions of *segments* in place of their names: in the file they do not name each other."""

    def instead(found: re.Match[str]) -> str:
        return f"({segments[found[0]]})" if found[0] in segments else found[0]

    return _WORD.sub(instead, condition)


def _with(text: str, name: str, condition: str) -> str:
    """The text of a file that is in order, with one segment more."""
    root = yaml.compose(text)
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    segments = next((value for key, value in entries if key.value == "segments"), None)
    whole = text if not text or text.endswith("\n") else f"{text}\n"
    if segments is None:
        if isinstance(root, yaml.MappingNode) and root.flow_style:
            raise ValueError(f"{SEGMENTS} is written in braces: add the segment by hand")
        return f"{whole}segments:\n  {name}: {condition}\n"
    if segments.flow_style:
        before, after = text[: segments.end_mark.index - 1].rstrip(), text[segments.end_mark.index - 1 :]
        comma = ", " if segments.value and not before.endswith(",") else ""
        return f"{before}{comma}{name}: {condition}{after}"
    (first, _), (_, last) = segments.value[0], segments.value[-1]
    lines = whole.splitlines(keepends=True)
    # the mark of a block text stands at the beginning of the line after it
    at = last.end_mark.line if last.end_mark.column == 0 else last.end_mark.line + 1
    return "".join([*lines[:at], f"{' ' * first.start_mark.column}{name}: {condition}\n", *lines[at:]])
