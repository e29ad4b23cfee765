"""The report's pictures, as SVG text: matplotlib, one function a picture, each returns None where there is no data."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "certified_error",
    "confusion",
    "effective_depth",
    "learning_curves",
    "solver_steps",
    "spectral_radius",
    "svg",
    "widths",
]

Rows = list[dict[str, float]]
Evaluation = dict[str, Any]

_STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.fonttype": "path",
    "svg.hashsalt": "perron",
    "axes.prop_cycle": cycler(color=["#2563eb", "#dc6803", "#0f766e", "#9333ea", "#475569"]),
}


def svg(draw: Callable[[Axes], None], size: tuple[float, float] = (5.4, 3.4)) -> str:
    """What `draw` puts on a pair of axes, as SVG text in the report's style."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The size comes from the page, so that it fits a phone.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )


def _series(axes: Axes, rows: Rows, key: str, label: str, **style: Any) -> bool:
    points = [(r["epoch"] + 1, r[key]) for r in rows if key in r]
    if points:
        axes.plot(*zip(*points), label=label, marker="o" if len(points) < 2 else None, **style)
    return bool(points)


def learning_curves(rows: Rows) -> str | None:
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        _series(axes, rows, "train_loss_epoch", "training loss")
        _series(axes, rows, "val_loss", "validation loss")
        axes.set(xlabel="epoch", ylabel="cross-entropy", yscale="log", title="Learning curves")
        other = axes.twinx()
        points = [(r["epoch"] + 1, 100 * r["val_acc"]) for r in rows if "val_acc" in r]
        if points:
            other.plot(*zip(*points), color="#0f766e", linestyle="--", label="validation accuracy, %")
        other.grid(False)
        other.set_ylabel("accuracy, %")
        other.spines["right"].set_visible(True)
        lines = [*axes.get_lines(), *other.get_lines()]
        axes.legend(
            lines,
            [str(line.get_label()) for line in lines],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            ncols=3,
            frameon=False,
            fontsize=9,
        )

    return svg(draw)


def solver_steps(rows: Rows) -> str | None:
    if not any("train_forward_steps_epoch" in r for r in rows):
        return None

    def draw(axes: Axes) -> None:
        _series(axes, rows, "train_forward_steps_epoch", "forward (evaluations of f)")
        _series(axes, rows, "train_backward_steps_epoch", "backward (products with the Jacobian)")
        axes.set(xlabel="epoch", ylabel="steps, mean per sample", title="Solver steps")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)

    return svg(draw)


def spectral_radius(rows: Rows) -> str | None:
    keys = [k for k in dict.fromkeys(k for r in rows for k in r) if k.startswith("spectral_radius")]
    if not keys:
        return None

    def draw(axes: Axes) -> None:
        for key in keys:
            _series(axes, rows, key, key.removeprefix("spectral_radius "))
        axes.set(xlabel="epoch", ylabel="upper bound of rho(W)", title="Spectral radius of W")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)

    return svg(draw)


def _histogram(evaluation: Evaluation, key: str, title: str, label: str) -> str | None:
    import numpy as np

    layers = {name: [v for v in layer[key] if v > 0] for name, layer in evaluation["layers"].items()}
    values = [v for part in layers.values() for v in part]
    if not values:
        return None
    low, high = np.log10(min(values)), np.log10(max(values))
    bins = np.logspace(low - 0.05, high + 0.05, 40).tolist()

    def draw(axes: Axes) -> None:
        for name, part in layers.items():
            axes.hist(part, bins=bins, alpha=0.75, label=name)
        axes.set(xscale="log", xlabel=label, ylabel="samples", title=title)
        if len(layers) > 1:
            axes.legend(frameon=False)

    return svg(draw)


def certified_error(evaluation: Evaluation) -> str | None:
    return _histogram(evaluation, "error_bound", "Certified error", "bound on the largest relative error of a sample")


def widths(evaluation: Evaluation) -> str | None:
    return _histogram(evaluation, "width", "Width of the enclosure", "(upper - lower)/lower, median entry of a sample")


def effective_depth(evaluation: Evaluation) -> str | None:
    depth = evaluation["depth"]

    def draw(axes: Axes) -> None:
        labels = list(depth)
        axes.plot(range(len(labels)), [100 * depth[k] for k in labels], marker="o")
        axes.set_xticks(range(len(labels)), labels)
        for k, label in enumerate(labels):
            axes.annotate(
                f"{100 * depth[label]:.1f}", (k, 100 * depth[label]), (0, 7), textcoords="offset points", ha="center"
            )
        axes.set(xlabel="solve cut to this many evaluations of f", ylabel="accuracy, %", title="Effective depth")
        axes.margins(y=0.18)

    return svg(draw)


def confusion(evaluation: Evaluation, classes: Sequence[str]) -> str | None:
    matrix = evaluation["confusion"]
    if not matrix:
        return None

    def draw(axes: Axes) -> None:
        rows = [[v / max(sum(row), 1) for v in row] for row in matrix]
        axes.imshow(rows, cmap="Blues", vmin=0, vmax=1)
        axes.grid(False)
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                if value:
                    axes.text(
                        j,
                        i,
                        value,
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if rows[i][j] > 0.5 else "#334155",
                    )
        rotated = max(map(len, classes)) > 2
        axes.set_xticks(
            range(len(classes)), classes, rotation=60 if rotated else 0, ha="right" if rotated else "center"
        )
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix")

    return svg(draw, (5.4, 5.0))
