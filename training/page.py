"""One self-contained HTML page of headings, sentences, tables and plots, for MLflow's UI and for a mail to a colleague."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, TypeAlias

import pandas as pd
from jinja2 import Environment
from matplotlib.figure import Figure

Part: TypeAlias = "str | pd.DataFrame | tuple[str, Figure]"
"""A sentence, a table, or a plot with its name."""
_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; white-space: nowrap; vertical-align: top }
td:last-child { white-space: normal } img { max-width: 100% }
</style></head><body><h1>{{ title }}</h1>
{% for kind, part in parts %}
{%- if kind == "plot" %}<p><img alt="{{ part[0] }}" src="data:image/png;base64,{{ part[1] }}"></p>
{%- elif kind == "table" %}{{ part | safe }}
{%- else %}<p>{{ part }}</p>{% endif %}
{% endfor %}</body></html>
"""


def page(title: str, parts: Sequence[Part]) -> str:
    """The page as text; every sentence and cell is escaped."""
    shown: list[tuple[str, Any]] = []
    for part in parts:
        if isinstance(part, pd.DataFrame):
            shown.append(("table", part.to_html(index=False, border=0, escape=True)))
        elif isinstance(part, tuple):
            shown.append(("plot", (part[0], png(part[1]))))
        else:
            shown.append(("text", part))
    return Environment(autoescape=True).from_string(_TEMPLATE).render(title=title, parts=shown)


def png(figure: Figure) -> str:
    """A figure as base64 text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
