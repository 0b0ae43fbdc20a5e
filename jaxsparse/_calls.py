"""Functions of callers that are given what they have parameters for."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

_KNOWN = frozenset(("masks", "step", "sparsity"))


def ask(function: Callable[..., Any], *args: Any, **known: Any) -> Any:
    """Calls a function with those of the things known that it asks for by name."""
    wanted = asked_for(function, len(args))
    return function(*args, **{k: x for k, x in known.items() if k in wanted})


def asked_for(function: Callable[..., Any], positional: int) -> frozenset[str]:
    """Which of `masks`, `step` and `sparsity` a function asks for by name."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some built-in functions have none
        return frozenset()
    by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    given = [p for p in parameters[:positional] if p.kind != by_name[1]]
    names = {p.name for p in parameters if p.kind in by_name and p not in given}
    if isinstance(function, functools.partial):
        names -= set(function.keywords)
    return frozenset(names & _KNOWN)
