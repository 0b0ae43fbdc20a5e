"""How parameters are cut: every weight in one block, units and layers whole."""

import math

import numpy as np
import pytest
from curvature import problems
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jaxsparse as js
from jaxsparse.curvature.layout import block_layout, from_blocks, to_blocks

Axes = js.Axes
CASES = [
    ((12, 8), None),
    ((8, 12), Axes(input=(1,), output=(0,))),  # torch's linear layer
    ((3, 3, 4, 4), None),
    ((8, 2, 4), Axes(input=(0,), output=(1, 2))),  # query heads
    ((2, 4, 8), Axes(input=(0, 1), output=(2,))),  # attention's output
    ((3, 8, 4), Axes(input=(1,), output=(2,), batch=(0,))),
    ((4, 8, 2), Axes(input=(1,), output=(0,), batch=(2,))),
    ((30,), None),
    ((2, 3, 5), None),  # read as it lies
]
PATTERNS = [
    js.Unstructured(),
    js.NM(2, 4),
    js.Block((2, 2)),
    js.Block((4, 1)),
    js.Block((1, 2)),
    js.Block((2, 4)),
    js.Balanced((2, 2)),
]


def known_axes(shape, axes):
    """Those the library takes where none are stated."""
    if axes is not None:
        return axes
    if len(shape) == 2 or len(shape) >= 4:
        return Axes(tuple(range(len(shape) - 1)), (len(shape) - 1,))
    return Axes(input=tuple(range(len(shape))), output=())


def units(shape, axes, pattern):
    """For each weight the number of the unit it is in, of the parameter's shape."""
    place = np.indices(shape)
    match pattern:
        case js.Block(shape=(a, b)) | js.Balanced(shape=(a, b)):
            place[axes.input[-1]] //= a
            place[axes.output[-1]] //= b
            rows = place.reshape(len(shape), -1)
        case js.NM(of=of):
            d_in = [shape[k] for k in axes.input]
            group = np.ravel_multi_index([place[k] for k in axes.input], d_in) // of
            rest = [place[k] for k in (*axes.batch, *axes.output)]
            rows = np.stack([*rest, group]).reshape(len(rest) + 1, -1)
        case _:
            rows = place.reshape(len(shape), -1)
    return np.unique(rows, axis=1, return_inverse=True)[1].reshape(shape)


@settings(max_examples=60)
@given(st.sampled_from(CASES), st.sampled_from(PATTERNS), st.integers(1, 6))
def test_every_weight_lies_in_one_block_and_comes_back(case, pattern, times):
    shape, stated = case
    axes = known_axes(shape, stated)
    plain = isinstance(pattern, js.Unstructured)
    assume(plain or axes.output)  # units have an input and an output side
    unit = 4 if pattern == js.NM(2, 4) else math.prod(getattr(pattern, "shape", ()))
    size = times * unit
    layers = math.prod(shape[a] for a in axes.batch)
    assume(size <= math.prod(shape) // layers)
    layout = block_layout("w", shape, block_size=size, axes=stated, pattern=pattern)
    index = np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape)
    blocks = np.asarray(to_blocks(index, layout))
    np.testing.assert_array_equal(from_blocks(blocks, layout), index)
    assert blocks.shape == (*layout.lead, size)
    # Nothing is lost, nothing is there twice, and padding is at the end of a layer.
    flat = blocks.reshape(-1, size)
    np.testing.assert_array_equal(np.sort(flat[flat > 0]), np.sort(index.ravel()))
    padded = (flat == 0).any(axis=1)
    assert not np.any(np.diff((flat == 0).astype(int), axis=1) < 0)
    per_layer = -(-math.prod(shape) // layers // size)
    last = np.arange(len(flat)) % per_layer == per_layer - 1
    assert not np.any(padded & ~last)
    # Units of the pattern lie in one block, one after another.
    number = units(shape, axes, pattern).ravel()
    assert layout.unit == unit
    groups = flat.reshape(-1, layout.unit)
    groups = groups[(groups > 0).all(axis=1)]
    assert groups.size == index.size
    assert (np.ptp(number[groups.astype(int) - 1], axis=1) == 0).all()
    if plain:
        expected = problems.index_blocks(shape, axes, size)
        got = [block[block > 0] - 1 for block in flat]
        assert all(map(np.array_equal, got, expected))


def test_leading_axes_are_those_at_which_blocks_end():
    """They keep the sharding of outputs, and of inputs where blocks fit in."""
    lead = lambda shape, size, **options: (
        block_layout("w", shape, block_size=size, **options).lead
    )
    assert lead((64, 32), 16) == (32, 4)  # four blocks along the inputs of an output
    assert lead((64, 32), 64) == (32, 1)
    assert lead((64, 32), 48) == (43,)  # across outputs, the last one not filled
    assert lead((3, 3, 8, 16), 8) == (16, 3, 3, 1)
    assert lead((3, 3, 8, 16), 24) == (16, 3, 1)
    stacked = Axes(input=(1,), output=(2,), batch=(0,))
    assert lead((4, 6, 5), 4, axes=stacked) == (4, 8)
    # Tiles: those of an output's tiles, then of an input's.
    assert lead((8, 8), 8, pattern=js.Block((2, 2))) == (4, 2)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_smallest_parameters(shape):
    layout = block_layout("w", shape, block_size=1)
    x = np.ones(shape, np.float32)
    assert to_blocks(x, layout).size == 1
    assert from_blocks(to_blocks(x, layout), layout).shape == shape
    grads = {"w": np.stack([x, 3 * x])}
    fisher = js.curvature.block_fisher(grads, block_size=1, damping=3.0)
    diagonal = js.curvature.inverse_diagonal(fisher)["w"]
    np.testing.assert_allclose(diagonal, np.full(shape, 1 / 8), rtol=1e-6)
