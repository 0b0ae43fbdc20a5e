"""A wrong argument of any public function is named, before JAX fails on it.

A valid call of each function (`calls.py`) with one argument replaced by a wrong value
(`wrong.py`): 150 of them, drawn with a fixed seed, and all functions; the exhaustive
part draws 1,000.
"""

import dis
import functools
import operator
import pathlib
import random
import warnings

import pytest
from contracts import calls, wrong
from contracts.test_public import CLASSES, FUNCTIONS

import jaxsparse as js

PACKAGE = str(pathlib.Path(js.__file__).parent)
MOST, FEW = 1000, 150


def function_of(name):
    return operator.attrgetter(name)(js)


@functools.cache
def drawn():
    cases = list(wrong.cases(calls.CALLS, function_of))
    assert len(cases) >= MOST
    return random.Random(20261130).sample(cases, MOST)


def failure(case):
    """What is wrong with how a wrong call ends; None if nothing is."""
    function = function_of(case.function)
    given = calls.CALLS[case.function]()
    parameters = wrong.inspect.signature(function).parameters
    default = getattr(parameters.get(case.argument), "default", None)
    positional, named = case.arguments(given, default)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(*positional, **named)
    except (TypeError, ValueError) as error:
        if not raised_here(error):
            return f"a raw {type(error).__name__}: {error}"
        if not wrong.names(str(error), function, case.argument):
            return f"a message without a name: {error}"
        return None
    except Exception as error:
        return f"a raw {type(error).__name__}: {error}"
    if wrong.why_taken(*case[:3]) is None:
        return "taken without a word"
    return None


def raised_here(error):
    """Whether a `raise` of jaxsparse is where an error comes from."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    here = {i.offset: i.opname for i in dis.get_instructions(code)}
    return (
        code.co_filename.startswith(PACKAGE)
        and here[traceback.tb_lasti] == "RAISE_VARARGS"
    )


def report(cases):
    found = [(*case[:3], failure(case)) for case in cases]
    return [row for row in found if row[-1] is not None]


def test_wrong_calls_are_named_and_nothing_is_taken_without_a_word():
    assert report(drawn()[:FEW]) == []


@pytest.mark.exhaustive
def test_a_thousand_wrong_calls_are_named():
    assert report(drawn()[FEW:]) == []


def test_every_public_function_has_a_valid_call():
    elsewhere = {
        *("write_html", "export", "load_export", "save", "restore"),  # files
        *("latest_step", "steps"),
        # Plumbing: what they are given has been looked at, by those that call them.
        *("by_rules", "is_rules", "like", "matching"),
    }
    known = {name.rpartition(".")[-1] for name in calls.CALLS}
    public = {name.rpartition(".")[-1] for name in FUNCTIONS}
    assert public - elsewhere <= known
    classes = {name.rpartition(".")[-1] for name in CLASSES}
    assert known <= public | classes
