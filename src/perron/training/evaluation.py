"""Everything the report says about a trained network on one split, measured in one pass and kept as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from perron.report.tables import at_most
from perron.solvers import IterativeSolver, Picard, Solver
from perron.theory.certify import certify
from perron.training.module import certified_errors, equilibrium_layers, spectral_radius

__all__ = ["evaluate"]

CUTS = (1, 2, 4, 8, 16, 32)


@contextmanager
def _solvers(model: nn.Module, change: Callable[[Solver], Solver]) -> Any:
    """The model with changed solvers, restored afterwards."""
    layers = [layer for _, layer in equilibrium_layers(model)]
    before = [layer.solver for layer in layers]
    try:
        for layer in layers:
            layer.solver = change(layer.solver)
        yield
    finally:
        for layer, solver in zip(layers, before, strict=True):
            layer.solver = solver


def _proving(solver: Solver) -> Solver:
    if not isinstance(solver, IterativeSolver):
        return solver
    return replace(solver, proof_dtype=torch.float64, on_failure="ignore")


def _cut(steps: int) -> Callable[[Solver], Solver]:
    """Plain Picard steps, whatever the layer's own solver does: depth counts applications of f."""
    return lambda _: Picard(tol=1e-30, max_steps=steps, stop="residual", on_failure="ignore")


def _accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / max(sum(len(y) for _, y in batches), 1)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> dict[str, Any]:
    """Accuracy, confusion matrix, certified errors, enclosure widths, steps, and accuracy with the solve cut short.

    Args:
        model: logits (batch, classes); left in eval mode.
        batches: (input, label) pairs; kept in memory.
        classes: number of classes.
    """
    model.eval()
    data = list(batches)
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    names = [name for name, _ in equilibrium_layers(model)]
    collected: dict[str, dict[str, list[Tensor]]] = {
        n: {"error": [], "width": [], "steps": [], "depth": []} for n in names
    }
    proven = total = 0
    with _solvers(model, _proving):
        for x, y in data:
            predicted = model(x).argmax(1)
            confusion += torch.bincount(y.cpu() * classes + predicted.cpu(), minlength=classes**2).reshape(
                classes, classes
            )
            for name, layer in equilibrium_layers(model):
                s = layer.last_solution
                assert s is not None
                store = collected[name]
                errors = certified_errors(s).double().cpu()
                store["error"].append(errors)
                store["steps"].append(s.steps.double().cpu())
                if s.lower is not None and s.upper is not None:
                    store["width"].append(((s.upper - s.lower) / s.lower).flatten(1).median(1).values.double().cpu())
                proven += int(errors.isfinite().sum())
                total += len(errors)
        full = int(confusion.diag().sum()) / max(int(confusion.sum()), 1)
    depth = {}
    for cut in CUTS:
        with _solvers(model, _cut(cut)):
            depth[str(cut)] = _accuracy(model, data)
    return {
        "accuracy": full,
        "samples": int(confusion.sum()),
        "confusion": confusion.tolist(),
        "certificate": str(certify(model)),
        "enclosures_proven": proven,
        "enclosures": total,
        "depth": {**depth, "full": full},
        "layers": {
            name: {
                "error_bound": _finite(store["error"]),
                "width": _finite(store["width"]),
                "steps": _finite(store["steps"]),
                "change": _change(model, name, data),
                "spectral_radius": spectral_radius(dict(equilibrium_layers(model))[name]),
            }
            for name, store in collected.items()
        },
    }


def _finite(parts: list[Tensor]) -> list[float]:
    """Four digits each, rounded up: most of them are bounds."""
    if not parts:
        return []
    values = torch.cat(parts)
    return [float(at_most(v, ".3e")) for v in values[values.isfinite()].tolist()]


def _change(model: nn.Module, name: str, data: list[tuple[Tensor, Tensor]]) -> float:
    """Mean over the first batch of ||z* - f(0)|| / ||z*||: how far the equilibrium is from one evaluation."""
    layer = dict(equilibrium_layers(model))[name]
    captured: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    try:
        if data:
            model(data[0][0])
    finally:
        handle.remove()
    if not captured:
        return float("nan")
    z = layer.solve(captured[0]).value
    with _solvers(layer, _cut(1)):
        first = layer.solve(captured[0]).value
    return float(((z - first).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1).clamp_min(1e-30)).mean())
