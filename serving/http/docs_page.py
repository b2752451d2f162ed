"""The description of the HTTP surface as a page to read: made here, from the OpenAPI document, without a script or another host."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment

HOST = "localhost:3000"
"""Where the commands of the page ask: whoever reads it elsewhere knows where that is."""
TEMPLATE = Path(__file__).with_name("docs.html.j2")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto; max-width: 72rem; padding: 1rem }
code, pre { font: 14px/1.45 ui-monospace, monospace; background: #f3f3f1 }
h2 code { font-size: 18px }
pre { padding: .7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere }
section { border-top: 1px solid #ddd; margin-top: 1.5rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top }
.quiet { color: #595959 }
"""
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; style-src 'sha256-%s'"
        % base64.b64encode(hashlib.sha256(STYLE.encode()).digest()),
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
"""What lets a browser load nothing beside the page's own style."""
BOUNDS = {
    "minimum": "at least", "maximum": "at most", "minLength": "characters at least", "maxLength": "characters at most",
    "maxItems": "values at most", "maxProperties": "names at most", "pattern": "like",
}  # fmt: skip


def page(document: Mapping[str, Any]) -> bytes:
    """The page of an OpenAPI document, its examples as commands."""
    methods = ("get", "post", "delete")
    operations = [
        (path, method, operation) for path, found in document["paths"].items() for method, operation in found.items() if method in methods
    ]
    mistakes = {
        status: answer["description"]
        for *_, operation in operations for status, answer in operation["responses"].items() if status >= "300"
    }  # fmt: skip
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["shown"] = _shown
    template = environment.from_string(TEMPLATE.read_text())
    told = {"document": document, "operations": operations, "mistakes": dict(sorted(mistakes.items())), "bounds": BOUNDS}
    return template.render(**told, host=HOST, style=STYLE).encode()


def _shown(value: Any, width: int = 110) -> str:
    """A value as JSON, over several lines where one is too short."""
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= width else json.dumps(value, ensure_ascii=False, indent=1)
