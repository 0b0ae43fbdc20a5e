"""What every solver keeps, for every pattern, in every type, alone and many at once.

A new solver is a new row of `SOLVERS`.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js

D_OUT, D_IN, ROWS = 16, 24, 200
AXES = js.Axes(input=(1,), output=(0,))
WHOLE_INPUTS = js.Channel(axis=1)
PATTERNS = {
    "layer": js.Unstructured(),
    "output": js.Unstructured("output"),
    "nm": js.NM(2, 4),
}
TILES = js.Balanced((2, 4))
TILED = PATTERNS | {"balanced": TILES}
CHANNELS = {"channel": WHOLE_INPUTS}


class Layer(NamedTuple):
    """A kernel and what is known of its inputs: `[d, d]`, and gradients `[m, o, d]`."""

    w: Any
    gram: Any
    grads: Any


def layer(seed=0):
    rng = np.random.default_rng(seed)
    mix = np.eye(D_IN) + 0.5 * rng.standard_normal((D_IN, D_IN))
    x = rng.standard_normal((ROWS, D_IN)) @ mix
    signals = rng.standard_normal((32, D_OUT))
    arrays = (
        rng.standard_normal((D_OUT, D_IN)),
        x.T @ x / ROWS,
        signals[:, :, None] * x[:32, None],
    )
    return Layer(*(jnp.asarray(a, jnp.float32) for a in arrays))


def by_gram(solve, **options):
    """A solver of the layer-wise kind."""

    def solved(layer, sparsity, pattern):
        found = solve(layer.w, layer.gram, sparsity, pattern=pattern, **options)
        return found.w, found.mask, found.info.error

    return solved


def of_masks(solve, keep, **options):
    """One that is given which weights stay: those of the largest magnitudes."""

    def solved(layer, sparsity, pattern):
        (mask,) = js.patterns.masks(
            [jnp.abs(layer.w)], sparsity, pattern=pattern, axes=AXES, where="."
        )
        found = solve(layer.w, keep(mask), layer.gram, **options)
        return found.w, found.mask, found.info.error

    return solved


def removing(layer, sparsity, pattern):
    del pattern
    found = js.solvers.remove_channels(layer.w, layer.gram, sparsity)
    return found.w, found.mask, jnp.min(found.errors)


def by_fisher(layer, sparsity, pattern, **options):
    fisher = js.curvature.block_fisher(
        {"w": layer.grads}, block_size=8, damping=1e-2, axes=AXES, pattern=pattern
    )
    params, masks = js.solvers.obs(
        {"w": layer.w}, fisher, sparsity, pattern=pattern, axes=AXES, **options
    )
    return params["w"], masks["w"], jnp.zeros(())


s = js.solvers
SOLVERS = {
    "sparsegpt": (by_gram(s.sparsegpt, block_size=8), TILED),
    "exact_obs": (by_gram(s.exact_obs), PATTERNS),
    "admm": (by_gram(s.admm, iterations=5, mask_iterations=3), TILED),
    "alps": (by_gram(s.alps, iterations=20), TILED),
    "wanda": (by_gram(s.wanda), TILED),
    "magnitude": (by_gram(s.magnitude), TILED),
    "refit": (of_masks(s.refit, lambda mask: mask, rel_damping=1e-2), PATTERNS),
    "refit, iterated": (of_masks(s.refit, lambda mask: mask, iterations=5), PATTERNS),
    "refit_channels": (
        of_masks(
            lambda w, keep, gram: s.refit_channels(w, gram, keep),
            lambda mask: mask.reshape(-1),
        ),
        CHANNELS,
    ),
    "remove_channels": (removing, CHANNELS),
    "obs": (by_fisher, TILED),
    "obs, greedy": (functools.partial(by_fisher, greedy=True), PATTERNS),
}

every_solver = pytest.mark.parametrize("name", SOLVERS)
# Each with the first pattern, which other tests take too, with one of the others, and
# with tiles.
every_pair = pytest.mark.parametrize(
    ("name", "pattern"),
    [
        pytest.param(name, pattern, marks=[] if few else pytest.mark.exhaustive)
        for i, (name, (_, patterns)) in enumerate(SOLVERS.items())
        for j, pattern in enumerate(patterns)
        for few in [j in {0, 1 + i % 2} or pattern == "balanced"]
    ],
)


@functools.cache
def jitted(name, pattern):
    solve, patterns = SOLVERS[name]
    return jax.jit(functools.partial(solve, pattern=patterns[pattern]))


def first_pattern(name):
    return next(iter(SOLVERS[name][1]))


def assert_pruned(w, mask, before, sparsity, pattern):
    """The exact count where weights compete, exact zeros, numbers, the same type."""
    assert (w.dtype, w.shape) == (before.dtype, before.shape)
    assert (mask.dtype, mask.shape) == (jnp.bool_, before.shape)
    masks, params = {"w": mask}, {"w": w}
    js.patterns.verify(masks, params, pattern=pattern, axes=AXES, where=".")
    groups = {
        js.Unstructured(): (1, -1),
        js.Unstructured("output"): (D_OUT, -1),
        js.NM(2, 4): (-1, 4),
        WHOLE_INPUTS: (D_OUT, D_IN),
    }
    removed = ~np.asarray(mask)
    if pattern == TILES:  # a weight stands for its tile
        removed = removed[::4, ::2]
        groups[TILES] = removed.shape
    removed = removed.reshape(groups[pattern])
    count = js.patterns.removed_count(sparsity, removed.shape[1])
    np.testing.assert_array_equal(removed.sum(1), count)
    assert not np.asarray(w)[~np.asarray(mask)].any()
    assert jnp.isfinite(w).all()


SPARSITY = 0.375


def sparsity_for(pattern):
    """Traced, where the pattern does not say it; of one type, for one compilation."""
    return 0.5 if pattern == "nm" else jnp.float32(SPARSITY)


@every_pair
def test_counts_are_exact_and_another_sparsity_compiles_nothing(name, pattern):
    solve, sparsity = jitted(name, pattern), sparsity_for(pattern)
    w, mask, _ = solve(layer(), sparsity)
    shape = SOLVERS[name][1][pattern]
    assert_pruned(w, mask, layer().w, float(sparsity), shape)
    programs = solve._cache_size()  # of other tests too
    if pattern != "nm":
        w, mask, _ = solve(layer(1), jnp.float32(0.75))
        assert_pruned(w, mask, layer().w, 0.75, shape)
    assert solve._cache_size() == programs


@pytest.mark.parametrize("name", [n for n in SOLVERS if not n.startswith("obs")])
def test_many_layers_at_once_are_as_each_alone(name):
    """`obs` takes a tree of them; float64 in it is a matter of JAX's context."""
    pattern = first_pattern(name)
    solve, patterns = SOLVERS[name]
    layers, sparsity = [layer(seed) for seed in range(2)], sparsity_for(pattern)
    solve_many = jax.vmap(
        functools.partial(solve, pattern=patterns[pattern]), (0, None)
    )
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    w, mask, error = jax.jit(solve_many)(stacked, sparsity)
    for i, each in enumerate(layers):
        alone, own_mask, own_error = jitted(name, pattern)(each, sparsity)
        np.testing.assert_array_equal(mask[i], own_mask)
        np.testing.assert_allclose(w[i], alone, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(error[i], own_error, rtol=1e-4)


@every_solver
def test_sixteen_bit_weights_stay_so_and_are_computed_with_in_float32(name):
    pattern = first_pattern(name)
    half = layer()._replace(w=layer().w.astype(jnp.bfloat16))
    wide = half._replace(w=half.w.astype(jnp.float32))
    solve, sparsity = jitted(name, pattern), sparsity_for(pattern)
    got, mask, _ = solve(half, sparsity)
    assert_pruned(got, mask, half.w, SPARSITY, SOLVERS[name][1][pattern])
    want, own_mask, _ = solve(wide, sparsity)
    np.testing.assert_array_equal(mask, own_mask)
    # One rounding, to eight bits.
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-4)


@every_solver
def test_eager_calls_are_jitted_calls(name):
    pattern = first_pattern(name)
    solve, patterns = SOLVERS[name]
    got, mask, error = solve(layer(), SPARSITY, patterns[pattern])
    want, own_mask, own_error = jitted(name, pattern)(layer(), sparsity_for(pattern))
    np.testing.assert_array_equal(mask, own_mask)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(error, own_error, rtol=1e-4)


# By default each solver is on one kind of mesh. Shardings that are a part of types
# matter where loops carry what is sharded; the other solvers' loops are the same.
LOOPS = ("sparsegpt", "exact_obs", "remove_channels", "refit", "obs")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if few else pytest.mark.exhaustive)
        for name in SOLVERS
        for kind in (AxisType.Auto, AxisType.Explicit)
        for few in [(kind == AxisType.Explicit) == (name in LOOPS)]
    ],
    ids=str,
)
def test_rows_on_many_devices_are_solved_where_they_lie(name, kind):
    pattern = first_pattern(name)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    by_rows = NamedSharding(mesh, P(None, "x"))
    spread = jax.device_put(layer(), Layer(rows, whole, by_rows))
    solve, sparsity = jitted(name, pattern), sparsity_for(pattern)
    compiled = solve.lower(spread, sparsity).compile()
    (w, mask, error), (want, own_mask, own_error) = (
        compiled(spread, sparsity),
        solve(layer(), sparsity),
    )
    assert w.sharding.is_equivalent_to(rows, 2)
    assert mask.sharding.is_equivalent_to(rows, 2)
    np.testing.assert_array_equal(mask, own_mask)
    np.testing.assert_allclose(w, want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(error, own_error, rtol=1e-4)
    exchanges = r"all-gather|all-to-all|collective-permute"
    assert not re.findall(exchanges, compiled.as_text() or "")


def test_every_public_solver_has_a_row():
    functions = {k for k, f in vars(js.solvers).items() if callable(f) and k.islower()}
    others = {"channel_errors"}  # the errors alone
    assert functions - others == {name.split(",")[0] for name in SOLVERS}
