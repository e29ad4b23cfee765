"""Node classification with equilibrium propagation beside APPNP, on the same random splits: `perron fit cora`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perron.cells.sparse import sparse_product
from perron.data.graphs import GraphData, random_split, read_graph
from perron.nn import GraphEquilibrium
from perron.nn.graph import Adjacency, Place
from perron.report.propagation import text_table, write_propagation
from perron.solvers import Auto
from perron.training.module import certified_errors
from perron.training.records import UsageError, measured, study

__all__ = ["PROPAGATIONS", "GraphNet", "GraphSettings", "fit_graph"]

# Hidden width, dropout and optimiser are the same for all models.
PROPAGATIONS = ("pcdeq", "subdeq", "appnp", "none")
# Of APPNP. The equilibrium gets small scores, for which the softplus that makes them positive is nearly linear, and gives
# small ones back; both numbers were chosen by validation on one split of Cora.
_STEPS, _GAIN, _SCALE = 10, 0.05, 100.0
# What the table and the page are made of.
_KEYS = ("test", "validation", "epochs", "history", "seconds", "evaluations", "certificate", "proven", "error")


@dataclass(frozen=True)
class GraphSettings:
    """What all models of a run have in common.

    Attributes:
        epochs, patience: at most so many, and so many without a better validation accuracy.
        hidden: width of the two-layer network before the propagation; dropout in it.
        learning_rate, weight_decay: of Adam.
        alpha: share of the injection in the propagation.
        tol: of the solver in training; the test is solved and proven to 1e-4.
    """

    epochs: int = 200
    patience: int = 50
    hidden: int = 64
    dropout: float = 0.5
    learning_rate: float = 0.01
    weight_decay: float = 5e-4
    alpha: float = 0.1
    tol: float = 1e-3


class GraphNet(nn.Module):
    """Dropout, Linear, ReLU, dropout, Linear, and propagation of the class scores.

    Args:
        propagation: "pcdeq" (z = tanh(0.9 A z + 0.1 b)), "subdeq" (z = tanh(0.9 A z) + 0.1 b), both with b > 0, "appnp"
            (10 steps) or "none".
        data: the graph.
        settings: see there.
    """

    def __init__(self, propagation: str, data: GraphData, settings: GraphSettings) -> None:
        super().__init__()
        if propagation not in PROPAGATIONS:
            raise ValueError(f"unknown propagation {propagation!r}; choose one of {', '.join(PROPAGATIONS)}")
        self.dropout, self.alpha = settings.dropout, settings.alpha
        self.steps = _STEPS if propagation == "appnp" else 0
        self.first = nn.Linear(data.features.shape[1], settings.hidden)
        self.second = nn.Linear(settings.hidden, data.classes)
        self.propagate: GraphEquilibrium | None = None
        if propagation in ("pcdeq", "subdeq"):
            place: Place = "inside" if propagation == "pcdeq" else "outside"
            solver = Auto(tol=settings.tol, max_steps=500, proof_dtype=None, on_failure="ignore")
            self.propagate = GraphEquilibrium("tanh", alpha=settings.alpha, injection=place, solver=solver)
            self.scale = nn.Parameter(torch.tensor(_SCALE))
        self._adjacency = Adjacency()

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        h = F.relu(self.first(F.dropout(x, self.dropout, self.training)))
        h = self.second(F.dropout(h, self.dropout, self.training))
        if self.propagate is not None:
            return self.scale * self.propagate(_GAIN * h, edge_index, edge_weight)
        return self._appnp(h, edge_index, edge_weight) if self.steps else h

    def _appnp(self, h: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        pattern, values = self._adjacency(edge_index, edge_weight, len(h))
        z, values = h.t(), values.to(h)
        for _ in range(self.steps):
            z = (1 - self.alpha) * sparse_product(pattern, values, z) + self.alpha * h.t()
        return z.t()


def fit_graph(
    name: str,
    propagations: Sequence[str],
    splits: int,
    settings: GraphSettings,
    root: Path,
    *,
    data_dir: str | None = None,
    write: Callable[[str], None] = print,
) -> str:
    """Train every model on every random split that has no result yet; writes a page, returns a table of test accuracies.

    Args:
        name: in `perron.data.graphs.GRAPHS`.
        propagations: among `PROPAGATIONS`.
        splits: how many random splits, from seed 0.
        settings: common to all.
        root: folder of all runs; results go to its folder of that name.
        data_dir: folder of the data files.
        write: takes a line of progress.

    Raises:
        UsageError: an unknown model, or settings other than those of earlier results.
        DataError: the graph is missing or damaged.
        BusyError: another process works in the same folder.
    """
    unknown = [p for p in propagations if p not in PROPAGATIONS]
    if unknown or not propagations or splits < 1:
        raise UsageError(f"choose models among {', '.join(PROPAGATIONS)}, and at least one split")
    data = read_graph(name, data_dir)
    folder = root / name
    graph = {
        "nodes": f"{len(data.features):,}",
        "edges": f"{data.edge_index.shape[1] // 2:,}",
        "classes": data.classes,
    }
    results: dict[str, list[dict[str, Any]]] = {p: [] for p in propagations}
    with study(folder, {**asdict(settings), **graph}, graph):
        for seed in range(splits):
            for propagation in propagations:
                result = measured(
                    folder / f"{propagation}-split-{seed}.json",
                    {"propagation": propagation, "split": seed},
                    _KEYS,
                    partial(_train, propagation, data, seed, settings),
                )
                results[propagation].append(result)
                write(
                    f"{name}, split {seed + 1}/{splits}, {propagation}: test {result['test']:.2%}, validation "
                    f"{result['validation']:.2%}, {result['epochs']} epochs, {result['seconds']:.0f} s"
                )
        page = write_propagation(folder / "report.html", name, results, asdict(settings), graph)
    return f"{text_table(results)}\npage: {page}"


def _train(propagation: str, data: GraphData, seed: int, settings: GraphSettings) -> dict[str, Any]:
    """Full-batch training; the weights of the best validation accuracy are tested, once."""
    torch.manual_seed(seed)
    train, validation, test = random_split(data, seed)
    net = GraphNet(propagation, data, settings)
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    graph = data.features, data.edge_index, data.edge_weight
    history: list[float] = []
    best, weights, waited, epoch = (-1.0, -math.inf), copy.deepcopy(net.state_dict()), 0, 0
    start = time.perf_counter()
    while waited < settings.patience and epoch < settings.epochs:
        epoch += 1
        net.train()
        optimizer.zero_grad()
        F.cross_entropy(net(*graph)[train], data.label[train]).backward()
        optimizer.step()
        net.eval()
        with torch.no_grad():
            logits = net(*graph)[validation]
        # Ties are decided by the loss.
        score = _accuracy(logits, data.label[validation]), -float(F.cross_entropy(logits, data.label[validation]))
        history.append(score[0])
        waited += 1
        if score > best:
            best, weights, waited = score, copy.deepcopy(net.state_dict()), 0
    seconds = time.perf_counter() - start
    net.load_state_dict(weights)
    net.eval()
    layer = net.propagate
    if layer is not None:
        layer.solver = Auto(tol=1e-4, max_steps=500, on_failure="ignore")
    with torch.no_grad():
        logits = net(*graph)
    solution = None if layer is None else layer.last_solution
    return {
        "test": _accuracy(logits[test], data.label[test]),
        "validation": best[0],
        "epochs": epoch,
        "history": history,
        "seconds": seconds,
        "evaluations": None if solution is None else float(solution.steps.double().mean()),
        "certificate": None if layer is None else layer.certificate().kind,
        "proven": None if solution is None else bool(solution.proven.all()),
        "error": None if solution is None else float(certified_errors(solution).max()),
    }


def _accuracy(logits: Tensor, label: Tensor) -> float:
    return float((logits.argmax(1) == label).double().mean())
