"""What a layer's class says of its parameters, where the tree is made of layers.

Equinox's are: a model is a pytree whose nodes are modules. Nothing is imported; a class
is known by the names of its bases.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from jaxsparse._typing import PyTree
from jaxsparse.tree._paths import path_str

# Its weights lie as [out, in, *window], behind axes that a vmap stacks.
_KERNELS = {
    "Linear": ("weight",),
    "Conv": ("weight",),
    "ConvTranspose": ("weight",),
    "GRUCell": ("weight_ih", "weight_hh"),
    "LSTMCell": ("weight_ih", "weight_hh"),
}
_DENSE = {
    "Embedding": "an embedding",
    "LayerNorm": "a scale",
    "GroupNorm": "a scale",
    "RMSNorm": "a scale",
    "BatchNorm": "a scale",
    "PReLU": "a slope",
}


class LayerParameter(NamedTuple):
    """A parameter whose layer is of a known class."""

    path: str
    leaf: Any
    ndim: int  # how many axes it has before any are stacked; 0 for what is no kernel
    dense: str | None  # why it is left dense, or None


def by_class(params: PyTree) -> Iterator[LayerParameter]:
    """The parameters of a tree whose layers are of a known class."""
    known = lambda node: _known(node) is not None
    layers = jax.tree_util.tree_leaves_with_path(params, is_leaf=known)
    for path, layer in layers:
        name = _known(layer)
        if name is None:
            continue
        for key, leaf in jax.tree_util.tree_leaves_with_path(layer):
            own, where = getattr(key[-1], "name", ""), path_str((*path, *key))
            if name in _DENSE:
                yield LayerParameter(where, leaf, 0, _DENSE[name])
            elif own in _KERNELS[name]:
                ndim = 2 + getattr(layer, "num_spatial_dims", 0)
                yield LayerParameter(where, leaf, ndim, None)


def _known(node: Any) -> str | None:
    for cls in type(node).__mro__:
        if cls.__module__.startswith("equinox.nn."):
            name = cls.__name__
            if name in _KERNELS or name in _DENSE:
                return name
    return None
