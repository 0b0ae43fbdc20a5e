"""One search for many arrays, against a sort in NumPy."""

import functools

import jax
import numpy as np
import pytest

from jaxsparse.ranking.joint import joint_masks
from jaxsparse.ranking.keys import ordered_keys

SHAPES = [(7, 5), (3,), (600, 2), (0, 4), (1, 1)]
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)


def sorted_masks(arrays, keep, least):
    """The best `least` of each first, then the best of all; ties by position."""
    rows = []
    for i, x in enumerate(arrays):
        flat = np.asarray(x, np.float64).ravel()
        nan = np.isnan(flat)
        own = sorted(range(flat.size), key=lambda p: (nan[p], -flat[p], p))
        first = set(own[:least])
        rows += [(p not in first, nan[p], -flat[p], i, p) for p in range(flat.size)]
    keep = max(keep, sum(not row[0] for row in rows))
    masks = [np.zeros(x.size, bool) for x in arrays]
    for *_, i, p in sorted(rows)[:keep]:
        masks[i][p] = True
    return [m.reshape(x.shape) for m, x in zip(masks, arrays, strict=True)]


def low_layers(x):
    """Arrays of which some have none among the best, with ties."""
    return x - {35: 100, 1200: 50}.get(x.size, 0)


RNG = np.random.default_rng(0)
DRAWS = {
    "normal": RNG.standard_normal,
    "ties": lambda shape: RNG.integers(-2, 3, shape),
    "zeros": np.zeros,
    "infinite": lambda shape: np.where(RNG.random(shape) < 0.3, np.inf, -1),
    "many scales": lambda shape: np.exp(15 * RNG.standard_normal(shape)),
    "low layers": lambda shape: low_layers(RNG.standard_normal(shape)),
    "low layers, ties": lambda shape: low_layers(RNG.integers(0, 3, shape)),
    "nan": lambda shape: np.where(
        RNG.random(shape) < 0.3, np.nan, RNG.integers(-1, 2, shape)
    ),
}


@functools.cache
def program(least):
    of_each = [min(least, int(np.prod(shape))) for shape in SHAPES]
    return jax.jit(lambda xs, keep: joint_masks(xs, ordered_keys, keep, of_each))


@pytest.mark.parametrize("least", [0, 1, 3])
def test_masks_are_those_of_a_sort(least):
    for name, draw in DRAWS.items():
        arrays = [np.asarray(draw(shape), np.float32) for shape in SHAPES]
        for keep in (0, 1, 5, SIZE // 3, SIZE - 20, SIZE - 1, SIZE):
            found = program(least)(arrays, np.int32(keep))
            for mask, right in zip(
                found, sorted_masks(arrays, keep, least), strict=True
            ):
                np.testing.assert_array_equal(mask, right, f"{name}, {keep}")


def test_each_of_a_batch_is_searched_alone():
    draw = lambda shape: np.asarray(RNG.integers(0, 9, (3, *shape)), np.float32)
    arrays = [draw(shape) for shape in SHAPES]
    keep = np.array([1, 600, SIZE - 1], np.int32)
    found = jax.vmap(program(1))(arrays, keep)
    for i, n in enumerate(keep):
        right = sorted_masks([x[i] for x in arrays], int(n), 1)
        for mask, one in zip(found, right, strict=True):
            np.testing.assert_array_equal(mask[i], one)
