"""A training killed at any moment, in mid-save too, ends with the same bits."""

import os
import pathlib
import random
import signal
import time
from typing import Any, NamedTuple

import preloaded
import pytest

import jaxsparse as js

TRAINER = pathlib.Path(__file__).with_name("trainer.py")
STEPS = 12
TEMPORARY = "*.orbax-checkpoint-tmp"


class Started(NamedTuple):
    """A process, and the file that it prints to."""

    process: Any
    said: pathlib.Path


@pytest.fixture
def start(tmp_path):
    """Starts a trainer in a process of its own; the first writes what it compiles."""
    environment = {"XLA_FLAGS": one_device(os.environ["XLA_FLAGS"])}
    started = []

    def _start(directory, method="gradual"):
        said = tmp_path / f"said_{len(started)}.txt"
        cache = "read" if started else "write"
        arguments = str(directory), str(STEPS), cache, method
        process = preloaded.start(
            TRAINER, *arguments, environment=environment, output=said
        )
        started.append(Started(process, said))
        return started[-1]

    yield _start
    for process, _ in started:
        process.kill()
        process.join()


def one_device(flags):
    """The compiler's flags without those for several simulated devices."""
    keep = (f for f in flags.split() if "device_count" not in f)
    return " ".join(keep)


def finish(started):
    process, said = started
    assert preloaded.finish(process) == 0, said.read_text()
    return dict(line.rsplit(maxsplit=1) for line in said.read_text().splitlines())


def temporaries(directory):
    return {path.name for path in directory.glob(TEMPORARY)}


def third_save_begins(process, directory):
    """Waits until the process writes its third checkpoint."""
    before, seen = temporaries(directory), set()
    while len(seen) < 3 and process.is_alive():
        seen |= temporaries(directory) - before
        time.sleep(0.0002)


def first_save_is_whole(process, directory):
    """Waits until the process has written a checkpoint."""
    before = js.checkpoint.latest_step(directory)
    while js.checkpoint.latest_step(directory) == before and process.is_alive():
        time.sleep(0.002)


def killed(started, directory, wait, delay=0.0):
    """Kills it at a moment; whether a half-written checkpoint is left."""
    process, _ = started
    before = js.checkpoint.latest_step(directory) or 0
    wait(process, directory)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
    half_written = {int(name.split(".")[0]) for name in temporaries(directory)}
    assert half_written.isdisjoint(js.checkpoint.steps(directory))
    assert js.checkpoint.latest_step(directory) > before
    return bool(half_written)


def assert_ends_as(expected, process, directory):
    reached = js.checkpoint.latest_step(directory)
    got = finish(process)
    assert int(got["began at"]) == reached
    assert got["hash"] == expected["hash"]
    assert js.checkpoint.steps(directory) == [STEPS - 1, STEPS]
    assert temporaries(directory) == set()  # cleared away


def test_killed_in_mid_save_it_ends_bit_identical(start, tmp_path):
    expected = finish(start(tmp_path / "whole"))
    assert js.checkpoint.steps(tmp_path / "whole") == [STEPS - 1, STEPS]
    directory = tmp_path / "killed"
    # On a busy machine a signal may come when the save is done: then once more.
    tries = (killed(start(directory), directory, third_save_begins) for _ in range(6))
    assert any(tries), "no kill hit a half-written checkpoint"
    assert_ends_as(expected, start(directory), directory)


@pytest.mark.exhaustive
def test_killed_at_any_moment_it_ends_bit_identical(start, tmp_path):
    expected = finish(start(tmp_path / "whole"))
    directory = tmp_path / "killed"
    for wait, delay in (
        (third_save_begins, 0.0),
        (third_save_begins, 0.005),
        (third_save_begins, 0.015),
        (first_save_is_whole, random.Random(0).uniform(0.0, 0.1)),
    ):
        killed(start(directory), directory, wait, delay)
    assert_ends_as(expected, start(directory), directory)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["rigl", "set_", "snfs", "acdc"])
def test_masks_that_move_are_those_of_a_run_that_was_not_killed(
    start, tmp_path, method
):
    expected = finish(start(tmp_path / "whole", method))
    directory = tmp_path / "killed"
    for wait in (first_save_is_whole, third_save_begins):
        killed(start(directory, method), directory, wait)
    assert_ends_as(expected, start(directory, method), directory)
