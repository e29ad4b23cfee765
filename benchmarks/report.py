"""One page from the JSON of speed.py, scaling.py and training.py: table, pictures, and what they say.

python benchmarks/report.py benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from speed import ratio, table

from perron.report import grid, svg, write_page


def _growth(rows: dict[str, Any], what: str, label: str, series: Sequence[str]) -> str:
    unit = {"ms": "ms", "mib": "MiB"}[what]

    def draw(axes: Axes) -> None:
        for name in series:
            points = [(int(size), row[what][name]) for size, row in rows.items() if name in row.get(what, {})]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=label, ylabel=f"{unit}, forward + backward", xscale="log", yscale="log")
        axes.set_title(f"{'Time' if what == 'ms' else 'Peak memory'} over {label}")
        axes.legend(frameon=False, fontsize=9)

    return svg(draw)


def _speedups(results: list[dict[str, Any]]) -> str:
    def gain(rows: dict[str, Any], ours: str, key: str) -> float:
        return ratio(rows, key)[0] * rows["Auto"][key] / rows[ours][key] if ours in rows else math.nan

    def draw(axes: Axes) -> None:
        names = [r["case"] for r in results]
        bars = (
            ("Auto", "forward_ms", "forward"),
            ("Auto", "both_ms", "with backward"),
            ("Compiled", "both_ms", "with backward"),
        )
        for k, (ours, key, label) in enumerate(bars):
            values = [gain(r["methods"], ours, key) for r in results]
            places = [n + 0.28 * (k - 1) for n in range(len(names))]
            axes.barh(places, values, 0.27, label=f"{ours}, {label}")
        axes.axvline(1, color="#475569", linewidth=1)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set(xscale="log", xlabel="time of the best baseline / time of Perron", title="Against the best baseline")
        ticks = [0.25, 0.5, 1, 2, 4, 8]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.4, 1.03), ncols=3)

    return svg(draw, (6.4, 1.2 + 0.28 * len(results)))


def _slope(rows: dict[str, Any], what: str, name: str) -> float:
    """The exponent of the growth between the two largest sizes."""
    (a, first), (b, second) = sorted(((int(k), row[what][name]) for k, row in rows.items()))[-2:]
    return math.log(second / first) / math.log(b / a)


def _scaling_text(scaling: dict[str, Any]) -> str:
    width, batch, steps, layers = (scaling[k] for k in ("width", "batch", "steps", "layers"))
    widest = list(width.values())[-1]["ms"]
    memory = [row["mib"]["implicit"] for row in steps.values()]
    unrolled = [row["mib"]["unrolled"] for row in steps.values()]
    one, most = layers["1"]["ms"]["Auto"], list(layers.values())[-1]["ms"]["Auto"]
    return (
        f"<p>Small layers cost overhead: some hundred tensor operations, whatever their size. From width 512 on the products "
        f"rule, and time grows with exponent {_slope(width, 'ms', 'Auto'):.1f} in the width (2 for the products alone); at "
        f"width 2,048 it is {widest['Auto'] / widest['floor']:.1f} times that of the bare float32 products, of which the "
        f"float64 proof and its copy of W are the larger part. In the batch the exponent is "
        f"{_slope(batch, 'ms', 'Auto'):.1f}: everything is per sample, the overhead is not. Memory does not depend on the "
        f"number of steps ({', '.join(f'{m:.1f}' for m in memory)} MiB for 10, 100, 1,000), as that of the unrolled loop does "
        f"({', '.join(f'{m:.0f}' for m in unrolled)} MiB); it grows with width and batch as the handful of state-sized "
        f"tensors that mixing and proof keep. Layers add up: {len(layers) and list(layers)[-1]} of them take "
        f"{most / one:.1f} times the time of one.</p>"
    )


def _markdown_table(text: str) -> str:
    header, _, *rows = [[escape(c.strip()) for c in line.strip("| ").split("|")] for line in text.splitlines()]
    head = "<tr>" + "".join(f"<th>{c}</th>" for c in header) + "</tr>"
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class='card scroll'><table>{head}{body}</table></div>"


def _training(rows: dict[str, Any]) -> str:
    head = "<tr><th>layer</th><th>seconds per epoch</th><th>validation accuracy</th></tr>"
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{', '.join(f'{s:.1f}' for s in row['seconds'])}</td><td>{row['val_acc']:.2%}</td></tr>"
        for name, row in rows.items()
    )
    return f"<h2>Training MNIST, width 80</h2><div class='card scroll'><table>{head}{body}</table></div>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found = {
        n: json.loads(p.read_text()) for n in ("speed", "scaling", "training") if (p := folder / f"{n}.json").is_file()
    }
    body = ["<h1>Speed and scaling</h1>"]
    if "speed" in found:
        speed = found["speed"]
        body += [
            f"<p class='soft'>{speed['threads']} thread, torch {escape(speed['torch'])}, {escape(speed['machine'])}; true "
            f"entrywise error at most {speed['target']:g}; medians of interleaved rounds.</p>",
            grid(_speedups(speed["results"])),
            _markdown_table(table(speed["results"])),
        ]
    if "training" in found:
        body.append(_training(found["training"]))
    if "scaling" in found:
        scaling = found["scaling"]
        series = ("Auto", "hook", "floor")
        body += [
            "<h2>Scaling</h2>",
            grid(
                _growth(scaling["width"], "ms", "width", series),
                _growth(scaling["batch"], "ms", "batch", series),
                _growth(scaling["layers"], "ms", "layers", series),
                _growth(scaling["width"], "mib", "width", series),
                _growth(scaling["batch"], "mib", "batch", series),
                _growth(scaling["steps"], "mib", "steps", ("implicit", "unrolled")),
            ),
            _scaling_text(scaling),
        ]
    print(write_page(folder / "speed.html", "Speed and scaling", "".join(body)))


if __name__ == "__main__":
    main()
