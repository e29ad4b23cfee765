import json

import pytest
import torch

from perron._files import BusyError, lock
from perron.cli import main
from perron.data import DataError
from perron.data.graphs import read_graph
from perron.training.graphs import PROPAGATIONS, GraphNet, GraphSettings, fit_graph
from perron.training.run import UsageError
from problems import write_graph

QUICK = GraphSettings(epochs=15, hidden=8)


def test_table_and_resumption(tmp_path, monkeypatch) -> None:
    write_graph(tmp_path / "data", "cora", nodes=600)
    lines: list[str] = []
    table = fit_graph(
        "cora", PROPAGATIONS, 2, QUICK, tmp_path / "runs", data_dir=str(tmp_path / "data"), write=lines.append
    )
    assert len(lines) == 8
    # Accuracies of all four, and the evaluations of the two equilibria.
    assert table.count("±") == 6
    assert table.count("| positive concave | 2/2 |") == 2
    page = (tmp_path / "runs" / "cora" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "600" in page
    result = json.loads((tmp_path / "runs" / "cora" / "pcdeq-split-1.json").read_text())
    assert result["proven"]
    assert result["error"] <= 1e-4
    before = (tmp_path / "runs" / "cora" / "pcdeq-split-1.json").stat().st_mtime_ns
    again = fit_graph(
        "cora", PROPAGATIONS, 2, QUICK, tmp_path / "runs", data_dir=str(tmp_path / "data"), write=lines.append
    )
    assert again == table
    monkeypatch.setattr("perron.training.graphs.write_propagation", lambda path, *_: path)
    half = tmp_path / "runs" / "cora" / "appnp-split-0.json"
    text = half.read_text()
    for damaged in (text[: len(text) // 2], "", json.dumps({**json.loads(text), "split": 4})):
        half.write_text(damaged)
        fit_graph("cora", ["appnp"], 1, QUICK, tmp_path / "runs", data_dir=str(tmp_path / "data"), write=lines.append)
        assert json.loads(half.read_text())["history"] == json.loads(text)["history"]
    # Another graph under the same name is another study.
    write_graph(tmp_path / "other", "cora", nodes=300)
    with pytest.raises(UsageError, match="nodes is '600' there, '300' was given"):
        fit_graph("cora", ["appnp"], 1, QUICK, tmp_path / "runs", data_dir=str(tmp_path / "other"), write=lines.append)
    with lock(tmp_path / "runs" / "cora" / ".lock"), pytest.raises(BusyError):
        fit_graph("cora", ["appnp"], 1, QUICK, tmp_path / "runs", data_dir=str(tmp_path / "data"), write=lines.append)
    assert (tmp_path / "runs" / "cora" / "pcdeq-split-1.json").stat().st_mtime_ns == before


def test_appnp_is_the_published_iteration(tmp_path) -> None:
    write_graph(tmp_path, "cora", nodes=60)
    data = read_graph("cora", tmp_path)
    torch.manual_seed(0)
    net = GraphNet("appnp", data, QUICK).eval()
    found = net(data.features, data.edge_index, data.edge_weight)
    h = net.second(torch.relu(net.first(data.features)))
    a = torch.eye(60).index_put((data.edge_index[1], data.edge_index[0]), data.edge_weight, accumulate=True)
    scale = a.sum(1).rsqrt()
    a, z = scale[:, None] * a * scale, h
    for _ in range(10):
        z = 0.9 * a @ z + 0.1 * h
    torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-5)


def test_misuse(tmp_path, capsys) -> None:
    write_graph(tmp_path, "cora", nodes=60)
    with pytest.raises(UsageError, match="choose models"):
        fit_graph("cora", ["gcn"], 1, QUICK, tmp_path / "r", data_dir=str(tmp_path))
    with pytest.raises(UsageError, match="at least one split"):
        fit_graph("cora", ["none"], 0, QUICK, tmp_path / "r", data_dir=str(tmp_path))
    fit_graph("cora", ["none"], 1, QUICK, tmp_path / "r", data_dir=str(tmp_path), write=lambda line: None)
    with pytest.raises(UsageError, match="other settings"):
        fit_graph("cora", ["none"], 1, GraphSettings(epochs=3), tmp_path / "r", data_dir=str(tmp_path))
    with pytest.raises(DataError):
        fit_graph("pubmed", ["none"], 1, QUICK, tmp_path / "r", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="unknown propagation"):
        GraphNet("gcn", read_graph("cora", tmp_path), QUICK)
    arguments = ["fit", "cora", "--runs", str(tmp_path / "s"), "--data-dir", str(tmp_path)]
    assert main([*arguments, "--splits", "1", "--models", "none,appnp", "--epochs", "3"]) == 0
    assert "| appnp |" in capsys.readouterr().out
    assert main(["fit", "cora", "--runs", str(tmp_path / "s"), "--data-dir", str(tmp_path / "nowhere")]) == 2
    assert "planetoid-cora.npz" in capsys.readouterr().err


def test_an_interrupted_study_says_how_it_goes_on(tmp_path, monkeypatch, capsys) -> None:
    write_graph(tmp_path, "cora", nodes=60)

    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("perron.training.graphs._train", stop)
    assert main(["fit", "cora", "--runs", str(tmp_path), "--data-dir", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
