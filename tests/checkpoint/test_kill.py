"""A training killed at any moment, in mid-save too, ends with the same bits."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

import jaxsparse as js

TRAINER = pathlib.Path(__file__).with_name("trainer.py")
STEPS = 28
TEMPORARY = "*.orbax-checkpoint-tmp"


@pytest.fixture
def start(tmp_path):
    """Starts a trainer in a process of its own."""
    env = dict(os.environ)
    env["XLA_FLAGS"] = ""  # one device
    # Only the first process compiles; the others read what it compiled.
    env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    started = []

    def _start(directory):
        process = subprocess.Popen(
            [sys.executable, str(TRAINER), str(directory), str(STEPS)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield _start
    for process in started:
        process.kill()
        process.communicate()


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return dict(line.rsplit(maxsplit=1) for line in out.splitlines())


def temporaries(directory):
    return {path.name for path in directory.glob(TEMPORARY)}


def third_save_begins(process, directory):
    """Waits until the process writes its third checkpoint."""
    before, seen = temporaries(directory), set()
    while len(seen) < 3 and process.poll() is None:
        seen |= temporaries(directory) - before
        time.sleep(0.0002)


def first_save_is_whole(process, directory):
    """Waits until the process has written a checkpoint."""
    before = js.checkpoint.latest_step(directory)
    while js.checkpoint.latest_step(directory) == before and process.poll() is None:
        time.sleep(0.002)


def test_killed_at_any_moment_it_ends_bit_identical(start, tmp_path):
    expected = finish(start(tmp_path / "whole"))
    assert js.checkpoint.steps(tmp_path / "whole") == [STEPS - 1, STEPS]

    directory = tmp_path / "killed"
    hits, reached = 0, 0
    for wait, delay in (
        (third_save_begins, 0.0),
        (third_save_begins, 0.005),
        (third_save_begins, 0.015),
        (first_save_is_whole, random.Random(0).uniform(0.0, 0.1)),
    ):
        process = start(directory)
        wait(process, directory)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"

        half_written = {int(name.split(".")[0]) for name in temporaries(directory)}
        assert half_written.isdisjoint(js.checkpoint.steps(directory))
        hits += bool(half_written)
        latest = js.checkpoint.latest_step(directory)
        assert latest is not None
        assert latest > reached
        reached = latest
    assert hits > 0, "no kill hit a half-written checkpoint"

    got = finish(start(directory))
    assert int(got["began at"]) == reached
    assert got["hash"] == expected["hash"]
    assert js.checkpoint.steps(directory) == [STEPS - 1, STEPS]
    assert temporaries(directory) == set()  # cleared away
