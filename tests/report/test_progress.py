"""The bar: on stderr or nowhere, and never in the way of the items."""

import io
import sys

import pytest

import jaxsparse as js
from jaxsparse.report import _progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def no_display_is_left():
    yield
    assert _progress._displays == []


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("JAXSPARSE_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    def attach():
        # In the test and not here: pytest sets sys.stderr anew when a test begins.
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return attach


def test_hidden_prints_nothing_and_passes_items(capsys):
    bar = js.report.progress([1, 2, 3], description="work", show=False)
    seen = []
    for item in bar:
        bar.say(f"item {item}")
        seen.append(item)
    assert seen == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_hidden_is_the_iterator_itself():
    items = iter("ab")
    assert iter(js.report.progress(items, show=False)) is items


def test_hidden_where_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.delenv("JAXSPARSE_PROGRESS", raising=False)
    assert list(js.report.progress("abc")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_shown_in_a_terminal(terminal, capsys):
    stream = terminal()
    assert list(js.report.progress("abc", description="prune [x]")) == ["a", "b", "c"]
    assert "prune [x]" in stream.getvalue()
    assert "3 of 3" in stream.getvalue()
    assert not capsys.readouterr().out


def test_printed_text_stays_on_stdout(terminal, capsys):
    """With `python train.py > log.txt` the log must not move to the terminal."""
    stream = terminal()
    for item in js.report.progress("ab"):
        print("log", item)
    assert capsys.readouterr().out == "log a\nlog b\n"
    assert "log" not in stream.getvalue()


def test_environment_hides(terminal, monkeypatch):
    stream = terminal()
    monkeypatch.setenv("JAXSPARSE_PROGRESS", "0")
    assert list(js.report.progress("abc")) == ["a", "b", "c"]
    assert not stream.getvalue()
    assert list(js.report.progress("abc", show=True)) == ["a", "b", "c"]
    assert "3 of 3" in stream.getvalue()


def test_false_hides_in_a_terminal(terminal):
    stream = terminal()
    assert list(js.report.progress("abc", show=False)) == ["a", "b", "c"]
    assert not stream.getvalue()


def test_true_shows_the_end_in_a_log(capsys):
    bar = js.report.progress(range(4), description="work", show=True)
    for item in bar:
        bar.say(f"layer {item} [red]")
    out, err = capsys.readouterr()
    assert not out
    assert "work" in err
    assert "4 of 4" in err
    assert "layer 3 [red]" in err
    assert "layer 2" not in err


def test_text_from_before_the_loop_is_shown(capsys):
    bar = js.report.progress(range(2), show=True)
    bar.say("waiting")
    assert list(bar) == [0, 1]
    assert "waiting" in capsys.readouterr().err


def test_total(capsys):
    assert list(js.report.progress(iter("ab"), total=2, show=True)) == ["a", "b"]
    assert "2 of 2" in capsys.readouterr().err
    # Without one, the end of the loop tells.
    assert list(js.report.progress(iter("abc"), show=True)) == ["a", "b", "c"]
    assert "3 of 3" in capsys.readouterr().err


def test_items_are_counted_when_they_are_done(capsys):
    for item in js.report.progress(range(5), show=True):
        if item == 2:
            break
    assert "2 of 5" in capsys.readouterr().err


def test_items_are_drawn_one_at_a_time():
    drawn = []
    items = iter(js.report.progress((drawn.append(i) for i in range(3)), show=True))
    assert drawn == []
    next(items)
    assert drawn == [0]
    items.close()


def test_loop_inside_a_loop(capsys):
    seen = [
        (a, b)
        for a in js.report.progress("ab", description="outer", show=True)
        for b in js.report.progress("cd", description="inner", show=True)
    ]
    assert seen == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    err = capsys.readouterr().err
    assert err.count("outer") == 1
    assert "inner" not in err  # it is taken away when it is done


def test_again(capsys):
    bar = js.report.progress([1, 2], show=True)
    assert list(bar) == list(bar) == [1, 2]
    assert capsys.readouterr().err.count("2 of 2") == 2


def test_bad_total():
    with pytest.raises(TypeError, match=r"total must be an integer, got 2\.5"):
        js.report.progress("ab", total=2.5)
    with pytest.raises(ValueError, match="total must be at least 0, got -1"):
        js.report.progress("ab", total=-1)
