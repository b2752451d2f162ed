"""What a job found, for people, and all that it hands over to be registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pandas as pd

from training.metrics import Estimate

Rescore = Callable[[Any, Mapping[str, datetime]], pd.DataFrame]
"""A model that stands as it is, and the cuts to judge it on, to its evaluation."""


@dataclass
class Report:
    """What a job found, for people and for the promotion rule.

    Attributes:
        table: one row a model: name, and by column the estimate or text to print.
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

    def text(self) -> str:
        """The report as Markdown."""
        head = f"**{self.title}**\n\n| model | " + " | ".join(self.columns) + " |\n|---|" + "---|" * len(self.columns)
        rows = [
            f"| {'**' + name + '** (served)' if name == self.served else name} | "
            + " | ".join(row.get(column, "") for column in self.columns)
            + " |"
            for name, row in self.table.items()
        ]
        lead = f"Lead of {self.served} over {self.baseline}, paired: {self.lead}."
        return "\n".join([head, *rows, "", *(f"{note}" for note in [lead, *self.notes])])

    def frame(self) -> pd.DataFrame:
        """The table as a frame, to be shown in a page."""
        rows = {model: dict(row) for model, row in self.table.items()}
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(self.columns))
        return frame.fillna("").rename(index={self.served: f"{self.served} (served)"}).rename_axis("model").reset_index()


@dataclass(frozen=True)
class Outcome:
    """All that a job hands over to be registered.

    Attributes:
        evaluation: see ``training.evaluation``; a row a customer and cut.
        units: the moment of each cut in it.
        rescore: judges another model of the kind on some of these cuts.
        example, output: a row that the model takes and what it answers, for the signature.
        reference: the feature rows that later runs measure drift against.
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


def markdown(frame: pd.DataFrame) -> str:
    """A frame of texts as a table in Markdown."""
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False))])
