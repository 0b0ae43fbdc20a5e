"""Pages that stand alone, and files that are whole or not there."""

import base64
import os
import re

import jax.numpy as jnp
import pytest

import jaxsparse as js
from jaxsparse.report._files import replace_file

PRUNED = js.prune({"kernel": jnp.array([[3.0, 1.0], [0.5, 2.0]])}, 0.5)
PNG = b"\x89PNG\r\n\x1a\n"


def test_parts_in_their_order(tmp_path):
    pytest.importorskip("matplotlib")
    table = js.report.table(*PRUNED)
    figure = js.report.plot(table)
    path = js.report.write_html(
        tmp_path / "run.html",
        "# Layers\n\nOne < two & three",
        table,
        figure,
        title="<R>",
    )
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "<title>&lt;R&gt;</title>" in text
    assert "<h1>&lt;R&gt;</h1>" in text
    places = [
        text.index(part)
        for part in (
            "<h2>Layers</h2>",
            "<p>One &lt; two &amp; three</p>",
            table.to_html(),
            "data:image/png;base64,",
        )
    ]
    assert places == sorted(places)
    (data,) = re.findall(r'base64,([^"]+)"', text)
    assert base64.b64decode(data).startswith(PNG)


def test_needs_nothing_else(tmp_path):
    path = js.report.write_html(tmp_path / "a.html", js.report.table(*PRUNED))
    assert not re.search(r"<script|<link|https?://", path.read_text(encoding="utf-8"))


def test_headings_and_paragraphs(tmp_path):
    path = js.report.write_html(tmp_path / "a.html", "# A\n\n## B\n\ntext\n# no\n\n\n")
    text = path.read_text(encoding="utf-8")
    assert "<h2>A</h2>\n<h3>B</h3>\n<p>text\n# no</p>" in text
    assert text.count("<p>") == 1


def test_script_is_shown_and_not_obeyed(tmp_path):
    path = js.report.write_html(
        tmp_path / "a.html", "# <script>1</script>", "<script>2</script>"
    )
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 2


def test_unknown_part_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.html"
    path.write_text("old")
    with pytest.raises(
        TypeError, match=r"parts\[1\] is a dict; a page is made of text"
    ):
        js.report.write_html(path, "text", {})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.html"]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere' does not exist"):
        js.report.write_html(tmp_path / "nowhere" / "a.html", "text")


def test_failure_while_replacing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.html"]


def test_old_file_is_there_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    path.write_text("old")
    seen = []
    replace = os.replace

    def watch(source, target):
        seen.append((path.read_text(), source.read_bytes(), source.parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    replace_file(path, b"new")
    assert seen == [("old", b"new", tmp_path)]
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.html"]
