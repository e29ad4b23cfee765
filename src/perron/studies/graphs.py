"""Node classification with equilibrium propagation beside APPNP, on the same random splits."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perron._errors import UsageError
from perron.cells.sparse import sparse_product
from perron.data.graphs import GraphData, random_split, read_graph
from perron.nn import GraphEquilibrium
from perron.nn.graph import Adjacency, Place
from perron.report.propagation import COLUMNS, by_propagation, write_propagation
from perron.report.tables import Columns, Results
from perron.solvers import Auto
from perron.studies.study import Sitting, Study, Trial
from perron.training.module import certified_errors

__all__ = ["PROPAGATIONS", "GraphNet", "GraphTrial", "Graphs"]

# Hidden width, dropout and optimiser are the same for all models.
PROPAGATIONS = ("pcdeq", "subdeq", "appnp", "none")
# Of APPNP. The equilibrium gets small scores, for which the softplus that makes them positive is nearly linear, and gives
# small ones back; both numbers were chosen by validation on one split of Cora.
_STEPS, _GAIN, _SCALE = 10, 0.05, 100.0


@dataclass(frozen=True, kw_only=True)
class GraphTrial(Trial):
    """One model on one random split."""

    propagation: str
    split: int


@dataclass(frozen=True, kw_only=True)
class Graphs(Study[GraphTrial]):
    """Classify the nodes of a graph with equilibrium propagation beside APPNP and none; writes a table and a page.

    Attributes:
        data: cora, citeseer, cora-author-hypergraph, cora-cocitation-hypergraph or citeseer-hypergraph.
        models: names, separated by commas.
        splits: how many random splits, from seed 0.
        epochs: of training, at most.
        patience: so many epochs without a better validation accuracy end it.
        hidden: width of the two-layer network before the propagation.
        dropout: in that network.
        learning_rate: of Adam.
        weight_decay: of Adam.
        alpha: share of the injection in the propagation.
        tol: of the solver in training; the test is solved and proven to 1e-4.
        data_dir: folder of the data files (default $PERRON_DATA).
    """

    trial = GraphTrial
    # The graph has a folder of its own, and its size is compared.
    free = frozenset({"data", "models", "splits", "data_dir"})
    measures = ("test", "validation", "epochs", "history", "seconds", "evaluations", "certificate", "proven", "error")

    data: str = "cora"
    models: tuple[str, ...] = PROPAGATIONS
    splits: int = 5
    epochs: int = 200
    patience: int = 50
    hidden: int = 64
    dropout: float = 0.5
    learning_rate: float = 0.01
    weight_decay: float = 5e-4
    alpha: float = 0.1
    tol: float = 1e-3
    data_dir: str | None = None

    @property
    def folder(self) -> str:
        return f"graphs/{self.data}"

    @cached_property
    def graph(self) -> GraphData:
        return read_graph(self.data, self.data_dir)

    @property
    def facts(self) -> dict[str, Any]:
        nodes, edges = len(self.graph.features), self.graph.edge_index.shape[1] // 2
        return {"nodes": f"{nodes:,}", "edges": f"{edges:,}", "classes": self.graph.classes}

    def check(self) -> None:
        if not self.models or set(self.models) - set(PROPAGATIONS) or self.splits < 1:
            raise UsageError(f"choose models among {', '.join(PROPAGATIONS)}, and at least one split")

    def trials(self) -> list[GraphTrial]:
        return [GraphTrial(propagation=p, split=s) for s, p in itertools.product(range(self.splits), self.models)]

    def rank(self, trial: GraphTrial) -> tuple[int, int]:
        return PROPAGATIONS.index(trial.propagation), trial.split

    def network(self, propagation: str) -> GraphNet:
        return GraphNet(
            propagation, self.graph, hidden=self.hidden, dropout=self.dropout, alpha=self.alpha, tol=self.tol
        )

    def measure(self, trial: GraphTrial, sitting: Sitting) -> dict[str, Any]:
        """Full-batch training; the weights of the best validation accuracy are tested, once."""
        data = self.graph
        torch.manual_seed(trial.split)
        train, validation, test = random_split(data, trial.split)
        net = self.network(trial.propagation)
        optimizer = torch.optim.Adam(net.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        graph = data.features, data.edge_index, data.edge_weight
        history: list[float] = []
        best, weights, waited, epoch = (-1.0, -math.inf), copy.deepcopy(net.state_dict()), 0, 0
        start = time.perf_counter()
        while waited < self.patience and epoch < self.epochs:
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

    def said(self, result: Mapping[str, Any]) -> str:
        accuracy = f"test {result['test']:.2%}, validation {result['validation']:.2%}"
        return f"{accuracy}, {result['epochs']} epochs, {result['seconds']:.0f} s"

    def columns(self, results: Results) -> Columns:
        return COLUMNS

    def groups(self, results: Results) -> list[Results]:
        return list(by_propagation(results).values())

    def page(self, path: Path, results: Results) -> None:
        write_propagation(path, self.data, results, self.settings, self.facts)


def _accuracy(logits: Tensor, label: Tensor) -> float:
    return float((logits.argmax(1) == label).double().mean())


class GraphNet(nn.Module):
    """Dropout, Linear, ReLU, dropout, Linear, and propagation of the class scores.

    Args:
        propagation: "pcdeq" (z = tanh(0.9 A z + 0.1 b)), "subdeq" (z = tanh(0.9 A z) + 0.1 b), both with b > 0, "appnp"
            (10 steps) or "none".
        data: the graph.
        hidden, dropout, alpha, tol: see `Graphs`.
    """

    def __init__(
        self,
        propagation: str,
        data: GraphData,
        *,
        hidden: int = 64,
        dropout: float = 0.5,
        alpha: float = 0.1,
        tol: float = 1e-3,
    ) -> None:
        super().__init__()
        if propagation not in PROPAGATIONS:
            raise ValueError(f"unknown propagation {propagation!r}; choose one of {', '.join(PROPAGATIONS)}")
        self.dropout, self.alpha = dropout, alpha
        self.steps = _STEPS if propagation == "appnp" else 0
        self.first = nn.Linear(data.features.shape[1], hidden)
        self.second = nn.Linear(hidden, data.classes)
        self.propagate: GraphEquilibrium | None = None
        if propagation in ("pcdeq", "subdeq"):
            place: Place = "inside" if propagation == "pcdeq" else "outside"
            solver = Auto(tol=tol, max_steps=500, proof_dtype=None, on_failure="ignore")
            self.propagate = GraphEquilibrium("tanh", alpha=alpha, injection=place, solver=solver)
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
