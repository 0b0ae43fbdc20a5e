"""Checks of what kind of thing an argument is: a function, a key, a pattern, a rule."""

import contextlib
import inspect
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse._calls import asked_for
from jaxsparse._checks._values import check_number, shown


def check_choice(choices: tuple[str, ...], **values: Any) -> None:
    """Raises unless each value is one of some words."""
    for name, value in values.items():
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {shown(value)}.")


def check_bool(**values: Any) -> None:
    """Raises unless each value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {shown(value)}.")


def check_callable(takes: int | None, *keywords: str, **functions: Any) -> None:
    """Raises unless each is a function of so many arguments."""
    given = [f"{takes} argument{'s'[: takes != 1]}", *keywords]
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {shown(function)}.")
        if takes is None:
            continue
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # of C code, which has none
            continue
        try:
            signature.bind(*[None] * takes, **dict.fromkeys(keywords))
        except TypeError as error:
            raise TypeError(
                f"{name} is called with {' and '.join(given)}, but "
                f"{shown(function)} has the signature {signature}: {error}. Bind the "
                "others with functools.partial."
            ) from None


def check_score(score: Any) -> None:
    """Raises unless `score` is a function of params, and of what it may ask for."""
    check_callable(None, score=score)
    try:
        check_callable(1, *sorted(asked_for(score, 1)), score=score)
    except TypeError as error:
        raise TypeError(
            f"{error} A score of gradients: lambda p: score(p, jax.grad(loss_fn)(p))."
        ) from None


@contextlib.contextmanager
def explained(name: str, **inputs: Any) -> Iterator[None]:
    """Says, where a function of the caller's fails, on what it was called."""
    on = lambda: "; ".join(f"{key}: {_shapes(value)}" for key, value in inputs.items())
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        said = str(error) or type(error).__name__
        raise kind(f"{name} fails on {on()}. It says: {said}") from error
    except Exception as error:  # of another library, whose kind may be waited for
        error.add_note(f"{name} fails on {on()}.")
        raise


def check_key(key: Any, *, name: str = "key") -> None:
    """Raises unless `key` is one random key."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if typed and shape == ():
        return
    if dtype == np.uint32 and len(shape or ()) == 1:  # jax.random.PRNGKey(seed)
        return
    advice = "Write key=jax.random.key(0)."
    if isinstance(key, numbers.Integral):
        advice = f"Write key=jax.random.key({key})."
    elif typed:
        advice = f"Take one of these {shape} keys."
    raise TypeError(f"{name} must be a random key, got {shown(key)}. {advice}")


def check_is(kind: Any, made_by: str, **values: Any) -> None:
    """Raises unless each value is of a kind."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be what {made_by} gives, got {shown(value)}.")


def check_pattern(kind: Any, pattern: Any) -> None:
    """Raises unless `pattern` is one."""
    if isinstance(pattern, kind):
        return
    advice = "such as js.Unstructured(), js.NM(keep=2, of=4) or js.Block((4, 4))"
    if isinstance(pattern, type) and issubclass(pattern, kind):
        advice = f"so write js.{pattern.__name__}()"
    elif isinstance(pattern, str) and re.fullmatch(r"\d+:\d+", pattern):
        keep, of = pattern.split(":")
        advice = f"so write js.NM(keep={keep}, of={of})"
    raise TypeError(f"pattern must be a pattern, {advice}; got {shown(pattern)}.")


def check_mapping(
    kind: Any = object, made_by: str = "a dictionary", **mappings: Any
) -> None:
    """Raises unless each is a mapping from names to values of a kind."""
    for name, mapping in mappings.items():
        if not isinstance(mapping, Mapping):
            raise TypeError(
                f"{name} must be a mapping by name, {made_by}; got {shown(mapping)}."
            )
        for key, value in mapping.items():
            if not isinstance(key, str) or not isinstance(value, kind):
                raise TypeError(
                    f"{name} must be a mapping by name, {made_by}; got "
                    f"{shown(value)} at {key!r}."
                )


def check_numbers(**mappings: Any) -> None:
    """Raises unless each is a mapping from names to numbers."""
    check_mapping(**mappings)
    for name, mapping in mappings.items():
        for key, value in mapping.items():
            check_number(**{f"{name}[{key!r}]": value})


def check_batches(batches: Any, *, name: str = "batches") -> None:
    """Raises unless `batches` can be gone through and is no single array."""
    if hasattr(batches, "shape") or isinstance(batches, str | bytes | Mapping):
        raise TypeError(
            f"{name} must be an iterable of batches, got {shown(batches)}. For a "
            f"single batch write {name}=[x]."
        )
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise TypeError(
            f"{name} must be an iterable of batches, such as a list; got "
            f"{shown(batches)}."
        )


def check_where(where: Any) -> None:
    """Raises unless `where` can be a selection, whatever the parameters."""
    if where is None:
        return
    if isinstance(where, str):
        check_expression(where, name="where")
    elif callable(where) and jax.tree_util.all_leaves([where]):
        check_callable(2, where=where)
    else:
        leaves = jax.tree.leaves(where)
        if not leaves or not all(isinstance(x, bool | np.bool_) for x in leaves):
            raise TypeError(
                "`where` must be None, a regular expression, a predicate (path, leaf) "
                f"-> bool or a tree of Python bools; got {shown(where)}."
            )


def check_expression(pattern: Any, *, name: str) -> None:
    """Raises unless `pattern` is a regular expression."""
    if not isinstance(pattern, str):
        raise TypeError(f"{name}: expected a regular expression, got {pattern!r}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name} = {pattern!r} is no regular expression: {error}. A literal path "
            "is written re.escape(path)."
        ) from None


def check_axes(axes: Any) -> None:
    """Raises unless `axes` can be a rule, whatever the parameters."""
    is_axes = lambda x: hasattr(x, "normalised")
    if axes is None or is_axes(axes):
        return
    if not isinstance(axes, Mapping):
        raise TypeError(
            "axes must be js.Axes(input=(0,), output=(1,)) or a mapping from regular "
            f"expressions to such; got {shown(axes)}."
        )
    for rule, value in axes.items():
        check_expression(rule, name="axes")
        if not is_axes(value):
            raise TypeError(
                f"axes[{rule!r}] must be js.Axes(input=(0,), output=(1,)), got "
                f"{shown(value)}."
            )


def _shapes(value: Any) -> str:
    """What arrays a tree holds, as a few shapes."""
    leaves = jax.tree.leaves(value)
    some = [
        f"{jnp.dtype(x.dtype).name}{list(x.shape)}"
        if hasattr(x, "shape") and hasattr(x, "dtype")
        else shown(x)
        for x in leaves[:4]
    ]
    return ", ".join(some) + (", ..." if len(leaves) > 4 else "")


def check_transformation(**transformations: Any) -> None:
    """Raises a TypeError unless each is a gradient transformation of optax."""
    kind = optax.GradientTransformation
    check_is(kind, "optax.adam(1e-3) or another", **transformations)


def check_has_params(params: Any) -> None:
    """Raises a ValueError where `update` was called without the parameters."""
    if params is None:
        raise ValueError(
            "This transformation needs the parameters: call "
            "`tx.update(updates, state, params)`."
        )
