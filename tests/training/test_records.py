import json

import pytest
import torch

from perron._files import BusyError, lock
from perron.training.records import (
    UsageError,
    WholeCheckpoints,
    differences,
    measured,
    read_checkpoint,
    result_of,
    study,
    versions,
)

IDENTITY, KEYS = {"core": "deq", "seed": 0}, ("accuracy",)


def test_only_a_whole_result_of_the_same_thing_counts(tmp_path) -> None:
    path = tmp_path / "deq-seed-0.json"
    whole = {**IDENTITY, "accuracy": 0.5}
    for text in ("", '{"core": "deq", "accuracy": 0.', "[]", json.dumps({**whole, "seed": 1}), json.dumps(IDENTITY)):
        path.write_text(text)
        assert result_of(path, IDENTITY, KEYS) is None
        assert measured(path, IDENTITY, KEYS, lambda: {"accuracy": 0.25})["accuracy"] == 0.25
        assert json.loads(path.read_text()) == {**IDENTITY, "accuracy": 0.25, "versions": versions()}
    path.write_text(json.dumps({"accuracy": 0.5}))
    assert measured(path, IDENTITY, KEYS, lambda: {"accuracy": 0.25}) == whole


def test_a_study_is_of_one_process_and_of_the_same_settings(tmp_path) -> None:
    settings = {"epochs": 3, "limit": None}
    with study(tmp_path, settings), pytest.raises(BusyError, match="process"), study(tmp_path, settings):
        pass
    other = pytest.raises(UsageError, match=r"other settings \(epochs is 3 there, 4 was given\)")
    with other, study(tmp_path, {"epochs": 4, "limit": None}):
        pass
    # A setting that came later.
    with study(tmp_path, {"epochs": 3, "limit": None, "network": "linear"}, {"network": "linear"}):
        pass
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UsageError, match=r"settings\.json is damaged"), study(tmp_path, {"epochs": 3}):
        pass
    assert (tmp_path / "settings.json").read_text() == "{"
    with lock(tmp_path / ".lock"):
        pass


def test_a_checkpoint_that_is_not_written_to_its_end_leaves_the_last_one(tmp_path, monkeypatch) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    state = {"epoch": 0, "global_step": 3, "state_dict": {}, "callbacks": {"Provenance": {"sittings": []}}}
    WholeCheckpoints().save_checkpoint(state, path)
    save = torch.save

    def half(checkpoint, partial) -> None:
        save(checkpoint, partial)
        partial.write_bytes(partial.read_bytes()[:100])
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        WholeCheckpoints().save_checkpoint({**state, "epoch": 1}, path)
    assert read_checkpoint(path)["epoch"] == 0
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_what_is_no_checkpoint_is_named(tmp_path) -> None:
    path = tmp_path / "last.ckpt"
    for wrong in ({"epoch": 0}, [1], {"epoch": 0, "global_step": 0, "state_dict": {}, "callbacks": {}}):
        torch.save(wrong, path)
        with pytest.raises(UsageError, match=r"last\.ckpt is not a checkpoint of perron"):
            read_checkpoint(path)
    for raw in (b"", b"PK\x03\x04 half", path.read_bytes()[:300]):
        path.write_bytes(raw)
        with pytest.raises(UsageError, match=r"last\.ckpt is damaged"):
            read_checkpoint(path)


def test_differences_are_of_every_depth_and_of_missing_options() -> None:
    stored = {"model": {"a": 1, "b": {}}, "seed": 0}
    assert differences(stored, stored, ()) == []
    assert differences(stored, {"model": {"a": 2, "b": {"c": 3}}, "seed": 1}, ("seed",)) == [
        "model.a is 1 there, 2 was given",
        "model.b is {} there, None was given",
        "model.b.c is None there, 3 was given",
    ]
