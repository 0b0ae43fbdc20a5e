"""Balanced tiles in the layer-wise solvers, against the same in dense float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import layerwise as oracle
from reference import selection
from solvers.layers import layer

import jaxsparse as js

AXES = js.Axes(input=(1,), output=(0,))


def tiles(x, pattern, reduce):
    a, v = pattern.shape
    d_out, d_in = x.shape
    return reduce(x.reshape(d_out // v, v, d_in // a, a), axis=(1, 3))


def spread(x, pattern):
    a, v = pattern.shape
    return np.repeat(np.repeat(x, v, axis=0), a, axis=1)


def column_sweep(w, gram, sparsity, pattern, *, block_size, mask=None):
    """SparseGPT by all of `U`; tiles are chosen at the start of a block of columns."""
    matrix, _ = oracle.damped(gram)
    upper = np.linalg.cholesky(np.linalg.inv(matrix)).T
    pivots, dead = np.diag(upper), np.diag(gram) == 0
    before = np.ones(w.shape, bool) if mask is None else mask
    now, kept, side = np.where(dead, 0.0, w), before.copy(), pattern.shape[0]
    gone = ~tiles(before, pattern, np.any)
    dead_tiles = dead.reshape(-1, side).all(1)
    size, mean = block_size // side, tiles(np.abs(w), pattern, np.mean)
    each = selection.removed_count(sparsity, w.shape[1] // side)
    pairs = zip(gone, mean, strict=True)
    counts = [
        oracle.block_counts(each, g[None], dead_tiles, size, m[None]) for g, m in pairs
    ]
    for j in range(w.shape[1]):
        if j % block_size == 0:
            at, own = slice(j, j + block_size), slice(j // side, j // side + size)
            squares = (now[:, at] / pivots[at]) ** 2
            score = tiles(
                np.where(before[:, at] & ~dead[at], squares, 0), pattern, np.mean
            )
            unused = -1 / np.maximum(tiles(np.abs(now[:, at]), pattern, np.mean), 1e-37)
            score = np.where(dead_tiles[own], unused, score)
            score = np.where(gone[:, own], -np.inf, score)
            chosen = np.concatenate([
                oracle.lowest(s[None], count[j // block_size])
                for s, count in zip(score, counts, strict=True)
            ])
            kept[:, at] &= spread(chosen, pattern)
        e = np.where(kept[:, j], 0.0, now[:, j]) / pivots[j]
        now[:, j:] -= e[:, None] * upper[j, j:]
    return np.where(kept, np.where(dead, w, now), 0.0), kept


def check(w, gram, sparsity, pattern, **options):
    """In float64: the mask of the oracle, its weights, as many in each group."""
    new, kept = column_sweep(w, gram, sparsity, pattern, **options)
    with jax.enable_x64(True):
        given = {k: jnp.asarray(x) if k == "mask" else x for k, x in options.items()}
        arrays = jnp.asarray(w), jnp.asarray(gram)
        got = js.solvers.sparsegpt(*arrays, sparsity, pattern=pattern, **given)
        np.testing.assert_array_equal(got.mask, kept)
        np.testing.assert_allclose(got.w, new, rtol=1e-6, atol=1e-9)
    whole = tiles(np.asarray(got.mask), pattern, np.any)
    removed = (~whole).sum(1)
    np.testing.assert_array_equal(
        removed, selection.removed_count(sparsity, whole.shape[1])
    )


@pytest.mark.parametrize(
    ("shape", "dead"), [((1, 4), ()), ((1, 4), (0, 3, 8)), ((4, 4), (0, 1, 2, 3, 9))]
)
def test_sparsegpt_is_the_column_sweep(shape, dead):
    """A dead input in a tile of others does not make the tile the first to go."""
    w, gram = layer(dead=dead)
    check(w, gram, 0.5, js.Balanced(shape), block_size=8)


def test_what_was_removed_before_stays_so_and_counts():
    """Whole tiles, and parts of two."""
    w, gram = layer()
    pattern = js.Balanced((2, 4))
    mask = np.ones(w.shape, bool)
    mask[4:8, 2:8] = False
    mask[0, 0] = mask[5, 30] = False
    check(w, gram, 0.6, pattern, block_size=8, mask=mask)


def test_admm_projects_onto_the_nearest_matrix_with_such_tiles():
    """Which keeps the tiles of the largest sums of squares."""
    w, gram = layer()
    pattern = js.Balanced((2, 4))
    scale = np.sqrt(np.diag(gram))
    with jax.enable_x64(True):
        got = js.solvers.admm(
            *(jnp.asarray(x) for x in (w, gram)),
            0.75,
            pattern=pattern,
            iterations=1,
            mask_iterations=1,
        )
    squares = tiles((w * scale) ** 2, pattern, np.sum)
    kept = [selection.best(row, 5) for row in squares]
    expected = np.zeros(squares.shape, bool)
    for row, places in zip(expected, kept, strict=True):
        row[places] = True
    np.testing.assert_array_equal(got.mask, spread(expected, pattern))


def test_a_dead_input_among_others_costs_admm_no_tile():
    w, gram = layer(dead=(0,))
    w[:, 1] = 100.0
    got = js.solvers.admm(
        *map(jnp.float32, (w, gram)), 0.5, pattern=js.Balanced((2, 4))
    )
    assert np.asarray(got.mask)[:, :2].all()


@pytest.mark.parametrize(
    ("shape", "said"), [((3, 4), "3 does not divide d_in = 40"), ((2, 5), "d_out = 16")]
)
def test_tiles_that_do_not_divide_are_an_error(shape, said):
    w, gram = (jnp.asarray(x, jnp.float32) for x in layer())
    for solve in (js.solvers.sparsegpt, js.solvers.admm, js.solvers.wanda):
        with pytest.raises(ValueError, match=said):
            solve(w, gram, 0.5, pattern=js.Balanced(shape))


def test_greedy_rows_have_no_tiles():
    w, gram = (jnp.asarray(x, jnp.float32) for x in layer())
    with pytest.raises(TypeError, match="exact_obs prunes js"):
        js.solvers.exact_obs(w, gram, 0.5, pattern=js.Balanced((1, 4)))


def test_a_whole_model_layer_by_layer():
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.standard_normal((16, 16)), jnp.float32) for k in "ab"}
    x = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    apply_fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    prune = lambda pattern: js.oneshot.layerwise(
        apply_fn, params, [x], sparsity=0.5, pattern=pattern, show=False
    )
    pattern = js.Balanced((1, 8))
    pruned = prune(pattern)
    js.patterns.verify(pruned.masks, params, pattern=pattern)
    assert all(int(m.sum()) == 128 for m in pruned.masks.values())
    with pytest.raises(ValueError, match=r"a: .* do not divide its 16 inputs and 16"):
        prune(js.Balanced((1, 12)))


def test_a_schedule_keeps_zeros_and_the_counts():
    """`prune_schedule` under `enforce`, through three sparsities."""
    import optax

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((8, 12)), jnp.float32)}
    pattern = js.Balanced((2, 4))
    steps = js.schedules.polynomial(final=0.75, begin=0, end=2)
    tx = js.prune_schedule(steps, every=1, pattern=pattern).wrap(optax.sgd(0.1))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
        masks = js.masks_of(state)
        js.patterns.verify(masks, params, pattern=pattern)
        assert not np.asarray(params["w"])[~np.asarray(masks["w"])].any()
    assert int(masks["w"].sum()) == 24
