"""Masks of random scores of every type, against a sort; a program each, drawn often."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import selection

import jaxsparse as js

FOUND = {
    "of one": ("layer", "float16", [(1, 1)]),
    "of a row": ("layer", "float8_e4m3fn", [(1, 613)]),
    "of two layers": ("layer", "float32", [(50, 100), (7, 90)]),
    "of outputs": ("output", "bfloat16", [(41, 23)]),
    "of all": ("global", "float8_e5m2", [(17, 5), (1, 1), (60, 40)]),
}


def drawn(rng, shape, dtype):
    """Any bits, or numbers among which some are tied, some special."""
    if rng.random() < 0.3:
        bits = rng.integers(0, 256, size=(*shape, dtype.itemsize), dtype=np.uint8)
        return bits.view(dtype).reshape(shape)
    x = rng.standard_normal(shape)
    x = np.where(rng.random(shape) < 0.5, np.round(x), x)
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    special = [0.0, -0.0, tiny, -tiny, 2 * tiny, np.inf, -np.inf, np.nan, -np.nan]
    x = np.where(rng.random(shape) < 0.1, rng.choice(special, shape), x)
    return x.astype(dtype)


@pytest.mark.parametrize("name", FOUND)
def test_masks_are_those_of_a_sort(name):
    scope, dtype, shapes = FOUND[name]
    pattern = js.Unstructured(scope)
    rng = np.random.default_rng(len(name))
    masks = jax.jit(functools.partial(js.patterns.masks, pattern=pattern, where=".*"))
    for sparsity in (0.0, 0.999999, round(rng.random(), 2), round(rng.random(), 6)):
        scores = {
            f"w{i}": drawn(rng, s, jnp.dtype(dtype)) for i, s in enumerate(shapes)
        }
        found = masks(scores, np.float32(sparsity))
        with np.errstate(invalid="ignore"):
            if scope == "global":
                expected = selection.global_masks(
                    list(scores.values()), sparsity, pattern
                )
            else:
                expected = [
                    selection.mask(x, sparsity, pattern) for x in scores.values()
                ]
        for got, want in zip(found.values(), expected, strict=True):
            np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)
