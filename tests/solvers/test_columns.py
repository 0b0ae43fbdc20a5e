"""SparseGPT's sweep against the same in dense float64, and what it keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import layerwise as oracle
from solvers import layers
from solvers.layers import LAYER, PATTERNS, TWO_OF_FOUR, layer, single

import jaxsparse as js

sparsegpt = js.solvers.sparsegpt
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def check(w, gram, sparsity, pattern, **options):
    """In float64: the mask of the oracle, its weights and its error."""
    with jax.enable_x64(True):
        mask = options.pop("mask", None)
        given = {} if mask is None else {"mask": jnp.asarray(mask)}
        got = sparsegpt(
            jnp.asarray(w),
            jnp.asarray(gram),
            sparsity,
            pattern=pattern,
            **given,
            **options,
        )
        new, kept = oracle.column_sweep(
            w, gram, sparsity, pattern, mask=mask, **options
        )
        np.testing.assert_array_equal(got.mask, kept)
        np.testing.assert_allclose(got.w, new, rtol=1e-6, atol=1e-9)
        error = oracle.error(w, new, gram)
        total = oracle.error(w, 0 * w, gram)
        _, damping = oracle.damped(gram)
        np.testing.assert_allclose(got.info.error, error, rtol=1e-6)
        np.testing.assert_allclose(got.info.relative_error, error / total, rtol=1e-6)
        np.testing.assert_allclose(got.info.damping, damping)
        assert got.w.dtype == jnp.float64
    return got


@every_pattern
def test_it_is_the_column_sweep(pattern):
    """In blocks of 8 columns: wide products of what was done before."""
    w, gram = layer()
    got = check(w, gram, 0.5, pattern, block_size=8)
    layers.assert_obeys(got.mask, 0.5, pattern)
    assert int(got.info.dead) == 0


@pytest.mark.parametrize(
    "pattern",
    [
        LAYER,
        TWO_OF_FOUR,
        # What differs from `layer` here, the counts, is seen in blocks of 8 too.
        pytest.param(PATTERNS["output"], marks=pytest.mark.exhaustive),
    ],
    ids=["layer", "nm", "output"],
)
def test_parts_within_a_block_and_a_last_block_that_is_not_full(pattern):
    w, gram = layer(d_in=44)
    got = check(w, gram, 0.5, pattern, block_size=32)
    layers.assert_obeys(got.mask, 0.5, pattern)


@pytest.mark.parametrize(("keep", "of", "d_in"), [(1, 2, 36), (2, 3, 42), (3, 8, 40)])
def test_groups_smaller_and_larger_than_what_is_fixed_in_one_pass(keep, of, d_in):
    """In blocks of 15 or 16 columns, of which the last is not full."""
    w, gram = layer(d_in=d_in, dead=(1, 20))
    check(w, gram, 1 - keep / of, js.NM(keep, of), block_size=16)


@every_pattern
def test_dead_inputs_go_first_and_count(pattern):
    w, gram = layer(dead=(3, 9, 10, 39))
    got = check(w, gram, 0.5, pattern, block_size=8)
    layers.assert_obeys(got.mask, 0.5, pattern)
    assert int(got.info.dead) == 4
    assert not np.asarray(got.mask)[:, (3, 9, 10, 39)].any()


def test_more_weights_of_dead_inputs_than_are_removed():
    w, gram = layer(dead=range(30))
    got = check(w, gram, 0.5, LAYER, block_size=8)
    layers.assert_obeys(got.mask, 0.5, LAYER)
    unused = np.asarray(got.mask)[:, :30]
    np.testing.assert_array_equal(np.asarray(got.w)[:, :30][unused], w[:, :30][unused])
    assert float(got.info.error) == 0


@every_pattern
def test_what_was_pruned_before_stays_pruned_and_counts(pattern):
    w, gram = layer()
    before = np.random.default_rng(1).random(w.shape) > 0.2
    if pattern == TWO_OF_FOUR:
        before[:, ::4], before[:, 1::4] = False, True
        before[:, 2::4] = before[:, 3::4] = True
    before[:, 16:20] = pattern == TWO_OF_FOUR
    got = check(w, gram, 0.5, pattern, block_size=8, mask=before)
    layers.assert_obeys(got.mask, 0.5, pattern)
    assert not (np.asarray(got.mask) & ~before).any()


def test_nothing_removed_changes_nothing():
    w, gram = single(*layer())
    got = sparsegpt(w, gram, 0.0, block_size=8)
    np.testing.assert_array_equal(got.w, w)
    assert np.all(got.mask)
    assert float(got.info.error) == 0


def test_equal_weights_go_by_position():
    """In each block of 8 columns."""
    w, gram = single(np.ones((16, 40)), np.eye(40))
    got = sparsegpt(w, gram, 0.5, block_size=8)
    first = np.arange(40) % 8 < 4
    np.testing.assert_array_equal(got.mask, np.broadcast_to(first, w.shape))


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((16, 40), 8),
        # The same in more blocks, which take longer to compile.
        pytest.param((64, 300), 32, marks=pytest.mark.exhaustive),
    ],
)
def test_in_float32_it_has_the_error_of_the_oracle(shape, block_size):
    w, gram = layer(*shape)
    got = sparsegpt(*single(w, gram), 0.5, block_size=block_size)
    new, kept = oracle.column_sweep(w, gram, 0.5, LAYER, block_size=block_size)
    layers.assert_obeys(got.mask, 0.5, LAYER)
    np.testing.assert_array_equal(got.mask, kept)
    expected = oracle.error(w, new, gram)
    np.testing.assert_allclose(oracle.error(w, got.w, gram), expected, rtol=1e-5)
    np.testing.assert_allclose(got.info.error, expected, rtol=1e-5)


def test_a_factor_serves_several_kernels():
    (w, gram), other = single(*layer()), single(*layer(seed=1))[0]
    factor = js.curvature.factor_gram(gram, rel_damping=0.01)
    for kernel in (w, other):
        whole = sparsegpt(kernel, gram, 0.5, block_size=8)
        shared = sparsegpt(kernel, factor, 0.5, block_size=8)
        jax.tree.map(np.testing.assert_array_equal, shared, whole)


def test_the_factor():
    with jax.enable_x64(True):
        gram = layer(2, 600, dead=(5,))[1]
        factor = js.curvature.factor_gram(jnp.asarray(gram), rel_damping=0.01)
        matrix, damping = oracle.damped(gram)
        root = np.asarray(factor.root)
        np.testing.assert_allclose(root @ root.T, matrix, atol=1e-8)
        assert not np.tril(root, -1).any()
        inverse = js.curvature.damped_inverse(factor)
        np.testing.assert_allclose(inverse @ matrix, np.eye(600), atol=1e-8)
        np.testing.assert_allclose(factor.damping, damping)
        assert np.flatnonzero(factor.dead).tolist() == [5]


# Errors.


def eye(size):
    return np.eye(size, dtype="float32")


def test_a_matrix_that_is_not_positive_definite():
    w, _ = single(*layer())
    # Far more inputs than rows of data, and no damping.
    (singular,) = single(np.ones((40, 40)) - 0.5 * np.eye(40))
    with pytest.raises(ValueError, match=r"not positive definite in float32.*Raise"):
        sparsegpt(w, singular, 0.5, damping=0.0)
    call = functools.partial(sparsegpt, sparsity=0.5, damping=0.0, block_size=8)
    got = jax.jit(call)(w, singular)
    assert bool(got.info.failed)
    assert np.isnan(np.asarray(got.w)[np.asarray(got.mask)]).all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sparsity": 50}, ValueError, "For 50 % write 0.5"),
        ({"sparsity": None}, ValueError, "needs a sparsity"),
        ({"pattern": js.Unstructured("global")}, ValueError, "js.allocations"),
        ({"pattern": js.Block((4, 4))}, TypeError, "refit"),
        ({"pattern": js.NM(2, 16)}, ValueError, "16 does not divide d_in = 40"),
        ({"pattern": TWO_OF_FOUR, "sparsity": 0.75}, ValueError, "at most 2 of 4"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"rel_damping": -1.0}, ValueError, "rel_damping must be at least"),
        ({"mask": np.ones((16, 40))}, TypeError, "mask holds bools"),
        ({"mask": np.zeros((16, 40), bool)}, ValueError, "has removed 640 of"),
        ({"gram": eye(39)}, ValueError, r"gram must be \[40, 40\].*\(39, 39\)"),
        ({"gram": eye(40) * np.nan}, ValueError, "1600 of 1600 entries"),
        ({"gram": -eye(40)}, ValueError, "40 entries of the diagonal"),
        ({"w": np.ones((2, 16, 40))}, ValueError, "jax.vmap"),
        ({"w": np.ones((16, 40), int)}, TypeError, "real floating point"),
        ({"w": np.full((16, 40), np.inf)}, ValueError, "640 weights are NaN or Inf"),
    ],
)
def test_what_does_not_fit(options, error, match):
    w, gram = single(*layer())
    with pytest.raises(error, match=match):
        sparsegpt(**({"w": w, "gram": gram, "sparsity": 0.5} | options))


def test_dampings_that_contradict():
    w, gram = single(*layer())
    factor = js.curvature.factor_gram(gram, damping=1.0)
    with pytest.raises(ValueError, match="gram is a factor"):
        sparsegpt(w, factor, 0.5, damping=1.0)
    with pytest.raises(ValueError, match="takes one of damping"):
        js.curvature.factor_gram(gram)


@pytest.mark.parametrize("pattern", [js.Unstructured(), js.Unstructured("output")])
def test_a_solve_holds_the_layer_its_change_and_the_mask(pattern):
    n = 1024
    square = jax.ShapeDtypeStruct((n, n), jnp.float32)
    solve = jax.jit(functools.partial(sparsegpt, pattern=pattern))
    factor = jax.eval_shape(
        functools.partial(js.curvature.factor_gram, damping=1.0), square
    )
    used = solve.lower(square, factor, 0.5).compile().memory_analysis()
    # In matrices of float32: two, a quarter, and what a block needs.
    assert used.temp_size_in_bytes < 2.6 * 4 * n * n
