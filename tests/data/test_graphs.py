from pathlib import Path

import numpy as np
import pytest
import torch

from perron.data import DataError
from perron.data.graphs import GRAPHS, clique_expansion, random_split, read_graph
from problems import write_graph

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_clique_expansion() -> None:
    edges, weight = clique_expansion(np.array([0, 3, 5, 6]), np.array([0, 1, 2, 1, 2, 3]))
    found = {(int(a), int(b)): float(w) for a, b, w in zip(*edges, weight, strict=True)}
    assert found == {(0, 1): 1, (1, 0): 1, (0, 2): 1, (2, 0): 1, (1, 2): 2, (2, 1): 2}


@pytest.mark.parametrize(("name", "hyper"), [("cora", False), ("citeseer-hypergraph", True)])
def test_reading_and_splitting(tmp_path, name: str, hyper: bool) -> None:
    write_graph(tmp_path / "graphs", name, nodes=900, hyper=hyper)
    data = read_graph(name, tmp_path)
    assert data.features.shape == (900, 12)
    torch.testing.assert_close(data.features.sum(1), torch.ones(900))
    assert data.edge_index.shape[1] == len(data.edge_weight)
    train, validation, test = random_split(data, 3)
    again = random_split(data, 3)[0]
    assert torch.equal(train, again)
    assert not torch.equal(train, random_split(data, 4)[0])
    everything = torch.cat([train, validation, test])
    assert len(torch.unique(everything)) == len(everything) == 900
    assert torch.bincount(data.label[train]).tolist() == [data.known // 3] * 3


def test_what_is_missing_or_damaged_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PERRON_DATA", raising=False)
    with pytest.raises(DataError, match="planetoid"):
        read_graph("cora", None)
    with pytest.raises(DataError, match="neither"):
        read_graph("cora", tmp_path)
    with pytest.raises(DataError, match="unknown graph"):
        read_graph("pubmed", tmp_path)
    write_graph(tmp_path, "cora", label=np.zeros(3, np.int16))
    with pytest.raises(DataError, match="do not fit"):
        read_graph("cora", tmp_path)
    (tmp_path / GRAPHS["cora"][0]).write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="damaged"):
        read_graph("cora", tmp_path)


@pytest.mark.skipif(not (SHARED / "graphs").is_dir(), reason="needs the shared data")
@pytest.mark.parametrize("name", GRAPHS)
def test_the_real_graphs(name: str) -> None:
    data = read_graph(name, SHARED)
    assert len(data.features) in (2708, 3327, 3312)
    assert data.classes in (6, 7)
    train, _, test = random_split(data, 0)
    assert 0.03 < len(train) / len(data.label) < 0.06
    assert len(test) > 1000
