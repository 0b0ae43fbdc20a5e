"""One run saves into a directory; another is told so at its first save."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import preloaded
import pytest

import jaxsparse as js
from jaxsparse.checkpoint import _lock

WRITER = pathlib.Path(__file__).with_name("writer.py")
PARAMS = {"w": np.ones((4, 2), np.float32)}
save, steps = js.checkpoint.save, js.checkpoint.steps


def lock_of(directory):
    return json.loads((directory / _lock.NAME).read_text())


def belongs_to(directory, owner):
    """Lets the directory be another's, as far as its lock says."""
    (directory / _lock.NAME).write_text(json.dumps(lock_of(directory) | owner))


def is_dead(pid):
    """Whether a process has ended, be it that it is waited for or not."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return "State:\tZ" in status


def test_of_two_that_begin_at_once_one_is_refused(tmp_path):
    run, start, stop = tmp_path / "run", tmp_path / "start", tmp_path / "stop"
    writers = []
    for number in range(2):
        said = tmp_path / f"said_{number}.txt"
        arguments = map(str, (run, number, start, stop))
        process = preloaded.start(WRITER, *arguments, environment={}, output=said)
        writers.append((process, said))
    start.touch()
    try:
        deadline = time.time() + 300
        while all(p.is_alive() for p, _ in writers) and time.time() < deadline:
            time.sleep(0.01)
        (refused,) = [n for n, (p, _) in enumerate(writers) if not p.is_alive()]
        wins = writers[1 - refused][0]
        while len(steps(run)) < 3 and wins.is_alive():
            time.sleep(0.01)
        text = writers[refused][1].read_text()
        assert "refused at step 1: [Errno 16] another run saves its check" in text
        assert f"process {wins.pid} on host" in text
        assert lock_of(run)["process"] == wins.pid
        wins.kill()  # and not yet waited for: it is dead even so
        while not is_dead(wins.pid):
            time.sleep(0.001)
        last = js.checkpoint.latest_step(run)
        restored = js.checkpoint.restore(run, params={"w": np.zeros((64, 8), "f4")})
        assert np.all(restored.params["w"] == 1 - refused)
        save(run, step=last + 1, params=PARAMS)
        assert steps(run)[-2:] == [last, last + 1]
        assert lock_of(run)["process"] == os.getpid()
    finally:
        for process, _ in writers:
            process.kill()
            process.join()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    save(tmp_path, step=1, params=PARAMS)
    own = lock_of(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for owner in (
        {"process": dead.pid},
        {"began": "1"},  # another process had this number
        {"boot": "before", "process": os.getppid()},
        {"directory": 1, "process": os.getppid()},  # a copy of another's
        {"processes": "pid:[1]"},  # of a container that is gone
    ):
        belongs_to(tmp_path, owner)
        save(tmp_path, step=2, params=PARAMS)
        assert lock_of(tmp_path) == own, owner
    assert sorted(os.listdir(tmp_path)) == [_lock.NAME, "1", "2"]


def test_a_living_owner_or_one_that_cannot_be_seen_is_not(tmp_path):
    save(tmp_path, step=1, params=PARAMS)
    parent = {"process": os.getppid(), "began": _lock._began(os.getppid())}
    for owner, said in (
        (parent, rf"process {os.getppid()} on host"),
        ({"host": "elsewhere"}, r"on host 'elsewhere'.*has ended, delete the file \.l"),
        ({"process": "x"}, r"which its lock does not name"),
    ):
        belongs_to(tmp_path, owner)
        with pytest.raises(OSError, match=f"another run saves .*{said}"):
            save(tmp_path, step=2, params=PARAMS)
        assert steps(tmp_path) == [1]
        (tmp_path / _lock.NAME).unlink()
        save(tmp_path, step=1, params=PARAMS)
    (tmp_path / _lock.NAME).write_text("{")
    with pytest.raises(OSError, match="which its lock does not name"):
        save(tmp_path, step=2, params=PARAMS)


def test_a_child_of_the_owner_is_another_run(tmp_path, monkeypatch):
    save(tmp_path, step=1, params=PARAMS)
    owner = os.getpid()
    monkeypatch.setattr(os, "getpid", os.getppid)
    with pytest.raises(OSError, match=f"process {owner} on host"):
        save(tmp_path, step=2, params=PARAMS)
    assert steps(tmp_path) == [1]


IS_ALIVE = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("lock", sys.argv[1])
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
file = pathlib.Path(sys.argv[2])
owner = lock._parsed(file.read_text())
print(lock._is_alive(owner, owner | {"processes": "pid:[1]"}, file))
"""


def test_a_process_of_another_container_is_known_by_its_lock(tmp_path):
    save(tmp_path, step=1, params=PARAMS)
    arguments = [_lock.__file__, str(tmp_path / _lock.NAME)]

    def look():
        command = [sys.executable, "-c", IS_ALIVE, *arguments]
        return subprocess.run(command, capture_output=True, check=True).stdout.strip()

    assert look() == b"True"
    os.close(_lock._kept[tmp_path / _lock.NAME].handle)  # as if it had ended
    assert look() == b"False"


def test_threads_of_one_process_take_turns(tmp_path):
    errors = []

    def saves(begin):
        try:
            for step in range(begin, begin + 6, 2):
                save(tmp_path, step=step, params=PARAMS, keep=20)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=saves, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert steps(tmp_path) == list(range(6))


def test_the_lock_goes_with_the_process_and_a_removed_directory(tmp_path):
    run = tmp_path / "run"
    save(run, step=1, params=PARAMS)
    shutil.rmtree(run)
    save(run, step=1, params=PARAMS)
    assert lock_of(run)["process"] == os.getpid()
    _lock._leave()
    assert os.listdir(run) == ["1"]
