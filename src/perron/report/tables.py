"""Tables of several runs of several models, as Markdown and as HTML, and the pictures that go with them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from html import escape
from typing import Any

from matplotlib.axes import Axes

__all__ = [
    "Columns",
    "Results",
    "at_least",
    "at_most",
    "html_table",
    "name_rows",
    "said_versions",
    "spread",
    "strips",
    "text_table",
]

Results = Sequence[Mapping[str, Any]]
# The heading of a column, and what it says of all runs of one model.
Columns = Mapping[str, Callable[[Results], str]]


def at_most(bound: float, form: str) -> str:
    """An upper bound as text whose number is not below it: rounding to nearest would claim more than was proven.

    Args:
        bound: any number.
        form: as for `format`; of kind e or f.

    >>> at_most(1.01e-4, ".0e"), at_most(0.5, ".3f"), at_least(0.69, ".1f")
    ('2e-04', '0.500', '0.6')
    """
    text = format(bound, form)
    if not float(text) < bound:
        return text
    # One more in the last place.
    unit = Decimal((0, (1,), int(Decimal(text).as_tuple().exponent)))
    return format(float(Decimal(text) + unit), form)


def at_least(bound: float, form: str) -> str:
    """The same for a lower bound."""
    text = at_most(-bound, form)
    return f"-{text}" if bound < 0 else text.removeprefix("-")


def said_versions(results: Results) -> str:
    """The versions that measured them, all of them where they differ."""
    known = [r.get("versions") for r in results]
    words = [", ".join(f"{k} {v}" for k, v in v.items()) if v else "versions that were not recorded" for v in known]
    return "; ".join(dict.fromkeys(words))


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
