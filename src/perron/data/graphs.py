"""Citation graphs from local npz files: Planetoid's Cora and CiteSeer, and three hypergraphs by clique expansion.

A file holds feature_row, feature_col, feature_value, feature_shape (the sparse features of the nodes), label (n,; -1: none)
and either edge_index (2, edges) or hyperedge_ptr and hyperedge_node (the nodes of hyperedge k are
hyperedge_node[hyperedge_ptr[k] : hyperedge_ptr[k + 1]]).
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perron.data.sources import DataError

__all__ = ["GRAPHS", "GraphData", "clique_expansion", "random_split", "read_graph"]

# File, and nodes whose label is known in training: those of Planetoid, and 4.2 to 5.2 % of the hypergraphs'.
GRAPHS: dict[str, tuple[str, int]] = {
    "cora": ("planetoid-cora.npz", 140),
    "citeseer": ("planetoid-citeseer.npz", 120),
    "cora-author-hypergraph": ("hypergraph-cora-author.npz", 140),
    "cora-cocitation-hypergraph": ("hypergraph-cora-cit.npz", 140),
    "citeseer-hypergraph": ("hypergraph-citeseer.npz", 138),
}
_VALIDATION = 500
_HELP = (
    "Planetoid is at github.com/kimiyoung/planetoid, the hypergraphs at github.com/COMPiLELab/SubDEQ; write them as npz "
    "files as perron.data.graphs describes, and name their folder with --data-dir or $PERRON_DATA"
)


@dataclass(frozen=True, kw_only=True)
class GraphData:
    """A graph with labelled nodes.

    Attributes:
        features: (nodes, features) float32, rows summing to 1.
        edge_index: (2, edges) int64, both directions of every edge.
        edge_weight: (edges,) float32.
        label: (nodes,) int64, -1 where unknown.
        known: labels that training may use.
    """

    name: str
    features: Tensor
    edge_index: Tensor
    edge_weight: Tensor
    label: Tensor
    known: int

    @property
    def classes(self) -> int:
        return int(self.label.max()) + 1


def clique_expansion(
    pointers: NDArray[np.int64], nodes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Every hyperedge as a clique: (2, edges) pairs of different nodes, and in how many hyperedges each of them is."""
    pairs = [np.zeros((2, 0), np.int64)]
    for start, end in pairwise(pointers):
        members = np.unique(nodes[start:end])
        a, b = np.meshgrid(members, members)
        pairs.append(np.stack([a[a != b], b[a != b]]))
    edges, count = np.unique(np.concatenate(pairs, 1), axis=1, return_counts=True)
    return edges.astype(np.int64), count.astype(np.float32)


def read_graph(name: str, data_dir: str | Path | None) -> GraphData:
    """The graph of that name from the folder, or from graphs/ in it; default $PERRON_DATA.

    Raises:
        DataError: the name is unknown, or the file is missing or damaged.
    """
    if name not in GRAPHS:
        raise DataError(f"unknown graph {name!r}; choose one of {', '.join(GRAPHS)}")
    file, known = GRAPHS[name]
    folder = data_dir or os.environ.get("PERRON_DATA")
    if folder is None:
        raise DataError(f"the data set {name} is not embedded. {_HELP}")
    path = next((p for p in (Path(folder) / file, Path(folder) / "graphs" / file) if p.is_file()), None)
    if path is None:
        raise DataError(f"{file} is neither in {folder} nor in its folder graphs. {_HELP}")
    try:
        with np.load(path, allow_pickle=False) as raw:
            arrays = {k: raw[k] for k in raw.files}
        count, width = (int(n) for n in arrays["feature_shape"])
        features = torch.zeros(count, width)
        rows, columns = (torch.from_numpy(arrays[f"feature_{k}"].astype(np.int64)) for k in ("row", "col"))
        features[rows, columns] = torch.from_numpy(arrays["feature_value"].astype(np.float32))
        if "edge_index" in arrays:
            edges = arrays["edge_index"].astype(np.int64)
            weight = np.ones(edges.shape[1], np.float32)
        else:
            edges, weight = clique_expansion(
                arrays["hyperedge_ptr"].astype(np.int64), arrays["hyperedge_node"].astype(np.int64)
            )
        label = torch.from_numpy(arrays["label"].astype(np.int64))
        if label.shape != (count,) or edges.min(initial=0) < 0 or edges.max(initial=0) >= count:
            raise ValueError("labels or edges do not fit the features")
    except (KeyError, ValueError, OSError, IndexError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged or of another form ({error}). {_HELP}") from error
    features = features / features.sum(1, keepdim=True).clamp_min(1e-12)
    return GraphData(
        name=name,
        features=features,
        edge_index=torch.from_numpy(edges),
        edge_weight=torch.from_numpy(weight),
        label=label,
        known=known,
    )


def random_split(data: GraphData, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes for training, validation (500) and test (all other labelled ones); as many of every class in training."""
    generator = np.random.default_rng(seed)
    label = data.label.numpy()
    per_class = max(data.known // data.classes, 1)
    train = np.concatenate([generator.permutation(np.flatnonzero(label == c))[:per_class] for c in range(data.classes)])
    rest = generator.permutation(np.setdiff1d(np.flatnonzero(label >= 0), train))
    held = min(_VALIDATION, len(rest) // 2)
    return torch.from_numpy(np.sort(train)), torch.from_numpy(rest[:held]), torch.from_numpy(rest[held:])
