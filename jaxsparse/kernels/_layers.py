"""How each pruned kernel of a model is run: in which format, by which engine."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse.formats import Condensed, Csr16, Format, PackedArray
from jaxsparse.formats.weights import Weight, bytes_of_each, pack_one
from jaxsparse.kernels._dense import dense
from jaxsparse.kernels._product import Engine
from jaxsparse.kernels._rules import Rules, choose, engines_of
from jaxsparse.kernels._timing import milliseconds
from jaxsparse.patterns import Block

_UNKNOWN = (math.nan, math.nan)


class Layer(NamedTuple):
    """How `sparsify` runs a pruned kernel.

    Attributes:
      engine: the name of the engine; "dense" for a kernel that stays a dense array.
      format: the name of the format; "" for a dense array.
      sparsity: the fraction of weights that its mask removes.
      rows: the largest number of rows of a product, for the traced shapes.
      bytes: the size of the kernel in bytes.
      why: the reason why a kernel stays dense.
      dense_ms: with `measure` the milliseconds of a dense product, else NaN.
      packed_ms: and those of the quickest engine.
    """

    engine: str
    format: str
    sparsity: float
    rows: int
    bytes: int
    why: str = ""
    dense_ms: float = math.nan
    packed_ms: float = math.nan


class Uses:
    """What a program does with a kernel."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.dense: list[str] = []


class Chosen(NamedTuple):
    """How a kernel is run, its packed form, and the engine that was measured."""

    layer: Layer
    packed: PackedArray | None = None
    engine: Engine | None = None


def chosen_of(
    weight: Weight,
    uses: Uses,
    format: Format | None,
    rules: Rules,
    timed: dict[Any, list[float]] | None,
) -> Chosen:
    """How a kernel is run; `timed` are the times so far, if it is to be measured."""
    removed = 1 - float(np.mean(weight.kept))
    rows = max(uses.rows, default=0)
    whole = weight.kept.size * weight.itemsize

    def stays(why: str, times: tuple[float, float] = _UNKNOWN) -> Chosen:
        return Chosen(Layer("dense", "", removed, rows, whole, why, *times))

    if uses.dense:
        return stays(uses.dense[0])
    if not uses.rows:
        return stays("the program does not multiply by it")
    tried = [format] if format is not None else _formats(weight)
    packed = [x for x in (pack_one(weight, one) for one in tried) if x is not None]
    if timed is None:
        pairs = [(choose(x, rows=rows, rules=rules), x) for x in packed]
        pairs = [(engine, x) for engine, x in pairs if engine is not dense][:1]
        if not pairs:
            return stays("no rule has a quicker engine for it")
        (engine, best), times = pairs[0], None
    else:
        pairs = [(e, x) for x in packed for e in engines_of(x, rules)]
        if not pairs:
            return stays("no rule has an engine for it")
        key = weight.view, weight.itemsize, rows, round(removed, 3), tuple(tried)
        if key not in timed:
            timed[key] = milliseconds(pairs, rows, weight.matrices.dtype)
        first, *rest = timed[key]
        (engine, best), least = pairs[int(np.argmin(rest))], min(rest)
        times = first, least
        if least >= first:
            return stays("a dense product is quicker", times)
    taken = sum(x.nbytes for x in jax.tree.leaves(best))
    name = getattr(engine, "__name__", str(engine))
    own = _UNKNOWN if times is None else times
    layer = Layer(name, type(best).__name__, removed, rows, taken, "", *own)
    return Chosen(layer, best, None if times is None else engine)


def _formats(weight: Weight) -> list[Any]:
    """The formats of a mask for which there may be an engine, the quickest first."""
    there = bytes_of_each(weight)
    order = [Condensed, *(Block(t) for t in ((1, 128), (16, 16), (1, 4))), Csr16]
    return [one for one in order if one in there]
