"""How a parameter is cut into blocks of neighboring weights."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import _checks, patterns
from jaxsparse._typing import Array, PyTree
from jaxsparse.tree import (
    Axes,
    AxesRule,
    default_axes,
    leaves_with_paths,
    resolve_axes,
)


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """Where each weight of a parameter lies among the blocks: static numbers only.

    The parameter is reshaped to `split`, transposed by `order` and read off in blocks;
    `order` puts layers first, then outputs, then inputs. So a block holds weights of
    one output (or of few), which compete for the same inputs, and a unit of the
    pattern lies in one block.
    """

    # The parameter's path, for messages. Layouts are equal without it: so parameters of
    # equal shape share one compilation
    path: str = dataclasses.field(compare=False)
    shape: tuple[int, ...]
    split: tuple[int, ...]  # its shape with tiled axes cut in two
    order: tuple[int, ...]  # the axes of `split`, slowest first
    # The shape in which the blocks are numbered. Axes stay apart where blocks end with
    # them, so that they keep their sharding
    lead: tuple[int, ...]
    layers: int  # how many of the first axes of `order` number layers
    block_size: int  # the weights of a block. The last one may hold fewer
    # How many neighbours form a unit of the pattern; 1 for single weights
    unit: int = 1

    @property
    def ordered(self) -> tuple[int, ...]:
        """The shape after reshape and transposition."""
        return tuple(self.split[a] for a in self.order)

    @property
    def per_layer(self) -> int:
        """The weights of one layer."""
        return math.prod(self.ordered[self.layers :])

    @property
    def blocks(self) -> int:
        """The blocks of one layer."""
        return -(-self.per_layer // self.block_size)


def block_layouts(
    params: PyTree, block_size: int, axes: AxesRule, **options: Any
) -> tuple[BlockLayout, ...]:
    """The blocks of each parameter of a tree."""
    check_block_size(block_size)
    options["block_size"] = block_size
    stated = resolve_axes(params, axes)
    return tuple(
        block_layout(path, tuple(w.shape), axes=stated.get(path), **options)
        for path, w in leaves_with_paths(params)
    )


def block_layout(
    path: str,
    shape: tuple[int, ...],
    *,
    block_size: int,
    axes: Axes | None = None,
    pattern: patterns.Pattern = patterns.Unstructured(),
) -> BlockLayout:
    """The blocks of a parameter."""
    ndim = len(shape)
    if axes is None and (ndim == 2 or ndim >= 4):
        axes = default_axes(path, jax.ShapeDtypeStruct(shape, jnp.float32))
    split, order, unit, layers = _ordered(path, shape, axes, pattern)
    ordered = tuple(split[a] for a in order)
    per_layer = math.prod(ordered[layers:])
    if block_size > per_layer:
        raise ValueError(
            f"{path}: {block_size=} exceeds the {per_layer} weights of shape {shape}"
            f"{' in each layer' if layers else ''}. Choose smaller blocks, or leave "
            "this parameter out with `where`."
        )
    if block_size % unit:
        raise ValueError(
            f"{path}: {pattern} has units of {unit} weights, which blocks of "
            f"{block_size} would cut. Choose a block_size that {unit} divides."
        )
    lead = (*ordered[:layers], -(-per_layer // block_size))
    for k in range(len(ordered) - 1, layers, -1):
        if math.prod(ordered[k:]) % block_size == 0:
            lead = (*ordered[:k], math.prod(ordered[k:]) // block_size)
            break
    return BlockLayout(path, shape, split, order, lead, layers, block_size, unit)


def _ordered(path, shape, axes, pattern):
    """`split`, `order`, the size of a unit, and how many axes number layers."""
    if axes is None:
        if isinstance(pattern, patterns.NM | patterns.Block | patterns.Balanced):
            default_axes(path, jax.ShapeDtypeStruct(shape, jnp.float32))  # says why not
        return shape or (1,), tuple(range(max(1, len(shape)))), 1, 0
    plain = (*axes.batch, *axes.output, *axes.input)
    layers = len(axes.batch)
    match pattern:
        case patterns.NM(of=of):
            d_in = math.prod(shape[a] for a in axes.input)
            _check_divides(path, shape, pattern, of, d_in, "number of inputs")
            return shape, plain, of, layers
        case patterns.Block(shape=(a, b)) | patterns.Balanced(shape=(a, b)):
            i, o = axes.input[-1], axes.output[-1]
            _check_divides(path, shape, pattern, a, shape[i], f"axis {i}")
            _check_divides(path, shape, pattern, b, shape[o], f"axis {o}")
            if b == 1:
                return shape, plain, a, layers
            return *_tiled(shape, axes, a, b), a * b, layers
        case _:
            return shape, plain, 1, layers


def _check_divides(path, shape, pattern, size: int, count: int, name: str) -> None:
    if count % size:
        raise ValueError(
            f"{path}: {pattern} needs a {name} that {size} divides; shape {shape} has "
            f"{count}. Leave this parameter out with `where`, or state other axes."
        )


def _tiled(shape, axes: Axes, a: int, b: int):
    """`split` and `order` in which the weights of an a x b tile are neighbors."""
    i, o = axes.input[-1], axes.output[-1]
    split, place = [], {}
    for axis, size in enumerate(shape):
        side = {i: a, o: b}.get(axis)
        place[axis] = len(split)
        split += [size] if side is None else [size // side, side]
    tiles = (*axes.batch, *axes.output, *axes.input)
    order = (*(place[axis] for axis in tiles), place[o] + 1, place[i] + 1)
    return tuple(split), order


def to_blocks(x: Array, layout: BlockLayout) -> Array:
    """Cuts an array of a parameter's shape into blocks, the last padded with zeros."""
    extra = x.ndim - len(layout.shape)
    front = x.shape[:extra]
    x = x.reshape(*front, *layout.split)
    x = x.transpose(*range(extra), *(extra + a for a in layout.order))
    padding = layout.blocks * layout.block_size - layout.per_layer
    if padding:
        layers = layout.ordered[: layout.layers]
        x = x.reshape(*front, *layers, layout.per_layer)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*front, *layout.lead, layout.block_size)


def from_blocks(blocks: Array, layout: BlockLayout) -> Array:
    """Puts blocks together again."""
    if layout.blocks * layout.block_size != layout.per_layer:
        layers = layout.ordered[: layout.layers]
        blocks = blocks.reshape(*layers, layout.blocks * layout.block_size)
        blocks = blocks[..., : layout.per_layer]
    x = blocks.reshape(layout.ordered)
    back = sorted(range(len(layout.order)), key=lambda k: layout.order[k])
    return x.transpose(*back).reshape(layout.shape)


def block_sharding(x: Any, layout: BlockLayout) -> NamedSharding | None:
    """How the blocks of a parameter lie: as it does, where blocks end with its axes."""
    found = getattr(x, "sharding", None)
    if not isinstance(found, NamedSharding) or found.mesh.size == 1:
        return None
    explicit = AxisType.Explicit in found.mesh.axis_types
    if not (explicit or _checks.is_concrete(x)) or len(layout.split) > x.ndim:
        return None
    parts = (*found.spec, *[None] * x.ndim)
    spec = [parts[a] for a in layout.order[: len(layout.lead)]]
    devices = math.prod(found.mesh.shape[name] for name in jax.tree.leaves(spec[-1]))
    merged = math.prod(layout.ordered[len(spec) - 1 :])
    if merged % (devices * layout.block_size):
        spec[-1] = None
    return NamedSharding(found.mesh, P(*spec))


def check_block_size(block_size: int) -> None:
    """Raises unless it is a positive integer."""
    _checks.check_positive_int(block_size, name="block_size")
