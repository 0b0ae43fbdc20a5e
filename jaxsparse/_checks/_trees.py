"""Checks of trees that callers pass: arrays by path, and trees like the parameters.

They look at structures, shapes and types, and never at values.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _text
from jaxsparse._checks._values import shown
from jaxsparse._typing import PyTree


def check_arrays(*, abstract: bool = False, **trees: PyTree) -> None:
    """Raises unless each is an array or a tree of arrays."""
    for name, tree in trees.items():
        if tree is None:
            raise TypeError(f"{name} must be a tree of arrays, got None.")
        check_is_part(name, tree)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not _is_array(leaf, abstract):
                raise TypeError(_no_array(name, keys, leaf))
            if _is_gone(leaf):
                raise ValueError(
                    f"{_path(keys) or name}: this array of {name} was deleted. A "
                    "jitted function that it was donated to (`donate_argnums`) has "
                    "overwritten it: pass what that function returned."
                )


def check_floats(**arrays: Any) -> None:
    """Raises unless each is one array of real floating-point numbers."""
    for name, x in arrays.items():
        check_arrays(**{name: x})
        if not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be one array, got {shown(x)}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be an array of real floating-point numbers, got "
                f"{x.dtype}."
            )


def check_is_part(name: str, tree: PyTree) -> None:
    """Raises where a training state or a result is passed for one of its parts.

    Both are trees of arrays: moments of an optimizer would be pruned without a word.
    """
    kind = type(tree).__name__
    if hasattr(tree, "opt_state"):
        raise TypeError(
            f"{name}: {kind} holds the state of an optimizer too. Pass one part of it "
            "alone: state.params of a TrainState, nnx.state(model, nnx.Param) of the "
            "model of an nnx.Optimizer."
        )
    if {"params", "masks"} <= set(getattr(tree, "_fields", ())):
        part = "masks" if name == "masks" else "params"
        raise TypeError(
            f"{name}: {kind} holds parameters and masks. Pass one of them: .{part}"
        )


def check_known(caller: str, **trees: PyTree) -> None:
    """Raises where arrays are traced, whose values a function on the host reads."""
    for name, tree in trees.items():
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if isinstance(leaf, jax.core.Tracer):
                raise TypeError(
                    f"{_path(keys) or name}: {name} is traced, and {caller} reads its "
                    "values on the host. Call it outside of jit, vmap and grad."
                )


def _is_gone(x: Any) -> bool:
    traced = isinstance(x, jax.core.Tracer)
    return isinstance(x, jax.Array) and not traced and x.is_deleted()


def _is_array(x: Any, abstract: bool) -> bool:
    if isinstance(x, jax.Array):
        return True
    if isinstance(x, np.ndarray | np.generic):
        # Custom types, as bfloat16, are of kind V.
        return x.dtype.kind in "biufcV" and x.dtype.names is None
    if isinstance(x, jax.ShapeDtypeStruct):
        return abstract
    # A variable of Keras converts to an array but lacks its attributes.
    whole = hasattr(x, "__jax_array__") and hasattr(x, "size")
    return whole or (abstract and hasattr(x, "shape"))


def _no_array(name: str, keys: Any, leaf: Any) -> str:
    path = _path(keys)
    which = f"{path}: {name} must hold arrays" if path else f"{name} must be arrays"
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return (
            f"{which}; this one is abstract (jax.ShapeDtypeStruct), it has no values. "
            "Pass arrays, or call this within jax.eval_shape."
        )
    number = isinstance(leaf, bool | int | float | complex)
    if number and isinstance(keys[-1] if keys else None, jax.tree_util.SequenceKey):
        advice = "A list is a tree of its entries: write jnp.asarray(list)."
    elif number:
        advice = f"Write jnp.asarray({leaf!r})."
    else:
        advice = (
            "Pass a tree of arrays alone: variables['params'] (Linen), nnx.state(net, "
            "nnx.Param), eqx.partition(model, eqx.is_array)[0], or [v.value for v in "
            "model.trainable_variables] (Keras). A leaf may be None."
        )
    return f"{which}; got {shown(leaf)}. {advice}"


def check_like(
    params: PyTree,
    *,
    of: str = "params",
    abstract: bool = False,
    **trees: PyTree,
) -> None:
    """Raises unless trees of arrays have the structure and shapes of another one."""
    check_arrays(abstract=abstract, **{of: params})
    leaves = jax.tree.leaves(params)
    for name, tree in trees.items():
        check_arrays(abstract=abstract, **{name: tree})
        same_structure(tree, params, name=name, of=of)
        found = jax.tree_util.tree_leaves_with_path(tree)
        for (keys, leaf), w in zip(found, leaves, strict=True):
            check_shape(_path(keys), leaf, jnp.shape(w), name=name, of=of)


def check_shape(
    path: str, x: Any, shape: Any, *, name: str, of: str = "params", extra: int = 0
) -> None:
    """Raises unless an array has the shape of a parameter."""
    if jnp.shape(x)[extra:] != tuple(shape):
        wanted = f"{of} has {tuple(shape)}"
        if extra:
            wanted = f"expected {('m',) * extra + tuple(shape)}"
        raise ValueError(
            f"{path}: {name} has the shape {jnp.shape(x)}, {wanted}. Was {name} made "
            "for another model?"
        )


def broadcasts(shape: Any, full: Any) -> bool:
    """Whether a mask of a shape is one of a parameter of the shape `full`."""
    pairs = zip(shape, full, strict=False)
    return not shape or (len(shape) == len(full) and all(m in (1, n) for m, n in pairs))


def check_bools(masks: PyTree, *, name: str = "masks") -> None:
    """Raises unless `masks` is a tree of arrays of bools."""
    if masks is None:
        raise TypeError(f"{name} must be a tree of arrays of bools, got None.")
    check_is_part("masks", masks)
    for keys, mask in jax.tree_util.tree_leaves_with_path(masks):
        said = f"{_path(keys) or name}: a mask holds bools, True = kept; got"
        if isinstance(mask, bool):
            raise TypeError(f"{said} the Python bool {mask}. Write jnp.array({mask}).")
        if not isinstance(
            mask, jax.Array | np.ndarray | np.bool_ | jax.ShapeDtypeStruct
        ):
            raise TypeError(f"{said} {shown(mask)}.")
        if mask.dtype != np.bool_:
            raise TypeError(f"{said} {mask.dtype}. For 0 and 1 write `mask != 0`.")


def _path(keys: Any) -> str:
    """As `jaxsparse.tree.path_str` writes it."""
    return _text.shown(_text.path_text(keys))


def same_structure(
    got: PyTree, expected: PyTree, *, name: str, of: str = "params"
) -> None:
    """Raises unless two trees have the same structure, naming what differs."""
    if jax.tree.structure(got) == jax.tree.structure(expected):
        return
    leaves = jax.tree_util.tree_leaves_with_path
    paths = lambda tree: {_path(p): None for p, _ in leaves(tree)}
    got_paths, expected_paths = paths(got), paths(expected)
    missing = [p for p in expected_paths if p not in got_paths]
    extra = [p for p in got_paths if p not in expected_paths]
    said = []
    if missing:
        said.append(f"missing {_few(missing)}")
    if extra:
        said.append(f"not in {of} {_few(extra)}")
    if not said:
        said.append(
            f"the containers differ: {jax.tree.structure(got)} against "
            f"{jax.tree.structure(expected)}"
        )
    raise ValueError(
        f"{name} must have exactly the structure of {of}: {'; '.join(said)}. "
        f"Was {name} made for another model?"
    )


def _few(paths: list[str], most: int = 4) -> str:
    shown = ", ".join(repr(p) for p in paths[:most])
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
