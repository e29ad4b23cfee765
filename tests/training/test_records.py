import pytest
import torch

from perron._errors import UsageError
from perron.training.records import WholeCheckpoints, differences, read_checkpoint


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
