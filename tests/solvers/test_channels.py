"""Removal of whole inputs, against fits by brute force in dense float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import channels as oracle
from reference import layerwise
from solvers.layers import layer, single

import jaxsparse as js
from jaxsparse.solvers._channels import (
    channel_errors,
    refit_channels,
    remove_channels,
)

D_OUT, D_IN = 8, 24
SCATTERED = np.random.default_rng(5).permutation(D_IN)[:20].reshape(5, 4)
BLOCKS = {
    "channels": ({}, np.arange(D_IN).reshape(-1, 1)),
    "heads": ({"size": 4}, np.arange(D_IN).reshape(-1, 4)),
    "scattered": ({"blocks": SCATTERED}, SCATTERED),
}
every_kind = pytest.mark.parametrize("kind", BLOCKS)


def wide(*arrays):
    return [jnp.asarray(a, jnp.float64) for a in arrays]


@every_kind
@pytest.mark.parametrize("dead", [(), (3, 10)], ids=["", "dead inputs"])
def test_errors_are_those_of_the_best_fit_without_the_block(kind, dead, x64):
    options, blocks = BLOCKS[kind]
    w, gram = layer(D_OUT, D_IN, dead=dead)
    got = channel_errors(*wide(w, gram), **options)
    expected = oracle.errors(w, gram, blocks)
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8)
    if dead and kind == "channels":
        # Next to nothing, by their weights.
        unused = np.asarray(got)[[*dead]]
        least = 1e-20 * np.diag(gram).max() * np.sum(w[:, [*dead]] ** 2, 0)
        np.testing.assert_allclose(unused, least, rtol=1e-10)


def test_errors_within_a_block_are_not_those_of_its_columns():
    """Two equal inputs: each alone costs nothing, both cost what they carry."""
    w, gram = np.zeros((D_OUT, D_IN)), np.eye(D_IN)
    w[0, :4] = 1, 2, 3, 1
    gram[0, 1] = gram[1, 0] = 1
    w, gram = single(w, gram)
    alone = np.asarray(channel_errors(w, gram, damping=1e-3))
    both = np.asarray(channel_errors(w, gram, size=2, damping=1e-3))
    assert alone[:2].max() < 0.01
    np.testing.assert_allclose(both[:2], [9, 10], rtol=2e-3)


every_step = pytest.mark.parametrize("at_once", [1, 3, None])
# How columns are ordered and how many go at once have nothing to do with each other.
more = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("kind", "at_once"),
    [
        ("channels", 1),
        ("channels", 3),
        ("channels", None),
        ("heads", 3),
        ("scattered", None),
        pytest.param("heads", 1, marks=more),
        pytest.param("heads", None, marks=more),
        pytest.param("scattered", 1, marks=more),
        pytest.param("scattered", 3, marks=more),
    ],
)
def test_it_is_greedy(kind, at_once, x64):
    options, blocks = BLOCKS[kind]
    w, gram = layer(D_OUT, D_IN, dead=(3,), seed=1)
    number = len(blocks)
    count = js.patterns.removed_count(0.6, number)
    got = remove_channels(*wide(w, gram), 0.6, at_once=at_once, **options)
    step, errors, keep = oracle.greedy(w, gram, blocks, count, at_once or number)
    np.testing.assert_array_equal(got.step, step)
    np.testing.assert_allclose(got.errors, errors, rtol=1e-7, atol=1e-7)
    np.testing.assert_array_equal(got.mask, np.broadcast_to(keep, w.shape))
    matrix, damping = layerwise.damped(gram)
    new = oracle.refit(oracle.live(w, gram), matrix, keep)
    new = np.where((np.diag(gram) == 0) & keep, w, new)
    np.testing.assert_allclose(got.w, new, rtol=1e-8, atol=1e-10)
    assert not np.asarray(got.w)[:, ~keep].any()
    np.testing.assert_allclose(got.info.error, layerwise.error(w, new, gram), rtol=1e-8)
    np.testing.assert_allclose(got.info.damping, damping)


def test_more_columns_than_are_put_off(x64):
    """Several products with the matrices, the last of them not full."""
    w, gram = layer(4, 144, seed=2, rows=500)
    got = remove_channels(*wide(w, gram), count=135, rel_damping=0.1)
    # Greedy, but by an inverse anew in every step.
    matrix, _ = layerwise.damped(gram, 0.1)
    left, order = list(range(144)), []
    for _ in range(135):
        sub = matrix[np.ix_(left, left)]
        inverse = np.linalg.inv(sub)
        now = w @ matrix[:, left] @ inverse
        order.append(left.pop(int(np.argmin((now**2).sum(0) / np.diag(inverse)))))
    steps = np.asarray(got.step)
    np.testing.assert_array_equal(
        np.argsort(np.where(steps < 0, 999, steps))[:135], order
    )
    change = np.asarray(got.w) - w
    objective = np.trace(change @ matrix @ change.T)
    np.testing.assert_allclose(got.errors.sum(), objective, rtol=1e-8)


def test_what_is_removed_at_once_is_lowest_of_the_errors():
    w, gram = single(*layer(D_OUT, D_IN))
    errors = np.asarray(channel_errors(w, gram))
    got = remove_channels(w, gram, 0.5, at_once=None)
    gone = np.asarray(got.step) == 0
    np.testing.assert_array_equal(np.sort(errors)[:12], np.sort(errors[gone]))


def test_one_at_a_time_a_copy_is_missed_only_once():
    """Pairs of equal inputs: each is of no use as long as the other is there."""
    w = np.zeros((D_OUT, D_IN))
    w[0] = np.linspace(1, 8, 12).repeat(2)
    w, gram = single(w, np.kron(np.eye(12), np.ones((2, 2))))
    one = remove_channels(w, gram, 0.5, damping=1e-3)
    many = remove_channels(w, gram, 0.5, damping=1e-3, at_once=None)
    left = lambda removed: np.asarray(removed.mask)[0].reshape(12, 2).sum(1)
    np.testing.assert_array_equal(left(one), 1)
    np.testing.assert_array_equal(left(many), [0] * 6 + [2] * 6)
    assert float(one.info.error) < 1e-3 < 100 < float(many.info.error)


@every_step
def test_of_equals_the_lower_is_kept(at_once):
    w, gram = single(np.ones((D_OUT, D_IN)), np.eye(D_IN))
    got = remove_channels(w, gram, count=20, at_once=at_once)
    np.testing.assert_array_equal(got.mask[0], np.arange(D_IN) < 4)


in_pairs = jax.jit(functools.partial(remove_channels, size=2))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.9])
def test_the_count_is_exact_also_when_traced(sparsity):
    w, gram = single(*layer(D_OUT, D_IN))
    count = js.patterns.removed_count(sparsity, 12)
    traced = in_pairs(w, gram, jnp.float32(sparsity))
    assert (np.asarray(traced.step) >= 0).sum() == count
    assert (~np.asarray(traced.mask)).sum() == count * 2 * D_OUT
    if not sparsity:
        np.testing.assert_array_equal(traced.w, w)


@every_step
def test_ill_conditioned_inputs(at_once):
    """Condition 1e5 in float32: other blocks may go, but not dearer ones."""
    rng = np.random.default_rng(3)
    directions, _ = np.linalg.qr(rng.standard_normal((D_IN, D_IN)))
    gram = (directions * np.logspace(0, -5, D_IN)) @ directions.T
    gram, w = (gram + gram.T) / 2, rng.standard_normal((D_OUT, D_IN))
    call = functools.partial(remove_channels, count=12, damping=0.0, at_once=at_once)
    with jax.enable_x64(True):
        best = call(*wide(w, gram))
    got = call(*single(w, gram))
    assert not bool(got.info.failed)
    error = layerwise.error(w, got.w, gram)
    # Sets of blocks that float32 cannot tell apart differ by so much in their error.
    np.testing.assert_allclose(error, best.info.error, rtol=0.02)
    np.testing.assert_allclose(got.info.error, error, rtol=1e-3)


def test_refit_is_least_squares(x64):
    w, gram = layer(D_OUT, D_IN, dead=(3, 9))
    keep = np.random.default_rng(4).random(D_IN) > 0.4
    keep[3], keep[9] = True, False
    used = keep & (np.diag(gram) > 0)
    for damping in (0.0, 0.5):
        matrix = gram + damping * np.diag(np.diag(gram) > 0)
        got = refit_channels(*wide(w, gram), jnp.asarray(keep), damping=damping)
        new = np.zeros(w.shape)
        new[:, used] = (w @ matrix)[:, used] @ np.linalg.inv(matrix[np.ix_(used, used)])
        new[:, 3] = w[:, 3]
        np.testing.assert_allclose(got.w, new, rtol=1e-8, atol=1e-10)
        np.testing.assert_array_equal(got.mask, np.broadcast_to(keep, w.shape))
        error = layerwise.error(w, new, gram)
        np.testing.assert_allclose(got.info.error, error, rtol=1e-8)
    assert int(got.info.dead) == 2


def test_refit_is_that_of_rows_and_a_factor_will_do():
    w, gram = single(*layer(D_OUT, D_IN))
    keep = np.arange(D_IN) % 3 > 0
    mask = jnp.asarray(np.broadcast_to(keep, w.shape))
    by_rows = js.solvers.refit(w, mask, gram, rel_damping=0.05)
    factor = js.curvature.factor_gram(gram, rel_damping=0.05)
    by_factor = refit_channels(w, factor, keep)
    np.testing.assert_allclose(by_factor.w, by_rows.w, rtol=1e-3, atol=1e-4)
    removed = remove_channels(w, factor, count=5)
    again = remove_channels(w, gram, count=5, rel_damping=0.05)
    np.testing.assert_array_equal(removed.step, again.step)
    fitted = refit_channels(w, factor, np.asarray(removed.mask)[0])
    np.testing.assert_allclose(removed.w, fitted.w, rtol=1e-5, atol=1e-6)


def test_columns_without_relation_to_what_goes_stay_bit_for_bit():
    w, gram = layer(D_OUT, D_IN)
    halves = np.arange(D_IN) < 12
    w, gram = single(w, np.where(halves[:, None] == halves[None, :], gram, 0.0))
    got = np.asarray(refit_channels(w, gram, np.arange(D_IN) > 3).w)
    np.testing.assert_array_equal(got[:, 12:], np.asarray(w)[:, 12:])
    assert not np.array_equal(got[:, 4:12], np.asarray(w)[:, 4:12])


# What the other functions do in bfloat16, under vmap and on devices: see `contracts`.


def test_errors_of_many_layers_in_bfloat16():
    pairs = [single(*layer(D_OUT, D_IN, seed=seed)) for seed in range(2)]
    w, gram = (np.stack(x) for x in zip(*pairs, strict=True))
    w = w.astype(jnp.bfloat16)
    each = jax.jit(jax.vmap(functools.partial(channel_errors, size=2)))(w, gram)
    assert each.dtype == jnp.float32
    for i in range(2):
        own = channel_errors(*single(w[i], gram[i]), size=2)
        np.testing.assert_allclose(each[i], own, rtol=1e-4)


def test_traced_columns_to_keep():
    w, gram = single(*layer(D_OUT, D_IN))
    masks = np.stack([np.arange(D_IN) > 3, np.arange(D_IN) % 2 > 0])
    many = jax.vmap(refit_channels, (None, None, 0))(w, gram, masks)
    for i in range(2):
        one = refit_channels(w, gram, masks[i])
        np.testing.assert_allclose(many.w[i], one.w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_rows_on_many_devices(axes):
    """Errors, and all at once: one at a time is in `contracts`."""
    w, gram = single(*layer(D_OUT, D_IN))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axes,))
    rows, whole = NamedSharding(mesh, P("x", None)), NamedSharding(mesh, P())

    def both(w, gram):
        return (
            remove_channels(w, gram, count=6, at_once=None),
            channel_errors(w, gram),
        )

    spread = jax.device_put(w, rows), jax.device_put(gram, whole)
    compiled = jax.jit(both).lower(*spread).compile()
    (got, errors), (one, own) = compiled(*spread), both(w, gram)
    np.testing.assert_array_equal(got.step, one.step)
    np.testing.assert_allclose(got.w, one.w, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(errors, own, rtol=1e-4)
    for x in (got.w, got.mask):
        assert x.sharding.is_equivalent_to(rows, 2)
    text = compiled.as_text() or ""
    assert not re.findall(r"all-gather|all-to-all|collective-permute", text)


def test_a_factorisation_that_fails():
    w, gram = layer(D_OUT, D_IN)
    bad = gram - np.eye(D_IN) * np.diag(gram).max() / 2
    w, bad = single(w, bad - np.diag(np.minimum(np.diag(bad), 0.0)))
    with pytest.raises(ValueError, match="not positive definite"):
        remove_channels(w, bad, count=3, damping=0.0)
    with pytest.raises(ValueError, match="not positive definite"):
        refit_channels(w, bad, np.arange(D_IN) > 2)

    @jax.jit
    def both(w, gram):
        return (
            remove_channels(w, gram, count=3, damping=0.0),
            channel_errors(w, gram, damping=0.0),
        )

    got, errors = both(w, bad)
    assert bool(got.info.failed)
    assert np.isnan(np.asarray(got.w)[np.asarray(got.mask)]).all()
    assert np.isnan(errors).all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gram": np.eye(4)}, ValueError, "gram must be"),
        ({"w": np.ones(24)}, ValueError, "w must be a matrix"),
        ({"w": np.ones((8, 24), int)}, TypeError, "real floating point"),
        ({"size": 5}, ValueError, "does not divide d_in = 24"),
        ({"size": 0}, ValueError, "size must be at least 1"),
        ({"blocks": [[0, 1], [1, 2]]}, ValueError, "overlap: column 1"),
        ({"blocks": [[0, 1], [2, 24]]}, ValueError, "columns from 0 to 23"),
        ({"blocks": [[-1, 1]]}, ValueError, "columns from 0 to 23"),
        ({"blocks": [0, 1]}, ValueError, r"must be \[n_blocks, size\]"),
        ({"blocks": [[0, 1]], "size": 4}, ValueError, "Leave size out"),
        ({"blocks": [[0.5]]}, TypeError, "numbers of columns"),
        ({"sparsity": 1.0}, ValueError, r"must lie in \[0, 1\)"),
        ({"sparsity": -0.1}, ValueError, r"must lie in \[0, 1\)"),
        ({"sparsity": 0.95, "size": 4}, ValueError, "nothing would be left"),
        ({"sparsity": None}, ValueError, "one of sparsity"),
        ({"count": 3}, ValueError, "one of sparsity"),
        ({"sparsity": None, "count": 24}, ValueError, "nothing would be left"),
        ({"sparsity": None, "count": -1}, ValueError, "got -1"),
        ({"sparsity": None, "count": 2.0}, TypeError, "count must be an integer"),
        ({"at_once": 0}, ValueError, "at_once must be at least 1"),
        ({"damping": -1.0}, ValueError, "damping must be"),
    ],
)
def test_what_does_not_fit(options, error, match):
    w, gram = single(*layer(D_OUT, D_IN))
    with pytest.raises(error, match=match):
        remove_channels(**({"w": w, "gram": gram, "sparsity": 0.5} | options))


def test_blocks_must_be_known():
    w, gram = single(*layer(D_OUT, D_IN))
    with pytest.raises(TypeError, match="known when the function is traced"):
        jax.jit(lambda *a: channel_errors(*a[:2], blocks=a[2]))(w, gram, np.arange(2))


@pytest.mark.parametrize(
    ("keep", "error", "match"),
    [
        (np.ones(24), TypeError, "keep holds bools"),
        (np.ones((8, 24), bool), ValueError, "see refit"),
        (np.zeros(24, bool), ValueError, "nothing would be left"),
    ],
)
def test_what_cannot_be_kept(keep, error, match):
    w, gram = single(*layer(D_OUT, D_IN))
    with pytest.raises(error, match=match):
        refit_channels(w, gram, keep)
    factor = js.curvature.factor_gram(gram, damping=0.1)
    with pytest.raises(ValueError, match="is a factor"):
        refit_channels(w, factor, np.arange(24) > 2, damping=0.1)
