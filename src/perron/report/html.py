"""One self-contained HTML file about a run: no script, no font, no image from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from perron._files import replacing
from perron.report import figures
from perron.report.tables import at_most, said_versions

__all__ = ["grid", "write_page", "write_report"]

_CSS = """
:root { color-scheme: light; --ink: #0f172a; --soft: #475569; --line: #e2e8f0; --paper: #ffffff; --back: #f8fafc; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { max-width: 46rem; } .soft { color: var(--soft); margin: 0 0 1.2rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.tiles { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(46%, 200px), 1fr)); }
.card + .grid, .grid + .card { margin-top: 1rem; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: .8rem; min-width: 0; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.2; } .tile span { color: var(--soft); font-size: .87rem; }
svg { width: 100%; height: auto; display: block; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .86rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td, th { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
td, th { vertical-align: top; } td { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } .scroll td { overflow-wrap: normal; }
"""


def write_report(
    path: Path,
    *,
    title: str,
    history: list[dict[str, float]],
    evaluations: dict[str, dict[str, Any]],
    classes: Sequence[str],
    provenance: dict[str, Any],
) -> Path:
    """Write the report of a run and return its path.

    Args:
        path: of the HTML file.
        title: name of the preset.
        history: one row of metrics per epoch.
        evaluations: by split, as `perron.training.run` keeps them, all of the same weights; the last is shown in full.
        classes: names of the classes.
        provenance: configuration and sittings, as `perron.training.records.Provenance` keeps them.
    """
    split, evaluation = list(evaluations.items())[-1]
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='soft'>Run started {escape(provenance['sittings'][0]['started'])}; {len(history)} epochs. Figures below are of "
        f"the {escape(split)} split, with the weights of epoch {evaluation['epochs']} ({escape(evaluation['checkpoint'])}), "
        f"evaluated {escape(evaluation['evaluated'])} by {escape(said_versions([evaluation]))}.</p>",
        _tiles(evaluations, history),
        "<h2>What is proven</h2>",
        f"<div class='card'><pre>{escape(evaluation['certificate'])}</pre></div>",
        "<h2>Training</h2>",
        grid(figures.learning_curves(history), figures.solver_steps(history), figures.spectral_radius(history)),
        "<h2>Equilibrium</h2>",
        grid(figures.certified_error(evaluation), figures.widths(evaluation), figures.effective_depth(evaluation)),
        "<p>Effective depth: the same weights, with every solve cut to so many evaluations of f from zero. One evaluation "
        "is the network without its equilibrium, f(0). Where the curve is flat, the equilibrium does nothing.</p>",
        _layers(evaluation),
        "<h2>Predictions</h2>",
        grid(figures.confusion(evaluation, classes)),
        "<h2>Reproduce</h2>",
        _provenance(provenance),
    ]
    return write_page(path, title, "".join(body))


def write_page(path: Path, title: str, body: str) -> Path:
    """Write one self-contained page with the report's style, and return its path.

    Args:
        path: of the HTML file; it is replaced whole or not at all.
        title: plain text.
        body: HTML.
    """
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)} - Perron</title><style>{_CSS}</style></head><body><main>{body}</main></body></html>"
    )
    with replacing(path) as file:
        file.write(page)
    return path


def _tile(value: str, label: str) -> str:
    return f"<div class='card tile'><b>{escape(value)}</b><span>{escape(label)}</span></div>"


def _tiles(evaluations: dict[str, dict[str, Any]], history: list[dict[str, float]]) -> str:
    tiles = [
        _tile(f"{e['accuracy']:.2%}", f"{split} accuracy, {e['samples']} images") for split, e in evaluations.items()
    ]
    e = list(evaluations.values())[-1]
    errors = [v for layer in e["layers"].values() for v in layer["error_bound"]]
    if errors:
        tiles.append(_tile(at_most(max(errors), ".1e"), "largest certified relative error"))
    tiles.append(_tile(f"{e['enclosures_proven']}/{e['enclosures']}", "enclosures proven"))
    steps = [v for layer in e["layers"].values() for v in layer["steps"]]
    if steps:
        tiles.append(_tile(f"{sum(steps) / len(steps):.1f}", "evaluations of f per solve, proof included"))
    backward = [r["train_backward_steps_epoch"] for r in history if "train_backward_steps_epoch" in r]
    if backward:
        tiles.append(_tile(f"{backward[-1]:.1f}", "adjoint steps per sample, last epoch"))
    if history:
        seconds = sum(r["seconds"] for r in history)
        tiles.append(_tile(f"{seconds:.0f} s", f"training and validation, {len(history)} epochs"))
    return f"<div class='tiles'>{''.join(tiles)}</div>"


def grid(*pictures: str | None) -> str:
    """Pictures side by side, as many as there is room for."""
    return "<div class='grid'>" + "".join(f"<div class='card'>{p}</div>" for p in pictures if p) + "</div>"


def _layers(evaluation: dict[str, Any]) -> str:
    def median(values: list[float]) -> str:
        return at_most(sorted(values)[len(values) // 2], ".2e") if values else "-"

    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{'-' if layer['spectral_radius'] is None else at_most(layer['spectral_radius'], '.3f')}"
        f"</td><td>{layer['change']:.3f}</td><td>{median(layer['width'])}</td><td>{median(layer['error_bound'])}</td></tr>"
        for name, layer in evaluation["layers"].items()
    )
    head = "<tr><th>layer</th><th>rho(W) at most</th><th>||z* - f(0)||/||z*||</th><th>median width</th><th>median bound</th></tr>"
    return f"<div class='card scroll'><table>{head}{rows}</table></div>"


def _provenance(provenance: dict[str, Any]) -> str:
    sittings = "".join(
        f"<tr><td>from epoch {s['epoch'] + 1}, {escape(s['started'])}</td><td><pre>{escape(s['command'])}</pre></td>"
        f"<td>{escape(said_versions([s]))}</td></tr>"
        for s in provenance["sittings"]
    )
    seed = next(
        (line for line in provenance["config"].splitlines() if line.startswith("seed_everything")),
        "seed_everything: none",
    )
    return (
        f"<div class='card'><table><tr><th>sitting</th><th>command</th><th>versions</th></tr>{sittings}</table>"
        f"<p>{escape(seed)}</p>"
        f"<details><summary>whole configuration</summary><pre>{escape(provenance['config'])}</pre></details></div>"
    )
