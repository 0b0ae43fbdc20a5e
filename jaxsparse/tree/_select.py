"""Which parameters take part: `where` becomes a static tree of bools."""

import difflib
import re
from typing import Any

import jax

from jaxsparse import _checks
from jaxsparse._typing import PyTree, Where
from jaxsparse.tree._classes import by_class
from jaxsparse.tree._defaults import has_plain_name, why_dense
from jaxsparse.tree._paths import leaves_with_paths, map_with_path


def select(params: PyTree, where: Where = None) -> PyTree:
    """Turn `where` into a static tree of bools.

    Args:
      params: the parameters, or anything of their structure and shapes.
      where: None for `default_where`; a regular expression that is searched in the
        path; a predicate `(path, leaf) -> bool` (its result counts as true or false, as
        in an `if`); or a tree of Python bools, which may be a prefix of `params`.

    Returns:
      A tree of Python bools with the structure of `params`.

    Raises:
      ValueError: nothing is selected, the message lists the nearest paths; an
        expression that cannot be read.
      TypeError: `where` is none of the above, or a predicate of other arguments; a leaf
        of `params` that is no array.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
      >>> js.tree.select(params, r"kernel$")
      {'dense': {'bias': False, 'kernel': True}}
    """
    _checks.check_arrays(abstract=True, params=params)
    _checks.check_where(where)
    if where is None:
        selected = _by_default(params)
    elif isinstance(where, str):
        pattern = re.compile(where)
        selected = map_with_path(lambda p, _: pattern.search(p) is not None, params)
    elif callable(where) and jax.tree_util.all_leaves([where]):
        selected = map_with_path(lambda p, x: bool(where(p, x)), params)
    else:
        selected = _from_bools(params, where)
    # A tree without leaves is optax's placeholder, not a mistake.
    if jax.tree.leaves(params) and not any(jax.tree.leaves(selected)):
        raise ValueError(_nothing_selected(params, where))
    return selected


def _by_default(params: PyTree) -> PyTree:
    """By names, but for layers of a known class.

    And a module that has a bias is no table of embeddings.
    """
    paths = {path for path, _ in leaves_with_paths(params)}
    classes = {found.path: found.dense for found in by_class(params)}

    def take(path: str, leaf: Any) -> bool:
        why = why_dense(path, leaf)
        if path in classes and why not in ("fewer than two axes", "a LoRA factor"):
            return classes[path] is None
        if why == "an embedding" and has_plain_name(path):
            module = path.rpartition("/")[0]
            return not {f"{module}/bias", f"{module}/b"}.isdisjoint(paths)
        return why is None

    return map_with_path(take, params)


def _from_bools(params: PyTree, where: PyTree) -> PyTree:
    try:
        return jax.tree.map(
            lambda keep, sub: jax.tree.map(lambda _: keep, sub), where, params
        )
    except (ValueError, TypeError) as error:
        _checks.same_structure(where, params, name="where")
        raise ValueError(f"`where` does not fit params: {error}") from error


def _nothing_selected(params: PyTree, where: Where) -> str:
    paths = [path for path, _ in leaves_with_paths(params)]
    if where is None:
        return (
            "The default selection (floating arrays of two or more axes that are no "
            "bias, norm, embedding, position, token or LoRA factor, by their names) "
            f"matches none of the parameters: {paths[:8]}. Pass `where`."
        )
    if not isinstance(where, str):
        return f"`where` selects none of the {len(paths)} parameters: {paths[:8]}."
    return (
        f"`where` = {where!r} matches none of the {len(paths)} parameters. "
        f"The nearest paths: {nearest(where, paths)}."
    )


def nearest(wanted: str, paths: list[str], *, most: int = 5) -> list[str]:
    """List the paths most like a mistyped one, best first.

    Args:
      wanted: a path, or a regular expression on paths.
      paths: the paths that exist.
      most: the largest number of paths to return.

    Returns:
      At most `most` of `paths`.

    Example:
      >>> import jaxsparse as js
      >>> js.tree.nearest("dense/kernal", ["dense/bias", "dense/kernel"], most=1)
      ['dense/kernel']
    """
    if not isinstance(wanted, str):
        raise TypeError(f"wanted must be a path as text, got {wanted!r}.")
    if isinstance(paths, str) or not all(isinstance(p, str) for p in paths or [0]):
        raise TypeError(f"paths must be a list of paths as text, got {paths!r}.")
    plain = re.sub(r"[\^$.*+?()\[\]{}|\\]+", "", wanted).lower()

    def likeness(path: str) -> float:
        whole = difflib.SequenceMatcher(None, plain, path.lower()).ratio()
        parts = [
            difflib.SequenceMatcher(None, plain, part).ratio()
            for part in path.lower().split("/")
        ]
        return max(whole, *parts)

    return sorted(paths, key=likeness, reverse=True)[:most]
