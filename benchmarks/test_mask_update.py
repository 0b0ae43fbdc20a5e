"""Choosing masks for 10.5 million parameters at 90 %, against sorting.

The reference is the obvious version: argsort the scores and keep the first k (N:M: the
rank is the argsort of the argsort). Its masks are bit for bit the same.
The floor is one read of the scores and one write of the mask.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxsparse as js

SHAPES = [(1024, 1024), (1024, 2048), (2048, 1024), (1024, 1024), (1024, 1024)]
SHAPES += [(2048, 1024), (1024, 1024)]
SPARSITY = 0.9


def weights(large: bool) -> dict:
    scale = 4 if large else 1
    return {
        f"layer_{i}": jax.random.normal(
            jax.random.fold_in(jax.random.key(0), i), (scale * a, scale * b)
        )
        for i, (a, b) in enumerate(SHAPES)
    }


def sorted_mask(scores):
    flat = jnp.ravel(scores)
    keep = flat.size - int(np.floor(SPARSITY * flat.size + 0.5))
    last = jnp.argsort(-flat)[keep - 1]
    cut = flat[last]
    first = jnp.arange(flat.size) <= last
    return jnp.reshape((flat > cut) | ((flat == cut) & first), scores.shape)


def sorted_global(params):
    flat = sorted_mask(jnp.concatenate([jnp.abs(w).ravel() for w in params.values()]))
    ends = np.cumsum([w.size for w in params.values()])
    parts = jnp.split(flat, ends[:-1])
    return {
        k: part.reshape(w.shape)
        for (k, w), part in zip(params.items(), parts, strict=True)
    }


def sorted_nm(w):
    groups = jnp.abs(w).reshape(w.shape[0] // 4, 4, w.shape[1])
    ranks = jnp.argsort(jnp.argsort(-groups, axis=1), axis=1)
    return (ranks < 2).reshape(w.shape)


def sorted_blocks(w):
    pooled = lax.reduce_window(jnp.abs(w), 0.0, lax.add, (4, 4), (4, 4), "VALID") / 16
    return jnp.repeat(jnp.repeat(sorted_mask(pooled), 4, axis=0), 4, axis=1)


CASES = {
    "per layer": (
        js.Unstructured(),
        lambda p: jax.tree.map(lambda w: sorted_mask(jnp.abs(w)), p),
    ),
    "global": (js.Unstructured(scope="global"), sorted_global),
    "2:4": (js.NM(keep=2, of=4), lambda p: jax.tree.map(sorted_nm, p)),
    "4x4 blocks": (js.Block((4, 4)), lambda p: jax.tree.map(sorted_blocks, p)),
}


@pytest.mark.parametrize("name", CASES)
def test_mask_update(name, large, compare, record):
    pattern, reference = CASES[name]
    params = weights(large)
    sparsity = None if isinstance(pattern, js.NM) else SPARSITY
    ours = jax.jit(
        lambda p: js.patterns.masks(js.scores.magnitude(p), sparsity, pattern=pattern)
    )
    theirs = jax.jit(reference)
    floor = jax.jit(lambda p: jax.tree.map(lambda w: jnp.abs(w) > 1.6, p))
    for k, mask in theirs(params).items():
        same = np.mean(np.asarray(mask) == np.asarray(ours(params)[k]))
        # Means of tiles are summed in another order by the two.
        assert same == 1.0 or (name == "4x4 blocks" and same > 1 - 1e-4), (k, same)
    compare(
        f"mask update, {name}",
        {
            "argsort": lambda: theirs(params),
            "jaxsparse": lambda: ours(params),
            "floor: one pass": lambda: floor(params),
        },
    )
    scores = sum(w.nbytes for w in params.values())
    analysis = ours.lower(params).compile().memory_analysis()
    record(
        benchmark=f"mask update, {name}",
        what="peak temporary memory / scores",
        ratio=round(analysis.temp_size_in_bytes / scores, 3),
    )
