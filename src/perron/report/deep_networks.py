"""The table and the page about networks whose depth grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from perron.report.figures import svg
from perron.report.html import grid, write_page
from perron.report.tables import Columns, Results, html_table

__all__ = ["columns", "write_depth"]

_FACTS: Columns = {
    "activation": lambda r: r[0]["activation"],
    "E phi": lambda r: f"{r[0]['mean']:.3f}",
    "E phi'": lambda r: f"{r[0]['slope']:.3f}",
    "E phi'^2": lambda r: f"{r[0]['energy']:.3f}",
    "limit": lambda r: r[0]["kind"],
    "alpha": lambda r: "-" if r[0]["exponent"] is None else f"{r[0]['exponent']:.3f}",
    "test accuracy": lambda r: f"{r[0]['limit']:.2%}",
}


def columns(results: Results) -> Columns:
    """One row an activation: accuracies, and in brackets how many labels are those of the limit."""

    def cell(depth: int) -> Any:
        def show(rows: Results) -> str:
            found = rows[0]["depths"].get(depth)
            return (
                "-"
                if found is None or found["accuracy"] is None
                else f"{found['accuracy']:.2%} ({found['agreement']:.0%})"
            )

        return show

    depths = sorted({d for r in results for d in r["depths"]})
    return {**_FACTS, **{f"depth {d}": cell(d) for d in depths}}


def write_depth(path: Path, results: Sequence[Mapping[str, Any]], toy: Mapping[str, Any], facts: str) -> Path:
    """Write the page and return its path.

    Args:
        path: of the HTML file.
        results: one for each activation, as `perron.studies.depth` makes them.
        toy: votes and errors of the three classifiers on an arc.
        facts: about the data and the version.
    """
    title = "What deep networks become"
    parts = [
        f"<h1>{title}</h1>",
        f"<p class='soft'>{escape(facts)}. Tangent kernels of explicit networks of infinite width; in brackets, how many "
        "labels are those of infinite depth.</p>",
        html_table(columns(results), [[r] for r in results]),
        "<h2>How fast</h2>",
        grid(
            svg(lambda axes: _depths(axes, results, "agreement", "labels as in the limit, %")),
            svg(lambda axes: _depths(axes, results, "accuracy", "test accuracy, %")),
        ),
        "<h2>The three classifiers on an arc</h2>",
        "<p>Points on a quarter of a circle, two labels in four stretches, a fifth of the labels wrong. A vote of all sees "
        "nothing, the nearest neighbour repeats every wrong label, and the singular kernel with alpha = 1, the dimension "
        "of the arc, comes near the least possible error as the training set grows.</p>",
        grid(svg(lambda axes: _votes(axes, toy)), svg(lambda axes: _errors(axes, toy))),
    ]
    return write_page(path, title, "".join(parts))


def _depths(axes: Axes, results: Results, key: str, label: str) -> None:
    styles = {"majority vote": ":", "singular kernel": "-", "nearest neighbour": "--"}
    for row in results:
        depths = sorted(d for d, found in row["depths"].items() if found[key] is not None)
        values = [100 * row["depths"][d][key] for d in depths]
        axes.plot(depths, values, "o" + styles[row["kind"]], markersize=4, label=row["activation"])
    axes.set(title="Agreement" if key == "agreement" else "Accuracy", xlabel="depth", ylabel=label, xscale="log")
    axes.legend(fontsize=7)


def _votes(axes: Axes, toy: Mapping[str, Any]) -> None:
    for row, (name, votes) in enumerate({"truth": toy["truth"], **toy["votes"]}.items()):
        axes.fill_between(toy["angle"], -row - 0.4, [-row - 0.4 + 0.8 * v for v in votes], step="mid", alpha=0.7)
        axes.text(0, -row + 0.43, name, fontsize=8)
    axes.plot(
        toy["training angle"], [0.75 + 0.2 * y for y in toy["training labels"]], "k|", markersize=5, clip_on=False
    )
    axes.set(title="Label 1 along the arc", xlabel="angle", yticks=[])
    axes.grid(False)


def _errors(axes: Axes, toy: Mapping[str, Any]) -> None:
    for name, errors in toy["errors"].items():
        axes.plot(toy["sizes"], [100 * e for e in errors], "o-", markersize=4, label=name)
    axes.axhline(100 * toy["least error"], color="#475569", linestyle=":", label="least possible")
    axes.set(title="Errors", xlabel="training points", ylabel="%", xscale="log", ylim=(0, 60))
    axes.legend(fontsize=8)
