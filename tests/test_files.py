import json
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from perron._files import BusyError, lock, new_folder, read_json, replacing, write_json


def test_a_block_that_fails_leaves_what_was_there(tmp_path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("whole")

    def fail() -> None:
        with replacing(path) as file:
            file.write("half")
            file.flush()
            assert path.read_text() == "whole"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text() == "whole"
    with replacing(path) as file:
        file.write("new")
    assert path.read_text() == "new"


def test_a_killed_writer_leaves_no_result(tmp_path) -> None:
    """Neither under the name, nor under one that a search for results finds."""
    code = (
        "import os, signal, sys; from pathlib import Path; from perron._files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write('{'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "core-seed-0.json")])
    assert ended.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*-seed-*.json"))


def test_what_is_no_object_is_no_result(tmp_path) -> None:
    path = tmp_path / "result.json"
    assert read_json(path) is None
    for text in ("", '{"accuracy": 0.', "[1, 2]", "\x00\x01"):
        path.write_text(text)
        assert read_json(path) is None
    path.write_bytes(b"\xff\xfe")
    assert read_json(path) is None
    write_json(tmp_path / "new" / "result.json", {"accuracy": 0.5})
    assert read_json(tmp_path / "new" / "result.json") == {"accuracy": 0.5}
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "result.json", {"accuracy": object()})
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {"accuracy": 0.5}


def test_folders_of_callers_that_start_together_differ(tmp_path) -> None:
    together = Barrier(8)

    def make(_: int) -> str:
        together.wait()
        return new_folder(tmp_path / "digits", "run").name

    (tmp_path / "digits" / "run-9").mkdir(parents=True)
    (tmp_path / "digits" / "run-old").mkdir()
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(make, range(8)))
    assert sorted(names, key=lambda n: int(n[4:])) == [f"run-{n}" for n in range(10, 18)]


def hold(path: str, ready, end) -> None:
    from pathlib import Path

    with lock(Path(path)):
        ready.set()
        end.wait(30)


def test_a_lock_is_held_by_one_process_and_freed_by_its_death(tmp_path) -> None:
    path = tmp_path / ".lock"
    with lock(path), pytest.raises(BusyError, match=f"process {os.getpid()} on .* is writing into"), lock(path):
        pass
    with lock(path):
        pass
    assert path.read_text() == ""
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(str(path), ready, end))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(BusyError, match=f"process {holder.pid} "), lock(path):
        pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    # The file of the dead process is still there, with its name in it.
    assert str(holder.pid) in path.read_text()
    with lock(path):
        assert path.read_text() == f"process {os.getpid()} on {os.uname().nodename}"
