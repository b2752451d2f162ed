"""One self-contained HTML page of headings, sentences, tables and plots, for MLflow's UI and for a mail to a colleague."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, TypeAlias

import pandas as pd
from jinja2 import Environment
from matplotlib.figure import Figure

from models.reports import Document, Sheet

Part: TypeAlias = "str | Sheet | pd.DataFrame | tuple[str, Figure] | Document"
"""A sentence, a table, a plot with its name, or a document under a heading of its own."""
_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; white-space: nowrap; vertical-align: top }
td:last-child { white-space: normal } td { white-space: pre-line } img { max-width: 100% }
caption { text-align: left; font-style: italic } .served td { font-weight: bold }
</style></head><body><h1>{{ title }}</h1>
{% for kind, part in parts %}
{%- if kind == "plot" %}<p><img alt="{{ part[0] }}" src="data:image/png;base64,{{ part[1] }}"></p>
{%- elif kind == "frame" %}{{ part | safe }}
{%- elif kind == "heading" %}<h2>{{ part }}</h2>
{%- elif kind == "sheet" %}<table>{% if part.title %}<caption>{{ part.title }}</caption>{% endif %}
<thead><tr>{% for cell in part.columns %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in part.rows %}<tr{% if loop.index0 == part.served %} class="served"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{%- else %}<p>{{ part }}</p>{% endif %}
{% endfor %}</body></html>
"""


def page(title: str, parts: Sequence[Part]) -> str:
    """The page as text; every sentence and cell is escaped."""
    shown: list[tuple[str, Any]] = []
    flat: list[Part] = []
    for part in parts:
        flat += [part, *part.parts] if isinstance(part, Document) else [part]
    for part in flat:
        if isinstance(part, Document):
            shown.append(("heading", part.title))
        elif isinstance(part, Sheet):
            shown.append(("sheet", part))
        elif isinstance(part, pd.DataFrame):
            shown.append(("frame", part.to_html(index=False, border=0, escape=True)))
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
