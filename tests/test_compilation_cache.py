"""The cache of the suite itself: what is published is whole, what is broken goes."""

import os
import subprocess
import sys

import compilation_cache
import pytest


@pytest.fixture
def shared(tmp_path):
    return tmp_path / "shared"


def write(cache, name, content):
    (cache.own / f"{name}-cache").write_bytes(content)


def entries(cache):
    return {path.name: path.read_bytes() for path in cache.own.iterdir()}


def published(shared):
    return sorted(path for path in shared.iterdir() if path.is_file())


def test_what_one_process_compiles_another_one_has(shared):
    a, b = compilation_cache.Cache(shared), compilation_cache.Cache(shared)
    write(a, "f", b"of a")
    assert entries(b) == {}
    a.exchange()
    b.exchange()
    assert entries(b) == {"f-cache": b"of a"}
    write(b, "g", b"of b")
    a.close()
    b.close()
    assert entries(compilation_cache.Cache(shared)) == {
        "f-cache": b"of a",
        "g-cache": b"of b",
    }


def test_an_entry_that_is_not_whole_is_thrown_away(shared):
    cache = compilation_cache.Cache(shared)
    write(cache, "f", b"a long program")
    write(cache, "g", b"another one")
    cache.close()
    first, second = published(shared)
    first.write_bytes(first.read_bytes()[:5])
    (shared / "no name of ours").write_bytes(b"")
    assert entries(compilation_cache.Cache(shared)) == {"g-cache": b"another one"}
    assert published(shared) == [second]


def test_what_a_killed_process_leaves_is_removed(shared):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = compilation_cache.Cache(shared)
    left = shared / f"{compilation_cache.OWN}{dead.pid}-abc"
    left.mkdir()
    (left / "f-cache").write_bytes(b"half")
    compilation_cache.tidy(shared)
    assert not left.exists()
    assert alive.own.exists()


def test_the_oldest_entries_go_beyond_the_limit(shared):
    cache = compilation_cache.Cache(shared)
    for name in "fgh":
        write(cache, name, bytes(100))
    cache.close()
    for age, path in enumerate(published(shared)):
        os.utime(path, (1e9 - age, 1e9 - age))
    compilation_cache.tidy(shared, limit=250)
    assert [path.name[0] for path in published(shared)] == ["f", "g"]


def test_a_disk_without_hard_links_gets_copies(shared, monkeypatch):
    def link(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", link)
    a = compilation_cache.Cache(shared)
    write(a, "f", b"of a")
    a.close()
    assert entries(compilation_cache.Cache(shared)) == {"f-cache": b"of a"}
