"""What makes entries of nothing: positions, random numbers, keys."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives._general import fresh
from jaxsparse.primitives._row import Primitive, names
from jaxsparse.primitives.axes import leaf
from jaxsparse.primitives.dims import Dims, freeze, out_shapes, unify


def iota(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The values along one axis are its positions."""
    dims = tuple(leaf(n) for n in out_shapes(eqn)[0])
    algebra.flag(dims[eqn.params["dimension"]], "iota", eqn=eqn)
    return [dims]


def drawn(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """The axes of the keys, then new ones for what each of them gives."""
    shape = out_shapes(eqn)[0]
    for dims in ins[1:]:
        for a, b in zip(ins[0], dims, strict=False):
            unify(a, b, eqn)
    keys = ins[0][: len(shape)]
    new = tuple(leaf(n) for n in shape[len(keys) :])
    words = ins[0][len(shape) :]  # that a key consists of
    for axis in new if eqn.primitive.name == "random_unwrap" else words:
        freeze(axis, eqn.primitive.name, eqn)
    return [(*keys, *new)]


def _shape(eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]) -> Any:
    return {"shape": sizes.shape(outs[0])}


def _bits(eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]) -> Any:
    """For each of the keys."""
    return {"shape": sizes.shape(outs[0])[len(ins[0]) :]}


def _words(eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]) -> Any:
    return {"shape": sizes.shape(outs[1])}


ROWS: Mapping[str, Primitive] = {
    "iota": Primitive(iota, resize=_shape),
    "empty": Primitive(fresh, resize=_shape),
    "rng_uniform": Primitive(fresh, draws=True, resize=_shape),
    "rng_bit_generator": Primitive(fresh, draws=True, resize=_words),
    "random_bits": Primitive(drawn, draws=True, resize=_bits),
    **dict.fromkeys(("create_token", "axis_index"), Primitive(fresh)),
    **dict.fromkeys(
        names(
            """
            random_seed random_wrap random_unwrap random_fold_in random_split
            random_clone
            """
        ),
        Primitive(drawn),
    ),
}
"""The rows by primitive."""
