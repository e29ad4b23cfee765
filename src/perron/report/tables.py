"""Tables of several runs of several models, as Markdown and as HTML, and the pictures that go with them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes

__all__ = ["Columns", "Results", "html_table", "name_rows", "spread", "strips", "text_table"]

Results = Sequence[Mapping[str, Any]]
# The heading of a column, and what it says of all runs of one model.
Columns = Mapping[str, Callable[[Results], str]]


def spread(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    """Mean, with the standard deviation where there are several values; "-" where there are none."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    mean = form(statistics.mean(known))
    return mean if len(known) == 1 else f"{mean} ± {form(statistics.stdev(known))}"


def _rows(columns: Columns, groups: Sequence[Results]) -> list[list[str]]:
    return [[column(group) for column in columns.values()] for group in groups]


def text_table(columns: Columns, groups: Sequence[Results]) -> str:
    """A Markdown table, one row a model."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in _rows(columns, groups)])


def html_table(columns: Columns, groups: Sequence[Results]) -> str:
    """The same on a card that scrolls sideways."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in _rows(columns, groups))
    return f"<div class='card scroll'><table><tr>{head}</tr>{body}</table></div>"


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names on the vertical axis, from the top."""
    axes.set_yticks(range(len(names)), list(names))
    axes.invert_yaxis()


def strips(axes: Axes, values: Mapping[str, Sequence[float]], title: str) -> None:
    """Accuracies of every run as dots, one line a model."""
    for row, found in enumerate(values.values()):
        axes.plot([100 * v for v in found], [row] * len(found), "o", color="#2563eb", alpha=0.6)
    name_rows(axes, list(values))
    axes.set(title=title, xlabel="%")
