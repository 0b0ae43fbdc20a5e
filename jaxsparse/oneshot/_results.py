"""What a layer-wise run has found so far, and what it returns."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._host import on_host, spread_like
from jaxsparse._typing import Array, PyTree
from jaxsparse.tracing import Kernel, Trace
from jaxsparse.tree import MatrixView, from_matrices, to_matrices


class LayerInfo(NamedTuple):
    """How well one kernel was solved: an entry for each of its matrices, `[*batch]`.

    Attributes:
      error: `tr((W' - W) G (W' - W)^T)`, `G` the second moment of its inputs; NaN, as
        the next two, where all inputs that were seen are 0, or none was seen.
      relative_error: `error / tr(W G W^T)`.
      masked_error: what the error would be with the same mask and without a change of
        the weights that are left, relative too.
      damping: what was added to the diagonal of `G`.
      dead: how many of its inputs are always 0.
      rows: how many rows of inputs were seen.
      sparsity: the fraction removed.
      seconds: what the solver took, for all matrices of the kernel.
    """

    error: np.ndarray
    relative_error: np.ndarray
    masked_error: np.ndarray
    damping: np.ndarray
    dead: np.ndarray
    rows: np.ndarray
    sparsity: np.ndarray
    seconds: float


class _Pruned(NamedTuple):
    params: Any
    masks: Any
    info: dict[str, LayerInfo]


class Layerwise(_Pruned):
    """The result of `layerwise`: three things, and what was left out.

    Attributes:
      params: the pruned parameters.
      masks: True = kept; a scalar True where nothing was pruned.
      info: a `LayerInfo` for each kernel, by path, in the order of solving.
      left_dense: by path why a parameter that looks like a kernel stayed dense. It is
        no part of the tuple, and lost where JAX makes a new one (`jax.tree.map`).
    """

    left_dense: dict[str, str]

    def __new__(
        cls,
        params: Any,
        masks: Any,
        info: dict[str, LayerInfo],
        left_dense: Mapping[str, str] | None = None,
    ) -> "Layerwise":
        """The result; three things are enough."""
        made = super().__new__(cls, params, masks, info)
        made.left_dense = dict(left_dense or {})
        return made


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
      stage: how many stages are done.
      leaves: the parameters by path.
      masks: by path, of the kernels that were solved.
      info: by path, flat over each kernel's matrices.
      run: what decides the result, of `fingerprint`.
    """

    stage: int
    leaves: dict[str, Any]
    masks: dict[str, Any]
    info: dict[str, Any]
    run: dict[str, str] | None = None


class Found(NamedTuple):
    """What a solver made of some matrices of one kernel: `[places, d_out, d_in]`."""

    w: Array
    mask: Array
    places: np.ndarray  # which of the kernel's flat batch indices they are
    info: LayerInfo


def put(
    state: Progress, leaves: dict[str, Array], path: str, found: Found, kernel: Kernel
) -> None:
    """Puts the solved matrices of a kernel in their places."""
    view, (w, mask, places, info) = kernel.view, found
    total = int(np.prod(view.batch)) if view.batch else 1
    sharding = getattr(leaves[path], "sharding", None)
    leaf = _replaced(leaves[path], places, w, view)
    if sharding not in (None, leaf.sharding):
        # Only where it has to be: what is put somewhere stays there, and what is made
        # with it compiles anew.
        leaf = jax.device_put(leaf, sharding)
    leaves[path] = leaf
    if path not in state.masks:
        state.masks[path] = np.ones(view.shape, bool)
        empty = lambda x: np.full(total, np.nan if x.dtype.kind == "f" else 0, x.dtype)
        state.info[path] = _of_arrays(empty, info)._replace(seconds=0.0)
    known = to_matrices(state.masks[path], view)
    flat_mask = np.array(known.reshape(total, *known.shape[-2:]))
    flat_mask[places] = on_host(mask)
    state.masks[path] = np.asarray(from_matrices(flat_mask.reshape(known.shape), view))
    for whole, part in zip(state.info[path][:-1], info[:-1], strict=True):
        whole[places] = part
    state.info[path] = state.info[path]._replace(
        seconds=state.info[path].seconds + info.seconds
    )


@functools.partial(jax.jit, static_argnames="view")
def _replaced(w: Array, places: np.ndarray, new: Array, view: MatrixView) -> Array:
    """The parameter with some of its matrices replaced."""
    old = to_matrices(w, view)
    flat = old.reshape(-1, *old.shape[-2:])
    return from_matrices(
        flat.at[places].set(new.astype(flat.dtype)).reshape(old.shape), view
    )


def _of_arrays(f: Callable[[np.ndarray], np.ndarray], info: LayerInfo) -> LayerInfo:
    arrays = {k: f(x) for k, x in info._asdict().items() if k != "seconds"}
    return LayerInfo(**arrays, seconds=info.seconds)


def result_of(
    state: Progress,
    params: PyTree,
    before: PyTree,
    traced: Trace,
    kernels: Mapping[str, Kernel],
    left_dense: Mapping[str, str],
) -> Layerwise:
    """What a run that is done returns."""
    leaves, masks = [], []
    given = jax.tree.leaves(params)
    rest = jax.tree.leaves(before) or [jnp.asarray(True)] * len(given)
    for path, leaf, other in zip(traced.paths, given, rest, strict=True):
        leaves.append(state.leaves.get(path, leaf))
        mask, sharding = state.masks.get(path), getattr(leaf, "sharding", None)
        if mask is not None:
            other = jax.device_put(spread_like(mask, leaf), sharding)
        masks.append(other)
    shaped = {
        path: _of_arrays(lambda x, k=kernels[path]: x.reshape(k.view.batch), info)
        for path, info in state.info.items()
    }
    unflatten = functools.partial(jax.tree.unflatten, traced.treedef)
    return Layerwise(unflatten(leaves), unflatten(masks), shaped, left_dense)
