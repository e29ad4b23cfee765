import json
from dataclasses import replace

import pytest
import torch

from perron._errors import UsageError
from perron._files import BusyError, lock
from perron.cli import main
from perron.data import DataError
from perron.data.graphs import read_graph
from perron.studies.graphs import GraphNet, Graphs
from problems import write_graph

QUICK = Graphs(epochs=15, hidden=8, splits=2)


def test_table_and_resumption(tmp_path, monkeypatch) -> None:
    write_graph(tmp_path / "data", "cora", nodes=600)
    study = replace(QUICK, data_dir=str(tmp_path / "data"))
    one = replace(study, models=("appnp",), splits=1)
    folder = tmp_path / "runs" / "graphs" / "cora"
    lines: list[str] = []
    table = study.run(tmp_path / "runs", write=lines.append)
    assert len(lines) == 8
    # Accuracies of all four, and the evaluations of the two equilibria.
    assert table.count("±") == 6
    assert table.count("| positive concave | 2/2 |") == 2
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "600" in page
    result = json.loads((folder / "pcdeq-split-1.json").read_text())
    assert result["proven"]
    assert result["error"] <= 1e-4
    before = (folder / "pcdeq-split-1.json").stat().st_mtime_ns
    again = study.run(tmp_path / "runs", write=lines.append)
    assert again == table
    monkeypatch.setattr("perron.studies.graphs.write_propagation", lambda path, *_: path)
    half = folder / "appnp-split-0.json"
    text = half.read_text()
    for damaged in (text[: len(text) // 2], "", json.dumps({**json.loads(text), "split": 4})):
        half.write_text(damaged)
        one.run(tmp_path / "runs", write=lines.append)
        assert json.loads(half.read_text())["history"] == json.loads(text)["history"]
    # Another graph under the same name is another study.
    write_graph(tmp_path / "other", "cora", nodes=300)
    with pytest.raises(UsageError, match="nodes is '600' there, '300' was given"):
        replace(one, data_dir=str(tmp_path / "other")).run(tmp_path / "runs", write=lines.append)
    with lock(folder / ".lock"), pytest.raises(BusyError):
        one.run(tmp_path / "runs", write=lines.append)
    assert (folder / "pcdeq-split-1.json").stat().st_mtime_ns == before


def test_appnp_is_the_published_iteration(tmp_path) -> None:
    write_graph(tmp_path, "cora", nodes=60)
    data = read_graph("cora", tmp_path)
    torch.manual_seed(0)
    net = GraphNet("appnp", data, hidden=8).eval()
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
    none = replace(QUICK, models=("none",), splits=1, data_dir=str(tmp_path))
    for wrong, message in (({"models": ("gcn",)}, "choose models"), ({"splits": 0}, "at least one split")):
        with pytest.raises(UsageError, match=message):
            replace(none, **wrong).run(tmp_path / "r")
    none.run(tmp_path / "r", write=lambda line: None)
    with pytest.raises(UsageError, match="other settings"):
        replace(none, epochs=3).run(tmp_path / "r")
    with pytest.raises(DataError):
        replace(none, data="pubmed").run(tmp_path / "r")
    with pytest.raises(ValueError, match="unknown propagation"):
        GraphNet("gcn", read_graph("cora", tmp_path))
    arguments = ["study", "graphs", "--runs", str(tmp_path / "s"), "--data-dir", str(tmp_path)]
    assert main([*arguments, "--splits", "1", "--models", "none,appnp", "--epochs", "3"]) == 0
    assert "| appnp |" in capsys.readouterr().out
    assert main(["study", "graphs", "--runs", str(tmp_path / "s"), "--data-dir", str(tmp_path / "nowhere")]) == 2
    assert "planetoid-cora.npz" in capsys.readouterr().err


def test_an_interrupted_study_says_how_it_goes_on(tmp_path, monkeypatch, capsys) -> None:
    write_graph(tmp_path, "cora", nodes=60)

    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("perron.studies.graphs.Graphs.measure", stop)
    assert main(["study", "graphs", "--runs", str(tmp_path), "--data-dir", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
