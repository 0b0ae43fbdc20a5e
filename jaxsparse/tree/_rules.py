"""Values by rule: a mapping from paths or regular expressions becomes a tree."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxsparse._typing import PyTree, Where
from jaxsparse.tree._paths import leaves_with_paths, map_with_path
from jaxsparse.tree._select import nearest, select


def matching(
    rules: Mapping[str, Any],
    paths: Iterable[str],
    *,
    name: str,
    none: str = "no parameter",
    hint: str = "",
) -> dict[str, Any]:
    """Return the value of each path, by the first rule that matches it.

    A rule that is one of the paths matches it alone; any other is a regular expression
    that is searched in the paths.

    Args:
      rules: values by path or regular expression.
      paths: the paths that may match.
      name: the name of the rules in messages.
      none: the message about a rule that matches none of the paths.
      hint: the end of the message.

    Returns:
      Values by path, in the order of `paths`; none where no rule matches.

    Raises:
      ValueError: a rule that matches none of the paths, with the nearest ones; one that
        is no regular expression.

    Example:
      >>> import jaxsparse as js
      >>> js.tree.matching({"a": 1, "b$": 2}, ["a", "ab", "b"], name="rules")
      {'a': 1, 'ab': 2, 'b': 2}
    """
    paths = list(paths)
    tests = [(_test(rule, paths, name), value) for rule, value in rules.items()]
    for rule, (matches, _) in zip(rules, tests, strict=True):
        if not any(map(matches, paths)):
            raise ValueError(
                f"{name}: the rule {rule!r} matches {none}. The nearest paths: "
                f"{nearest(rule, paths)}.{hint}"
            )
    found = {}
    for path in paths:
        for matches, value in tests:
            if matches(path):
                found[path] = value
                break
    return found


def _test(rule: str, paths: list[str], name: str) -> Any:
    if not isinstance(rule, str):
        raise TypeError(
            f"{name}: a rule is a path or a regular expression as text, got {rule!r}."
        )
    if rule in paths:
        return lambda path: path == rule
    try:
        return re.compile(rule).search
    except re.error as error:
        raise ValueError(
            f"{name}: the rule {rule!r} is none of the paths and no regular "
            f"expression ({error}). The nearest paths: {nearest(rule, paths)}."
        ) from error


def by_rules(
    params: PyTree,
    values: Any,
    where: Where = None,
    *,
    name: str = "sparsity",
    rest: Any = 0.0,
) -> tuple[Any, Where]:
    """Turn a mapping from paths or regular expressions into a tree of values.

    Parameters that no rule matches take no part. It returns other values unchanged: a
    single value, and a mapping that has the structure of `params`.

    JAX sorts the keys of a mapping that passes through `jax.jit` or `jax.tree.map`;
    where several rules match one path, call this before.

    Args:
      params: the parameters, or anything of their structure and shapes.
      values: for instance `{"l0/kernel": 0.5, r"attn": 0.7}`. The first rule that
        matches a path counts. A rule that is a path matches that path alone.
      where: which parameters take part; see `select`.
      name: the name of the values in messages.
      rest: the value of parameters that take no part.

    Returns:
      The values as a tree with the structure of `params`, and `where` as a tree of
      bools: what is selected and matched by a rule.

    Raises:
      ValueError: a rule that matches none of the parameters that take part, with the
        nearest paths.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> params = {"attn": jnp.ones((2, 2)), "mlp": jnp.ones((2, 2))}
      >>> js.tree.by_rules(params, {"at+n": 0.7})
      ({'attn': 0.7, 'mlp': 0.0}, {'attn': True, 'mlp': False})
    """
    if not is_rules(params, values):
        return values, where
    named = leaves_with_paths(params)
    if not named:  # optax's placeholder
        return rest, where
    selected = select(params, where)
    pairs = zip(named, jax.tree.leaves(selected), strict=True)
    taken = [path for (path, _), take in pairs if take]
    none = "none of the parameters that take part"
    hint = f" If it is a tree, {name} must have exactly the structure of params."
    found = matching(values, taken, name=name, none=none, hint=hint)
    tree = map_with_path(lambda path, _: found.get(path, rest), params)
    return tree, map_with_path(lambda path, _: path in found, params)


def is_rules(params: PyTree, values: Any) -> bool:
    """Return whether values are given by rule, and not as a tree like the parameters.

    Args:
      params: the parameters.
      values: the values, as for `by_rules`.

    Returns:
      True for a flat mapping whose keys are text, unless it has the structure of
      `params` or exactly their paths.

    Example:
      >>> import jaxsparse as js
      >>> js.tree.is_rules({"a": 1, "b": 2}, {"a": 0.5})
      True
      >>> js.tree.is_rules({"a": 1, "b": 2}, {"a": 0.5, "b": 0.5})
      False
    """
    if not isinstance(values, Mapping) or not values:
        return False
    if not all(isinstance(key, str) for key in values):
        return False
    if not jax.tree_util.all_leaves(list(values.values())):
        return False
    if jax.tree.structure(values) == jax.tree.structure(params):
        return False
    return set(values) != {path for path, _ in leaves_with_paths(params)}
