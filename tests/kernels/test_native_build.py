"""The library of native kernels: built at first use, kept, replaced when wrong."""

import concurrent.futures
import os
import pathlib
import stat
import subprocess
import sys

import pytest

from jaxsparse.kernels import _native as native
from jaxsparse.kernels import _native_build as build

pytestmark = pytest.mark.skipif(
    os.environ.get("JAXSPARSE_NATIVE", "").strip().lower() == "off",
    reason="native kernels are turned off",
)


@pytest.fixture
def copying(tmp_path):
    """A compiler that takes no time: what it links is what it has compiled."""
    script = tmp_path / "copying"
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('-o') + 1])\n"
        "out.write_bytes(b'a library' if '-shared' in sys.argv else b'')\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return [str(script)]


def test_one_file_named_after_what_is_in_it(tmp_path, copying):
    path = build.build(tmp_path, copying)
    assert path.read_bytes() == b"a library"
    assert build.find(tmp_path) == path
    # Nothing is left of what was made aside.
    assert {x.name for x in tmp_path.iterdir()} == {path.name, "copying"}


def test_a_damaged_library_is_removed(tmp_path, copying):
    path = build.build(tmp_path, copying)
    for damage in (b"", b"a librar", b"another library"):
        path.write_bytes(damage)
        assert build.find(tmp_path) is None
        assert not path.exists()
        assert build.build(tmp_path, copying) == path


@pytest.mark.parametrize("changed", ["_FLAGS", "_sources"])
def test_an_outdated_library_is_not_found(tmp_path, copying, monkeypatch, changed):
    old = build.build(tmp_path, copying)
    if changed == "_FLAGS":
        monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O2"))
    else:
        sources = {**build._sources(), "int8.cc": b"// new"}
        monkeypatch.setattr(build, "_sources", lambda: sources)
    assert build.find(tmp_path) is None
    assert build.build(tmp_path, copying) != old
    assert old.exists()  # another version may use it


def test_many_may_build_at_once(tmp_path, copying):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build(tmp_path, copying), range(4)))
    assert len(paths) == 1
    assert build.find(tmp_path) in paths


def test_what_no_system_opens_is_built_anew(tmp_path, copying, monkeypatch):
    """A file that is whole and no library: as that of another system."""
    monkeypatch.setenv("JAXSPARSE_CACHE", str(tmp_path))
    folder = build.cache_folder()
    build.build(folder, copying)
    built = []

    def compiled(*args):
        built.append(args)
        raise build.BuildError("no compiler here")

    monkeypatch.setattr(build, "build", compiled)
    assert build._load() == build.Loaded((), "no compiler here")
    assert len(built) == 1


def test_a_build_is_announced(tmp_path, copying, monkeypatch, caplog):
    """Without a setting of the user's: it explains why a first call takes so long."""
    monkeypatch.setenv("JAXSPARSE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", copying[0])
    assert "cannot be built or opened" in build._load().problem  # it is no library
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("jaxsparse", "WARNING")
    assert copying[0] in record.getMessage()
    assert str(tmp_path / "native") in record.getMessage()
    assert "JAXSPARSE_NATIVE=off" in record.getMessage()


def test_without_a_compiler(tmp_path, monkeypatch):
    """One line says what is missing and how to get it."""
    monkeypatch.setenv("JAXSPARSE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    variants, problem = build._load()
    assert variants == ()
    assert "need a C++ compiler" in problem
    assert "apt install g++" in problem
    assert "\n" not in problem


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSPARSE_CACHE", str(tmp_path))
    script = tmp_path / "failing"
    script.write_text("#!/bin/sh\necho 'x.cc:1: error: no such header' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    problem = build._load().problem
    assert "x.cc:1: error: no such header" in problem
    assert "\n" not in problem
    monkeypatch.setenv("CXX", "/no/such/compiler -O1")
    problem = build._load().problem
    assert "/no/such/compiler" in problem
    assert "\n" not in problem
    assert [x.name for x in (tmp_path / "native").iterdir()] == ["lock"]


def test_without_a_place(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("JAXSPARSE_CACHE", str(file / "folder"))
    problem = build._load().problem
    assert "set JAXSPARSE_CACHE to a folder" in problem
    assert "\n" not in problem


def test_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXSPARSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = build.cache_folder()
    assert folder == tmp_path / "jaxsparse" / "native"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_an_import_builds_nothing_and_a_second_process_nothing_more(tmp_path):
    """With the library in the cache no compiler is needed."""
    if not native.available():
        pytest.skip(native.why_not())
    folder = tmp_path / "native"
    folder.mkdir()
    there = build.find(build.cache_folder())
    (folder / there.name).write_bytes(there.read_bytes())
    code = (
        "import sys, jaxsparse.kernels\n"
        "assert 'jaxsparse.kernels._native_build' not in sys.modules or not "
        "sys.modules['jaxsparse.kernels._native_build']._loaded\n"
        "from jaxsparse.kernels import _native\n"
        "print(_native.variants()[-1])"
    )
    root = str(pathlib.Path(build.__file__).parents[2])
    env = os.environ | {"JAXSPARSE_CACHE": str(tmp_path), "CXX": "/no/such/compiler"}
    env |= {"PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "portable\n", done.stderr
    assert "Compiling" not in done.stderr
