"""Layers with correlated inputs, for the tests of layer-wise solvers."""

import jax.numpy as jnp
import numpy as np

import jaxsparse as js

D_OUT, D_IN = 16, 40  # whole blocks of 8: one loop to compile
LAYER, ROWS = js.Unstructured(), js.Unstructured("output")
TWO_OF_FOUR = js.NM(2, 4)
PATTERNS = {"layer": LAYER, "output": ROWS, "nm": TWO_OF_FOUR}


def layer(d_out=D_OUT, d_in=D_IN, seed=0, dead=(), rows=400):
    """A kernel and a gram matrix, numpy float64."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((d_in, d_in)) + 0.5 * rng.standard_normal((d_in, 1))
    x = rng.standard_normal((rows, d_in)) @ mix
    x[:, list(dead)] = 0
    return rng.standard_normal((d_out, d_in)), x.T @ x / rows


def single(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def assert_obeys(mask, sparsity, pattern):
    """The exact count in each competing group."""
    removed = ~np.asarray(mask)
    if isinstance(pattern, js.NM):
        groups = removed.reshape(-1, pattern.of)
    else:
        groups = removed if pattern.scope == "output" else removed.reshape(1, -1)
    count = js.patterns.removed_count(sparsity, groups.shape[1])
    np.testing.assert_array_equal(groups.sum(1), count)


def correlated(d_out=D_OUT, d_in=64, rows=1000, seed=0):
    """A layer whose inputs' variance falls as k^-2.5 along random directions."""
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(rng.standard_normal((d_in, d_in)))
    x = rng.standard_normal((rows, d_in)) * np.arange(1, d_in + 1) ** -1.25
    x = x @ directions.T
    return single(rng.standard_normal((d_out, d_in)), x.T @ x / rows)
