"""What a job found, for people, and all that it hands over to be registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pandas as pd

from models.reports import Document, Sheet
from training.metrics import Estimate
from training.rendering import markdown

Rescore = Callable[[Any, Mapping[str, datetime]], pd.DataFrame]
"""A model that stands as it is, and the cuts to judge it on, to its evaluation."""


@dataclass
class Report:
    """What a job found, for people and for the promotion rule.

    Attributes:
        table: one row a model: name, and by column the estimate or text to print.
        quality: the same and more as numbers: by row and measure; the promotion metric is among them.
        groups: what columns belong together: their names begin with it.
        lead: the served model's paired lead over its simple baseline on the promotion metric.
        rivals: its paired leads over every other row of the table.
        notes: sentences that belong under the table.
        limits: what must be known before the model is used.
    """

    kind: str
    title: str
    served: str
    baseline: str
    columns: Sequence[str]
    table: Mapping[str, Mapping[str, str]]
    lead: Estimate
    rivals: Mapping[str, Estimate] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    limits: Sequence[str] = ()
    quality: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    groups: Sequence[str] = ()

    def document(self) -> Document:
        """The report as it is printed."""
        # the longest first: "A and B AUC" begins with "A " too
        names = sorted(self.groups, key=len, reverse=True)
        groups = [next((group for group in names if column.startswith(f"{group} ")), "") for column in self.columns]
        sheet = Sheet(
            columns=["model", *self.columns],
            rows=[[name, *(row.get(column, "") for column in self.columns)] for name, row in self.table.items()],
            groups=["", *groups] if self.groups else [],
            served=list(self.table).index(self.served),
        )
        lead = f"Lead of {self.served} over {self.baseline}, paired: {self.lead}."
        return Document(self.title, [sheet, lead, *self.notes])

    def text(self) -> str:
        """The report as Markdown."""
        return markdown(self.document())


@dataclass(frozen=True)
class Outcome:
    """All that a job hands over to be registered.

    Attributes:
        evaluation: see ``training.evaluation``; a row a customer and cut.
        units: the moment of each cut in it.
        rescore: judges another model of the kind on some of these cuts.
        example, output: a row that the model takes and what it answers, for the signature.
        reference: the feature rows that later runs measure drift against.
        asked: the features of all whom it would be asked about when it learnt, where the reference is a choice of them.
        settings: what a tuning chose for the trees.
    """

    model: Any
    report: Report
    evaluation: pd.DataFrame
    units: Mapping[str, datetime]
    rescore: Rescore
    example: pd.DataFrame
    output: Any
    plots: Mapping[str, Any]
    reference: pd.DataFrame
    asked: pd.DataFrame | None = None
    settings: Mapping[str, float] = field(default_factory=dict)


def sheet_of(frame: pd.DataFrame, title: str = "") -> Sheet:
    """A frame as a table of texts."""
    return Sheet(columns=list(map(str, frame.columns)), rows=[list(map(str, row)) for row in frame.itertuples(index=False)], title=title)
