"""The table and the page of a comparison between an equilibrium network and its explicit equivalent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from perron.infinite_width import Match
from perron.infinite_width.readout import MODELS, Spectra
from perron.report.figures import svg
from perron.report.html import grid, write_page
from perron.report.tables import Columns, Results, html_table, said_versions, spread

__all__ = ["COLUMNS", "by_width_and_model", "distances", "write_kernels"]


def _digits(value: float) -> str:
    """Three of them at least, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


COLUMNS: Columns = {
    "model": lambda r: r[0]["model"],
    "width": lambda r: f"{r[0]['width']:,}",
    "test accuracy": lambda r: spread([100 * x["test"] for x in r], lambda v: f"{v:.2f}") + " %",
    "seeds": lambda r: str(len(r)),
    "features to kernel": lambda r: spread([x["kernel distance"] for x in r], lambda v: f"{v:.4f}"),
    "microseconds a sample": lambda r: _digits(1e6 * statistics.median(x["seconds per sample"] for x in r)),
    "against implicit": lambda r: r[0]["against implicit"],
}


def by_width_and_model(results: Results) -> list[Results]:
    """The rows of the table, with the median time in comparison with that of the implicit model of this width."""
    groups: list[Results] = []
    for width in dict.fromkeys(r["width"] for r in results):
        rows = {name: [r for r in results if r["width"] == width and r["model"] == name] for name in MODELS}
        times = {
            name: statistics.median(r["seconds per sample"] for r in found) for name, found in rows.items() if found
        }
        for name, time in times.items():
            against = f"{times['implicit'] / time:.1f}x faster" if "implicit" in times else "-"
            groups.append([{**r, "against implicit": against} for r in rows[name]])
    return groups


def distances(results: Results, found: Spectra) -> str:
    """How far the kernels are apart, and how fast features approach theirs, in words."""
    apart = ", ".join(f"{name} {found.distance[name]:.5f}" for name in MODELS[1:])
    powers = ", ".join(f"{name} {p:.2f}" for name in MODELS if (p := _power(results, name)) is not None)
    approach = f"features approach their kernels with the width to the power: {powers}\n" if powers else ""
    return f"relative operator-norm distance to the implicit kernel: {apart}\n{approach}"


def write_kernels(
    path: Path,
    results: Results,
    found: Spectra,
    match: Match,
    facts: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Path:
    """Write the page and return its path.

    Args:
        path: of the HTML file.
        results: one for each model, width and seed, as `perron.infinite_width.readout.read_out` measures them.
        found: the kernels of infinite width.
        match: the explicit network.
        facts: about the data.
        versions: with which `found` was computed; results have their own.
    """
    common = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in facts.items())
    measured_by = said_versions([{"versions": versions}, *results])
    layers = ", then ".join(str(a) for a in match.activations)
    residuals = ", ".join(f"{float(r):.1e}" for r in match.residuals)
    apart = "; ".join(f"{name} <b>{found.distance[name]:.5f}</b>" for name in MODELS[1:])
    parts = [
        "<h1>An equilibrium network and its explicit equivalent</h1>",
        f"<p class='soft'>{escape(common)}; {escape(measured_by)}. "
        "Images centered, every one of unit norm; frozen random features, ridge read-out.</p>",
        f"<div class='card'><p>Matched: {escape(layers)}. Relative residuals of the four equations: {residuals}.</p>"
        f"<p>Relative operator-norm distance to the kernel of the equilibrium network, at infinite width: {apart}. "
        "This is the judge: accuracies of all three agree, matched or not.</p></div>",
        grid(
            svg(lambda axes: _spectra(axes, found)),
            svg(lambda axes: _differences(axes, found)),
            svg(lambda axes: _overlap(axes, found)),
            svg(lambda axes: _accuracy(axes, results)),
            svg(lambda axes: _monte_carlo(axes, results)),
            svg(lambda axes: _times(axes, results)),
        ),
        html_table(COLUMNS, by_width_and_model(results)),
    ]
    return write_page(path, "An equilibrium network and its explicit equivalent", "".join(parts))


def _spectra(axes: Axes, found: Spectra) -> None:
    for name, style in zip(MODELS, ("-", "--", ":"), strict=True):
        values = found.eigenvalues[name].clamp_min(1e-12)
        axes.plot(range(1, len(values) + 1), values, style, linewidth=2, label=name)
    axes.set(title="Eigenvalues of the kernels", xlabel="number", xscale="log", yscale="log")
    axes.legend(fontsize=8)


def _differences(axes: Axes, found: Spectra) -> None:
    for name in MODELS[1:]:
        apart = (found.eigenvalues[name] / found.eigenvalues["implicit"] - 1).abs().clamp_min(1e-16)
        axes.plot(range(1, len(apart) + 1), apart, ".", markersize=3, label=name)
    axes.set(title="Their differences", xlabel="number", xscale="log", yscale="log")
    axes.set_ylabel("|ratio - 1|")
    axes.legend(fontsize=8)


def _overlap(axes: Axes, found: Spectra) -> None:
    for name in MODELS[1:]:
        apart = (1 - found.overlap[name]).clamp_min(1e-16)
        axes.plot(range(1, len(apart) + 1), apart, "o-", label=name)
    axes.set(title="Leading eigenvectors", xlabel="number", ylabel="1 - |cosine|", yscale="log")
    axes.legend(fontsize=8)


def _by_width(results: Results, model: str, key: str) -> tuple[list[int], list[list[float]]]:
    widths = sorted({r["width"] for r in results if r["model"] == model})
    return widths, [[r[key] for r in results if r["width"] == w and r["model"] == model] for w in widths]


def _accuracy(axes: Axes, results: Results) -> None:
    for model, style in zip(MODELS, ("-", "--", ":"), strict=True):
        widths, values = _by_width(results, model, "test")
        axes.plot(widths, [100 * statistics.mean(v) for v in values], "o" + style, label=model)
    axes.set(title="Read-out", xlabel="width", ylabel="test accuracy, %", xscale="log")
    axes.legend(fontsize=8)


def _power(results: Results, model: str) -> float | None:
    """Of the width, with which the features of a model approach their kernel."""
    widths, values = _by_width(results, model, "kernel distance")
    if len(widths) < 2:
        return None
    x = [math.log(w) for w in widths]
    y = [statistics.mean(map(math.log, v)) for v in values]
    return statistics.linear_regression(x, y).slope


def _monte_carlo(axes: Axes, results: Results) -> None:
    for model, style in zip(MODELS, ("-", "--", ":"), strict=True):
        widths, values = _by_width(results, model, "kernel distance")
        power = _power(results, model)
        axes.plot(
            widths,
            [statistics.mean(v) for v in values],
            "o" + style,
            label=model if power is None else f"{model}, power {power:.2f}",
        )
    axes.set(title="Features against their kernel", xlabel="width", xscale="log", yscale="log")
    axes.set_ylabel("relative Frobenius distance")
    axes.legend(fontsize=8)


def _times(axes: Axes, results: Results) -> None:
    for model, style in zip(MODELS, ("-", "--", ":"), strict=True):
        widths, values = _by_width(results, model, "seconds per sample")
        axes.plot(widths, [1e6 * statistics.median(v) for v in values], "o" + style, label=model)
    axes.set(title="Features", xlabel="width", ylabel="microseconds a sample", xscale="log", yscale="log")
    axes.legend(fontsize=8)
