"""The table and the page of a comparison: one row a model, mean and standard deviation over the seeds."""

from __future__ import annotations

import statistics
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes

from perron.report.figures import svg
from perron.report.html import grid, write_page
from perron.report.tables import (
    Columns,
    Results,
    at_least,
    at_most,
    html_table,
    name_rows,
    said_versions,
    spread,
    strips,
)

__all__ = ["COLUMNS", "by_core", "write_comparison"]


def _certificate(results: Results) -> str:
    kinds = sorted({r["certificate"]["kind"] for r in results})
    rates = [r["certificate"]["rate"] for r in results if r["certificate"]["rate"] is not None]
    return ", ".join(kinds) + (f" (rate {at_most(max(rates), '.2f')})" if rates else "")


def _error(results: Results) -> str:
    found = [r["largest certified error"] for r in results if r["largest certified error"] is not None]
    return at_most(max(found), ".0e") if found else "-"


def _all(results: Results, key: str) -> str:
    return ", ".join(f"{number:,}" for number in sorted({r[key] for r in results}))


COLUMNS: Columns = {
    "model": lambda r: r[0]["core"],
    "test accuracy": lambda r: spread([x["accuracy"] for x in r], lambda v: f"{100 * v:.2f}") + " %",
    "seeds": lambda r: str(len(r)),
    "parameters": lambda r: _all(r, "parameters"),
    "width": lambda r: _all(r, "width"),
    "forward": lambda r: spread([x["forward steps"] for x in r], lambda v: f"{v:.1f}"),
    "backward": lambda r: spread([x["backward steps"] for x in r], lambda v: f"{v:.1f}"),
    "s/epoch": lambda r: spread([x["seconds per epoch"] for x in r], lambda v: f"{v:.1f}"),
    "peak MiB": lambda r: spread([x["peak MiB"] for x in r], lambda v: f"{v:.1f}"),
    "certificate": _certificate,
    "proven": lambda r: spread([x["proven"] for x in r], lambda v: f"{at_least(100 * v, '.0f')} %"),
    "largest error": _error,
    "depth": lambda r: spread([x["effective depth"] for x in r], lambda v: f"{v:.0f}"),
}


def by_core(results: Results) -> list[Results]:
    """The rows of the table, one a model."""
    cores = list(dict.fromkeys(r["core"] for r in results))
    return [[r for r in results if r["core"] == core] for core in cores]


def write_comparison(path: Path, results: Results, settings: dict[str, Any]) -> Path:
    """Write the page and return its path.

    Args:
        path: of the HTML file.
        results: of every run, as `perron.studies.images` measures them.
        settings: common to all runs.
    """
    common = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items())
    refusals = {r["core"]: r["certificate"]["refusal"] for r in results if r["certificate"]["refusal"]}
    refused = "".join(f"<p><b>{escape(core)}</b>: {escape(reason)}</p>" for core, reason in refusals.items())
    parts = [
        f"<h1>Implicit models on {escape(str(settings['data']))}</h1><p class='soft'>{escape(common)}; "
        f"{escape(said_versions(results))}; threads: {_all(results, 'threads')}. "
        "The network around the core, the split, the batches and the optimiser are the "
        "same for all.</p>",
        html_table(COLUMNS, by_core(results)),
        "<p>Forward and backward: evaluations of f, and products with its Jacobian, per sample in the last epoch of "
        "training (neural ODEs: evaluations of the right-hand side in the last batch of the test). Proven: samples of the test set "
        "whose enclosure is proven. Depth: the least number of evaluations of f from zero with which the same weights are "
        "within a tenth of a point; at 1 the equilibrium does nothing.</p>",
        grid(svg(lambda axes: _accuracy(axes, results)), svg(lambda axes: _seconds(axes, results))),
        grid(svg(lambda axes: _depths(axes, results))),
        f"<h2>Why certificates were refused</h2><div class='card'>{refused}</div>" if refused else "",
    ]
    return write_page(path, f"Implicit models on {settings['data']}", "".join(parts))


def _grouped(results: Results, key: str) -> dict[str, list[float]]:
    return {group[0]["core"]: [r[key] for r in group] for group in by_core(results)}


def _accuracy(axes: Axes, results: Results) -> None:
    strips(axes, _grouped(results, "accuracy"), "Test accuracy, every seed")


def _seconds(axes: Axes, results: Results) -> None:
    groups = _grouped(results, "seconds per epoch")
    axes.barh(range(len(groups)), [statistics.median(v) for v in groups.values()], color="#0f766e")
    name_rows(axes, list(groups))
    axes.set(title="Training", xlabel="seconds per epoch")


def _depths(axes: Axes, results: Results) -> None:
    first = [r for r in results if r["effective depth"] is not None and r["seed"] == results[0]["seed"]]
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, r in enumerate(first):
        cuts = [int(k) for k in r["depth"] if k != "full"]
        accuracy = [100 * r["depth"][str(c)] for c in cuts]
        axes.plot(cuts, accuracy, marker="o", markersize=3, color=colors[number % len(colors)], label=r["core"])
    cuts = sorted({int(k) for r in first for k in r["depth"] if k != "full"})
    axes.set(title="The solve cut short", xlabel="evaluations of f", ylabel="test accuracy, %", xscale="log")
    axes.set_xticks(cuts, [str(c) for c in cuts])
    axes.minorticks_off()
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
