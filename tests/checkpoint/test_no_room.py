"""A full disk and a folder that may not be written: an OSError, and nothing is left."""

import contextlib
import errno
import os
import pathlib
import resource
import tempfile

import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.checkpoint import _files

SMALL = {"w": np.ones(4, np.float32)}
LARGE = {"w": np.random.default_rng(0).standard_normal((300, 300))}


@contextlib.contextmanager
def room(size):
    """No file may be larger, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def listed(directory):
    return sorted(set(os.listdir(directory)) - {".lock"})


def test_a_full_disk_in_save(tmp_path):
    save = js.checkpoint.save
    save(tmp_path, step=1, params=SMALL)
    save(tmp_path, step=2, params=SMALL)
    for step in (2, 3):
        with (
            room(300_000),
            pytest.raises(OSError, match="could not be wri") as error,
        ):
            save(tmp_path, step=step, params=LARGE, keep=1)
        assert error.value.errno == errno.EFBIG
        assert "those before it are as they were" in str(error.value)
        assert listed(tmp_path) == ["1", "2"]
    np.testing.assert_array_equal(
        js.checkpoint.restore(tmp_path, params=SMALL).params["w"], SMALL["w"]
    )
    save(tmp_path, step=2, params=LARGE)
    assert js.checkpoint.steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (ValueError("RESOURCE_EXHAUSTED: Error writing w/0.0"), errno.ENOSPC),
        (ValueError("OUT_OF_RANGE: ... [os_error_code='122']"), errno.EDQUOT),
    ],
)
def test_in_the_words_of_orbax(tmp_path, monkeypatch, error, number):
    """And when the list of files is written, which is the last of it."""
    js.checkpoint.save(tmp_path, step=1, params=SMALL)

    def full(path):
        assert path.is_dir()
        raise error

    monkeypatch.setattr(_files, "list_files", full)
    for step in (1, 2):
        with pytest.raises(OSError, match="this checkpoint could not be") as caught:
            js.checkpoint.save(tmp_path, step=step, params=SMALL)
        assert caught.value.errno == number
        assert caught.value.__cause__ is error
        assert listed(tmp_path) == ["1"]


def test_a_disk_that_has_no_room_for_a_lock(tmp_path, monkeypatch):
    def full(path, text):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_text", full)
        with pytest.raises(OSError, match="no file can be written into") as caught:
            js.checkpoint.save(tmp_path, step=1, params=SMALL)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refused(*args):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    for step in (1, 2):
        js.checkpoint.save(tmp_path, step=step, params=SMALL)
    assert sorted(os.listdir(tmp_path)) == [".lock", "1", "2"]


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_a_full_disk_in_export(tmp_path, ending):
    file = tmp_path / f"m{ending}"
    js.checkpoint.export(file, SMALL)
    before = file.read_bytes()
    message = rf"could not be exported to this file.*m\{ending}"
    with room(300_000), pytest.raises(OSError, match=message) as caught:
        js.checkpoint.export(file, LARGE)
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == [file.name]
    assert file.read_bytes() == before


def test_an_export_into_a_folder_that_is_read_only(tmp_path, monkeypatch):
    def refused(*args):
        raise PermissionError(errno.EACCES, "Permission denied", "/folder/.m-x.npz")

    # A user for whom nothing is forbidden cannot be refused by permissions.
    monkeypatch.setattr(tempfile, "mkstemp", refused)
    with pytest.raises(PermissionError, match=r"change the permissions .*m\.npz") as e:
        js.checkpoint.export(tmp_path / "m.npz", SMALL)
    assert pathlib.Path(e.value.filename) == tmp_path / "m.npz"
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"could not be exported .*none/m\.npz"):
        js.checkpoint.export(tmp_path / "none" / "m.npz", SMALL)
