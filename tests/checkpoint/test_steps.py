"""The directory: nothing whole is lost, whatever happens and whenever."""

import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

save, restore, steps = js.checkpoint.save, js.checkpoint.restore, js.checkpoint.steps
latest_step = js.checkpoint.latest_step


def params(value):
    w, mask = np.full(4, value, np.float32), np.eye(2, dtype=bool)
    return {"w": jnp.asarray(w), "mask": jnp.asarray(mask)}


TEMPLATE = params(0)


def listed(directory):
    """What is in a directory, but for the file that says who saves there."""
    return sorted(set(os.listdir(directory)) - {".lock"})


def value_at(directory, step=None):
    w = restore(directory, params=TEMPLATE, step=step).params["w"]
    return float(np.asarray(w)[0])


def test_steps(tmp_path):
    directory = tmp_path / "new" / "directory"
    assert steps(directory) == []
    assert latest_step(directory) is None
    for step in (9, 10, 0, jnp.asarray(100)):
        save(directory, step=step, params=params(step))
    assert steps(directory) == [0, 9, 10, 100]
    assert latest_step(str(directory)) == 100
    assert value_at(directory) == 100
    assert value_at(directory, step=9) == 9
    assert value_at(directory, step=jnp.asarray(10)) == 10


def test_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("here", step=1, params=params(1))
    assert value_at("here") == 1


def test_what_is_half_written_is_ignored_and_cleared_away(tmp_path):
    save(tmp_path, step=1, params=params(1))
    whole = save(tmp_path, step=2, params=params(2))
    for name in ("3.orbax-checkpoint-tmp", "4.removed", "2.removed"):
        shutil.copytree(whole, tmp_path / name)
    half = tmp_path / "5.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "_CHECKPOINT_METADATA").write_text("{")
    assert steps(tmp_path) == [1, 2]
    assert value_at(tmp_path) == 2
    save(tmp_path, step=3, params=params(3))
    assert listed(tmp_path) == ["1", "2", "3"]


def test_what_others_made_is_neither_read_nor_touched(tmp_path):
    foreign = ["notes", "7", "007", "8.tmp", "-1", "1e3"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("theirs")
    (tmp_path / "6").write_text("a file")
    assert steps(tmp_path) == []
    for step in (8, 9, 10):
        save(tmp_path, step=step, params=params(step), keep=1)
    assert steps(tmp_path) == [10]
    assert listed(tmp_path) == sorted([*foreign, "6", "10"])
    for step in (6, 7):
        with pytest.raises(FileExistsError, match=r"is not a checkpoint of jaxsparse"):
            save(tmp_path, step=step, params=params(step))
    assert (tmp_path / "7" / "file").read_text() == "theirs"


def test_keep_deletes_older_ones_only(tmp_path):
    for step in range(5):
        save(tmp_path, step=step, params=params(step), keep=3)
    assert steps(tmp_path) == [2, 3, 4]
    # Back to step 2, and on from there: what is newer is not its to delete.
    save(tmp_path, step=3, params=params(30), keep=1)
    assert steps(tmp_path) == [3, 4]
    assert value_at(tmp_path, step=3) == 30


def test_a_step_can_be_saved_once_more(tmp_path):
    for value in (1, 2, 3):
        assert save(tmp_path, step=5, params=params(value)) == tmp_path / "5"
        assert value_at(tmp_path) == value
        assert listed(tmp_path) == ["5"]


class Killed(BaseException):
    """Nothing catches it by accident."""


def killed_at(moment, monkeypatch, action):
    """Runs `action`, stopped before its `moment`-th change of the directory.

    That orbax is stopped while it writes is what `test_kill.py` tests.

    Returns:
      Whether it was stopped.
    """
    count = 0

    def may_stop():
        nonlocal count
        count += 1
        if count > moment:
            raise Killed

    rename, rmtree = pathlib.Path.rename, shutil.rmtree

    def stoppable_rename(path, target):
        may_stop()
        return rename(path, target)

    def stoppable_rmtree(path):
        may_stop()
        rmtree(path / "stamp", ignore_errors=True)
        may_stop()
        rmtree(path)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", stoppable_rename)
        patch.setattr(shutil, "rmtree", stoppable_rmtree)
        try:
            action()
        except Killed:
            return True
    return False


def test_killed_at_any_change_of_the_directory(tmp_path, monkeypatch):
    """Saving over a step, and deleting an old one, at every moment of it."""
    directory, start = tmp_path / "run", tmp_path / "start"
    save(start, step=1, params=params(1))
    save(start, step=2, params=params(2))
    save_again = lambda: save(directory, step=2, params=params(20), keep=1)
    moment, stopped = 0, True
    while stopped:
        shutil.copytree(start, directory)
        stopped = killed_at(moment, monkeypatch, save_again)
        # The new one was complete before anything changed, and stays.
        assert latest_step(directory) == 2
        assert value_at(directory) == 20
        if 1 in steps(directory):
            assert value_at(directory, step=1) == 1
        # And the next save puts all in order.
        save(directory, step=3, params=params(3), keep=2)
        assert listed(directory) == ["2", "3"]
        assert value_at(directory, step=2) == 20
        shutil.rmtree(directory)
        moment += 1
    assert moment == 8  # 7 changes, and the run to the end


@pytest.mark.parametrize(
    "odd",
    # Half of the pairs, in which every moment of either kill is there twice.
    [False, pytest.param(True, marks=pytest.mark.exhaustive)],
    ids=["", "the other half"],
)
def test_what_puts_in_order_can_be_killed_too(tmp_path, monkeypatch, odd):
    once, twice = tmp_path / "once", tmp_path / "twice"
    for first in range(4):
        save(once, step=2, params=params(2))
        assert killed_at(
            first, monkeypatch, lambda: save(once, step=2, params=params(20))
        )
        for second in range((first + odd) % 2, 7, 2):
            shutil.copytree(once, twice)
            killed_at(
                second, monkeypatch, lambda: save(twice, step=2, params=params(200))
            )
            assert steps(twice) == [2]
            assert value_at(twice) in {20, 200}
            shutil.rmtree(twice)
        shutil.rmtree(once)


def test_a_save_that_fails_leaves_all_as_it_was(tmp_path):
    save(tmp_path, step=1, params=params(1))
    with pytest.raises(TypeError, match=r"params w: .* of type object"):
        save(tmp_path, step=1, params={"w": object()})
    with pytest.raises(TypeError, match=r"extra/seed"):
        save(tmp_path, step=2, params=params(2), extra={"seed": object()})
    assert listed(tmp_path) == ["1"]
    assert value_at(tmp_path) == 1


def test_no_checkpoint_is_an_error_that_says_so(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=r"no whole checkpoint .*missing"):
        restore(missing, params=TEMPLATE)
    save(tmp_path, step=1, params=params(1))
    save(tmp_path, step=2, params=params(2))
    with pytest.raises(FileNotFoundError, match=r"of step 3; the newest are of 1, 2"):
        restore(tmp_path, params=TEMPLATE, step=3)


def test_directories_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot make this directory .*file"):
        save(tmp_path / "file", step=1, params=params(1))
    with pytest.raises(OSError, match=r"cannot make this directory .*file"):
        save(tmp_path / "file" / "below", step=1, params=params(1))
    with pytest.raises(NotADirectoryError):
        steps(tmp_path / "file")
    with pytest.raises(ValueError, match=r"expected a directory.*got 'gs://bucket/x'"):
        save("gs://bucket/x", step=1, params=params(1))
    with pytest.raises(ValueError, match=r"expected a directory.*got 'gs://bucket/x'"):
        latest_step("gs://bucket/x")
    # A user for whom nothing is forbidden cannot be refused by permissions.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"cannot write checkpoints into this"):
        save(tmp_path, step=1, params=params(1))
    assert [p.name for p in pathlib.Path(tmp_path).iterdir()] == ["file"]
