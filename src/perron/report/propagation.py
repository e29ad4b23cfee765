"""The table and the page of node classification on a graph: one row a model, mean and deviation over random splits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from perron.report.figures import svg
from perron.report.html import grid, write_page
from perron.report.tables import Columns, Results, at_most, html_table, said_versions, spread, strips

__all__ = ["COLUMNS", "by_propagation", "write_propagation"]


def _proven(results: Results) -> str:
    return "-" if results[0]["proven"] is None else f"{sum(r['proven'] for r in results)}/{len(results)}"


def _error(results: Results) -> str:
    return "-" if results[0]["error"] is None else at_most(max(r["error"] for r in results), ".0e")


COLUMNS: Columns = {
    "propagation": lambda r: r[0]["propagation"],
    "test accuracy": lambda r: spread([100 * x["test"] for x in r], lambda v: f"{v:.2f}") + " %",
    "splits": lambda r: str(len(r)),
    "certificate": lambda r: r[0]["certificate"] or "-",
    "proven": _proven,
    "largest error": _error,
    "evaluations": lambda r: spread([x["evaluations"] for x in r], lambda v: f"{v:.1f}"),
    "s/split": lambda r: f"{statistics.mean(x['seconds'] for x in r):.0f}",
}


def by_propagation(results: Results) -> dict[str, Results]:
    """The rows of the table, one a model."""
    names = dict.fromkeys(r["propagation"] for r in results)
    return {name: [r for r in results if r["propagation"] == name] for name in names}


def write_propagation(
    path: Path, name: str, results: Results, settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> Path:
    """Write the page and return its path.

    Args:
        path: of the HTML file.
        name: of the graph.
        results: of every model and split, as `perron.studies.graphs` measures them.
        settings: common to all models.
        facts: about the graph, in words.
    """
    common = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in {**facts, **settings}.items())
    groups = by_propagation(results)
    accuracy = {k: [r["test"] for r in rows] for k, rows in groups.items()}
    parts = [
        f"<h1>Propagation over {escape(name)}</h1><p class='soft'>{escape(common)}; "
        f"{escape(said_versions(results))}. "
        "The network before the propagation, the splits and the optimiser are the same for all.</p>",
        html_table(COLUMNS, list(groups.values())),
        '<p>Propagation "none" is the network with W = 0, and at the same time the explicit network of equal size: what it '
        "lacks is what the equilibrium buys. Proven: splits whose test solve is enclosed; evaluations of f per channel in it."
        "</p>",
        grid(
            svg(lambda axes: strips(axes, accuracy, "Test accuracy, every split")),
            svg(lambda axes: _curves(axes, groups)),
        ),
    ]
    return write_page(path, f"Propagation over {name}", "".join(parts))


def _curves(axes: Axes, groups: Mapping[str, Results]) -> None:
    for name, rows in groups.items():
        history = rows[0].get("history", [])
        if history:
            axes.plot(range(1, len(history) + 1), [100 * v for v in history], label=name)
    axes.set(title="Validation accuracy, first split", xlabel="epoch", ylabel="%")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
