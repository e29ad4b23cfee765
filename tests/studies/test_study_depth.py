import json

import pytest

from perron._errors import UsageError
from perron.cli import main
from perron.studies.depth import Depth


def test_table_page_and_command(tmp_path, capsys) -> None:
    assert main(["study", "depth", "--depths", "1,40", "--images", "150", "--runs", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| abs, centred | 0.000 | 0.000 | 2.752 | nearest neighbour |" in table
    assert "underflows at depth 40" in table
    folder = tmp_path / "depth" / "digits-150-images"
    assert (folder / "report.html").read_text().count("<svg") == 4
    found = json.loads((folder / "summary.json").read_text())
    rows = {row["activation"]: row for row in found["results"]}
    # A vote of all is as good as a guess; the others are classifiers.
    assert rows["sigmoid"]["limit"] < 0.3
    assert rows["sigmoid"]["depths"]["40"]["agreement"] == 1
    assert rows["relu, centred"]["limit"] > 0.8
    assert rows["tanh"]["depths"]["1"]["accuracy"] > 0.85
    errors = found["toy"]
    assert errors["singular kernel, alpha = 1"][-1] < errors["nearest neighbour"][-1] < errors["majority vote"][-1]
    assert errors["singular kernel, alpha = 1"][-1] < errors["singular kernel, alpha = 1"][0]
    # Again: what is there is read.
    path = folder / "tanh-depth-40.json"
    path.write_text('{"accuracy": 0.125, "agreement": 0.5}')
    half = folder / "relu-depth-1.json"
    before = json.loads(half.read_text())
    half.write_text('{"accuracy": 0.')
    lines: list[str] = []
    again = Depth(depths=(1, 40), images=150).run(tmp_path, write=lines.append)
    assert "| 12.50% (50%) |" in again
    assert json.loads(half.read_text()) == before
    # One of these was measured by nobody knows which version, and the page says so.
    page = (folder / "report.html").read_text()
    assert "versions that were not recorded" in page
    assert "perron " in page


def test_misuse(tmp_path, capsys) -> None:
    assert main(["study", "depth", "--data", "letters", "--runs", str(tmp_path)]) == 2
    assert "letters" in capsys.readouterr().err
    for depths, images in (((), 100), ((0,), 100), ((1,), 3)):
        with pytest.raises(UsageError, match="at least"):
            Depth(depths=depths, images=images).run(tmp_path)
