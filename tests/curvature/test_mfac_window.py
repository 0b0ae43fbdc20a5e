"""The sliding window: against dense inverses, at its limits, in place and sharded."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from curvature.conftest import compilations as compilations
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse.curvature import _mfac_window as mfac
from jaxsparse.linalg import sliding

init = jax.jit(mfac.window_init, static_argnames=("window", "dtype"))
update_ihvp = jax.jit(mfac.window_update_ihvp)
ihvp = jax.jit(mfac.window_ihvp)
mask = jax.jit(mfac.window_mask)


def zeros(dtype=np.float32, **shapes):
    return {k: np.zeros(shape, dtype) for k, shape in shapes.items()}


def like(params, rng):
    draw = lambda w: jax.device_put(rng.standard_normal(w.shape).astype(w.dtype))
    return jax.tree.map(draw, params)


def flat(tree, lead=0):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(*x.shape[:lead], -1) for x in leaves], -1)


def fisher(rows, damping):
    return damping * np.eye(rows.shape[1]) + rows.T @ rows / len(rows)


def by_age(state):
    return np.roll(flat(state.grads, 1), -int(state.oldest), 0)


def far(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def factor_error(state):
    rows = by_age(state)
    system = rows @ rows.T + np.diag(np.asarray(state.factor.added, np.float64))
    upper = np.asarray(state.factor.upper, np.float64)
    return far(upper.T @ upper, system)


@functools.partial(jax.jit, static_argnames="m")
def scan(grads, damping, m: int):
    def step(state, g):
        state, product = mfac.window_update_ihvp(state, {"w": g})
        return state, product["w"]

    start = mfac.window_init({"w": grads[0]}, window=m, damping=damping)
    return jax.lax.scan(step, start, grads)


def feed(grads, m: int, damping: float):
    """The window after many gradients of one leaf, and all products."""
    state, products = scan(np.asarray(grads, np.float32), np.float32(damping), m=m)
    return state, np.asarray(products, np.float64)


# What it says.

WIDE = zeros(np.float64, w=(3, 4), b=(5,), scale=())


@pytest.mark.usefixtures("x64")
def test_products_are_those_of_a_dense_inverse_while_it_fills_and_after():
    m, damping = 4, 1e-3
    rng = np.random.default_rng(0)
    params = WIDE | {"none": None, "masked": optax.MaskedNode()}
    state = mfac.window_init(params, window=m, damping=damping)
    rows = np.zeros((m, 18))
    for step in range(2 * m + 1):
        g, x = like(params, rng), like(params, rng)
        rows[step % m] = flat(g)
        state, product = update_ihvp(state, g)
        assert jax.tree.structure(product) == jax.tree.structure(params)
        dense = fisher(rows, damping)
        assert far(flat(product), np.linalg.solve(dense, flat(g))) < 1e-9
        assert far(flat(ihvp(state, x)), np.linalg.solve(dense, flat(x))) < 1e-9
        product = ihvp(state, x, damping=0.1)
        dense = fisher(rows, 0.1)
        assert far(flat(product), np.linalg.solve(dense, flat(x))) < 1e-9
    np.testing.assert_allclose(state.gram, rows @ rows.T, rtol=1e-12)
    assert factor_error(state) < 1e-14
    alone = mfac.window_update(state, g)
    again, _ = update_ihvp(state, g)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("x64")
def test_a_window_of_one_gradient():
    g = {"w": np.array([3.0, 4.0])}
    state = init(g, window=1, damping=1.0)
    for _ in range(2):
        state, product = update_ihvp(state, g)
        np.testing.assert_allclose(product["w"], np.array([3, 4]) / 26, rtol=1e-12)


def gradients(kind, n, d):
    rng = np.random.default_rng(1)
    found = rng.standard_normal((n, d))
    if kind == "decaying":
        found *= np.logspace(0, -3, d)
    if kind == "related":
        found += rng.standard_normal(d)
    return found.astype(np.float32)


@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("kind", ["wide", "decaying", "related"])
def test_products_in_the_window_have_all_digits_in_float32(kind, ratio):
    """Whatever the damping; `ratio` is that of the spectrum to it."""
    m, d = 32, 1000
    grads = gradients(kind, 2 * m + 5, d)
    damping = float(np.float32(np.mean(np.sum(grads**2, 1)) / m / ratio))
    state, products = feed(grads, m, damping)
    rows = by_age(state)
    # F^-1 g by the eigenvalues of G^T G, which float64 has digits enough for.
    _, s, right = np.linalg.svd(rows, full_matrices=False)
    expected = (right @ rows[-1]) / (damping + s**2 / m) @ right
    assert far(products[-1], expected) < 1e-6
    assert factor_error(state) < 1e-6
    if ratio == 1e7:  # what the usual formula makes of it
        naive = ihvp(state, {"w": grads[-1]})["w"]
        assert far(np.asarray(naive, np.float64), expected) > 1e-3


@pytest.mark.parametrize(
    ("m", "d"),
    [
        (192, 1000),
        # Long enough that without a new factor every 64 rows it would drift too far:
        # 14 s. That it is made anew the next test looks at.
        pytest.param(512, 2000, marks=pytest.mark.exhaustive),
    ],
)
def test_the_factor_of_a_long_window_does_not_drift(m, d):
    grads = gradients("wide", 2 * m - 30, d)
    state, products = feed(grads, m, 1e-6)
    assert factor_error(state) < 1e-6
    rows = by_age(state)
    # For a small damping G^T (G G^T)^-1 e_g is all that is left.
    system = rows @ rows.T + m * 1e-6 * np.eye(m)
    expected = m * np.linalg.solve(system, np.eye(m)[-1]) @ rows
    assert far(products[-1], expected) < 1e-6


def test_every_64_rows_the_factor_is_made_anew():
    """What was wrong with it is then gone, and stays in every other step."""
    m = 130
    rows = gradients("wide", m, 200).astype(np.float64)
    system = rows @ rows.T
    shift = np.float32(1e-3)
    step = jax.jit(sliding.next_factor)
    for oldest in (0, 1, 63, 64, 65, 127, 128):
        before = np.roll(system, 1 - oldest, (0, 1)) + shift * np.eye(m)
        upper = 1.01 * np.linalg.cholesky(before).T
        wrong = sliding.Factor(upper.astype(np.float32), np.full(m, shift))
        factor = step(wrong, system.astype(np.float32), np.int32(oldest), shift)
        upper = np.asarray(factor.upper, np.float64)
        expected = np.roll(system, -oldest, (0, 1)) + shift * np.eye(m)
        error = far(upper.T @ upper, expected)
        assert error < 1e-6 if oldest % 64 == 0 else error > 1e-3


def test_cholesky_in_each_step_gives_the_same_factor_as_sliding():
    """On accelerators; also where rounding lets Cholesky's method fail."""
    m, d = 6, 40
    wide = gradients("wide", 3 * m, d)
    twins = np.repeat(wide[:2], 2 * m, 0)
    slide, exchange = jax.jit(sliding._slide), jax.jit(sliding._exchange)
    for grads, singular in ((wide, False), (100 * twins, True)):
        shift = np.float32(1e-6)
        slid = exchanged = sliding.empty_factor(m, shift)
        rows = np.zeros((m, d), np.float32)
        for t, g in enumerate(grads):
            rows[t % m] = g
            system = (rows @ rows.T, np.int32((t + 1) % m), shift)
            slid = slide(slid, *system)
            exchanged = exchange(exchanged, *system)
            size = np.max(np.abs(slid.upper))
            near = 1e-2 if singular else 1e-5
            np.testing.assert_allclose(
                np.abs(slid.upper), np.abs(exchanged.upper), atol=near * size
            )
        assert np.any(np.asarray(slid.added) > shift) == singular


# What it must not do.

HARD = {
    "zeros": lambda g: 0 * g,
    "twins": lambda g: np.broadcast_to(g[:1], g.shape),
    "huge": lambda g: 1e15 * g,
    "tiny": lambda g: 1e-25 * g,
    "near_twins": lambda g: g[:1] + 1e-6 * g,
    "more_than_weights": lambda g: np.pad(g[:, :3], ((0, 0), (0, 17))),
    "from_huge_to_tiny": lambda g: g * np.logspace(14, -14, len(g))[:, None],
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("damping", [1e-2, 1e-7, 1e-30])
def test_nothing_makes_a_nan_or_a_product_that_is_too_large(kind, damping):
    m, d = 16, 20
    base = np.random.default_rng(2).standard_normal((3 * m, d))
    state, products = feed(HARD[kind](base), m, damping)
    assert np.all(np.isfinite(products))
    for x in jax.tree.leaves(state):
        assert np.all(np.isfinite(x))
    upper = np.asarray(state.factor.upper)
    assert np.all(np.diag(upper) > 0)
    np.testing.assert_array_equal(upper, np.triu(upper))
    # max of m |g| / (m damping + |g|^2)
    assert np.max(np.linalg.norm(products, axis=1)) <= 1.01 * np.sqrt(m / damping) / 2


def test_a_repeated_gradient_gets_a_step_of_the_right_size():
    """No digit of it can be right: all of it is explained up to rounding."""
    m, d, damping = 16, 20, 1e-7
    g = 150 * np.random.default_rng(3).standard_normal(d)
    grads = np.asarray(np.broadcast_to(g, (3 * m, d)), np.float32)
    _, products = feed(grads, m, damping)
    expected = grads[-1] / (damping + np.sum(grads[-1].astype(np.float64) ** 2))
    size = np.linalg.norm(products[-1]) / np.linalg.norm(expected)
    assert 0.1 < size < 10


def test_many_more_gradients_than_weights_and_next_to_no_damping():
    """S is singular but for rounding; rounding must not grow from row to row."""
    m, d = 96, 20
    grads = gradients("decaying", 2 * m + 5, d)
    damping = float(np.float32(np.mean(np.sum(grads**2, 1)) / d / 1e9))
    state, products = feed(grads, m, damping)
    assert np.all(np.isfinite(products))
    assert factor_error(state) < 1e-5
    expected = np.linalg.solve(fisher(by_age(state), damping), grads[-1])
    size = np.linalg.norm(products[-1]) / np.linalg.norm(expected)
    assert 0.1 < size < 10


SMALL = zeros(w=(3, 4), b=(5,))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e19])
def test_a_gradient_that_is_not_finite_is_not_entered(bad):
    rng = np.random.default_rng(4)
    state = init(SMALL, window=3, damping=1e-2)
    for _ in range(4):
        state, _ = update_ihvp(state, like(SMALL, rng))
    g = jax.tree.map(np.array, like(SMALL, rng))
    g["w"][1, 2] = bad
    after, product = update_ihvp(state, g)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    if np.isfinite(bad):  # its squared norm alone overflows
        np.testing.assert_array_equal(flat(product), 0)
    else:
        np.testing.assert_array_equal(np.isnan(flat(product)), ~np.isfinite(flat(g)))


# What else it can do.


def test_a_tree_without_parameters_is_no_error():
    """What `optax.partition` shows to a group that no parameter is in."""
    state = init({"w": optax.MaskedNode()}, window=2, damping=1e-3)
    for _ in range(3):
        state, product = update_ihvp(state, {"w": optax.MaskedNode()})
    assert product == {"w": optax.MaskedNode()}
    assert not np.any(np.asarray(state.gram))


@pytest.mark.usefixtures("x64")
def test_another_damping_takes_effect_at_once():
    rng = np.random.default_rng(5)
    params = WIDE | {"none": None, "masked": optax.MaskedNode()}
    state = init(params, window=4, damping=1e-2)
    for _ in range(5):
        state, _ = update_ihvp(state, like(params, rng))
    for g in (like(params, rng), like(params, rng)):
        state, product = update_ihvp(state, g, damping=0.3)
        expected = np.linalg.solve(fisher(by_age(state), 0.3), flat(g))
        assert far(flat(product), expected) < 1e-9
    assert float(state.damping) == 0.3


@pytest.mark.usefixtures("x64")
def test_masked_coordinates_leave_the_whole_window():
    rng = np.random.default_rng(6)
    params = zeros(np.float64, w=(4, 6), b=(5,))
    masks = {"w": rng.random((4, 6)) < 0.5, "b": np.ones((), bool)}
    m = 19  # more than the Gram matrix is made of at once, and no multiple of it
    state = other = init(params, window=m, damping=1e-2)
    for _ in range(m + 3):
        g = like(params, rng)
        state = mfac.window_update(state, g)
        masked = g | {"w": np.where(masks["w"], g["w"], 0)}
        other = mfac.window_update(other, masked)
    state = mfac.window_mask(state, masks)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert np.any(np.asarray(state.grads["b"])[:, 0] != 0)


def test_gradients_kept_in_16_bits_are_summed_in_32():
    rng = np.random.default_rng(7)
    params = zeros(w=(20, 30)) | zeros(jnp.bfloat16, b=(7,))
    m, damping = 10, 1e-2
    state = init(params, window=m, damping=damping, dtype=jnp.bfloat16)
    rows = np.zeros((m, 607))
    for step in range(m + 3):
        g = like(params, rng)
        state, product = update_ihvp(state, g)
        kept = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), g)
        rows[step % m] = flat(kept)
    assert {x.dtype for x in jax.tree.leaves(state.grads)} == {jnp.dtype("bfloat16")}
    assert product["w"].dtype == jnp.float32
    assert product["b"].dtype == jnp.bfloat16
    expected = np.linalg.solve(fisher(rows, damping), flat(kept))
    assert far(flat(product)[7:], expected[7:]) < 1e-6
    masks = {"w": rng.random((20, 30)) < 0.5, "b": np.ones((), bool)}
    state = mask(state, masks)
    rows = flat(state.grads, 1)
    assert far(np.asarray(state.gram), rows @ rows.T) < 1e-6


def test_a_restored_window_goes_on_bit_for_bit():
    rng = np.random.default_rng(8)
    state = init(SMALL, window=3, damping=1e-2)
    for _ in range(4):
        state, _ = update_ihvp(state, like(SMALL, rng))
    leaves, treedef = jax.tree.flatten(state)
    assert all(isinstance(x, jax.Array) for x in leaves)
    restored = jax.tree.unflatten(treedef, [np.array(x) for x in leaves])
    g = like(SMALL, rng)
    _, a = update_ihvp(state, g)
    _, b = update_ihvp(restored, g)
    np.testing.assert_array_equal(a["w"], b["w"])


def test_an_abstract_window_has_the_shapes_of_a_real_one(compilations):
    params = zeros(w=(3, 5))
    make = lambda p: mfac.window_init(p, window=3, damping=1e-2)
    state, abstract = make(params), jax.eval_shape(make, params)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    with compilations() as seen:
        for _ in range(3):
            state, _ = update_ihvp(state, params)
    assert seen.of("window_update_ihvp") == 1


# In place, and on many devices.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_donated_window_is_written_in_place(dtype):
    params = zeros(w=(300, 160), b=(160,))
    make = functools.partial(mfac.window_init, window=96, damping=1e-2, dtype=dtype)
    state = jax.eval_shape(make, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.grads))
    masks = zeros(bool, w=(300, 160), b=())
    for f, x, most in (
        (mfac.window_update_ihvp, params, 0.1),
        (mfac.window_mask, masks, 1.01 if dtype == jnp.bfloat16 else 0.4),
    ):
        compiled = jax.jit(f, donate_argnums=0).lower(state, x).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= size
        assert memory.temp_size_in_bytes < most * size


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharded_window_lies_with_its_parameters_and_is_never_gathered(kind):
    m, rng = 5, np.random.default_rng(9)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    specs = {"w": P(None, "x"), "v": P("x", None), "b": P()}
    params = zeros(w=(6, 32), v=(16, 3), b=(3,))
    shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    alone = init(params, window=m, damping=1e-2)
    state = mfac.window_init(jax.device_put(params, shardings), window=m, damping=1e-2)
    for k, spec in specs.items():
        expected = NamedSharding(mesh, P(None, *spec))
        assert state.grads[k].sharding.is_equivalent_to(expected, 1 + params[k].ndim)
    g = like(params, rng)
    masks = {k: rng.random(w.shape) < 0.5 for k, w in params.items()}
    spread = lambda tree: jax.device_put(tree, shardings)
    steps = [update_ihvp.lower(state, spread(g)).compile()]
    steps.append(ihvp.lower(state, spread(g)).compile())
    steps.append(mask.lower(state, spread(masks)).compile())
    for compiled in steps:
        text = compiled.as_text()
        assert "all-reduce" in text
        assert not re.search("all-gather|all-to-all|collective-permute", text)
    for _ in range(m + 2):
        g = like(params, rng)
        alone, expected = update_ihvp(alone, g)
        state, product = steps[0](state, spread(g))
        assert far(flat(product), flat(expected)) < 1e-6
    for k in specs:
        assert product[k].sharding.is_equivalent_to(shardings[k], params[k].ndim)
    x = like(params, rng)
    assert far(flat(steps[1](state, spread(x))), flat(ihvp(alone, x))) < 1e-6
    state, alone = steps[2](state, spread(masks)), mask(alone, masks)
    assert far(np.asarray(state.factor.upper), np.asarray(alone.factor.upper)) < 1e-6


# What callers may get wrong.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": 2.5}, TypeError, "window must be an integer"),
        ({"damping": 0.0}, ValueError, "damping must be positive"),
        ({"damping": -1.0}, ValueError, "damping must be positive"),
        ({"damping": float("nan")}, ValueError, "damping must be positive"),
        ({"dtype": jnp.int32}, TypeError, "floating-point type"),
    ],
)
def test_windows_that_cannot_be_made(options, error, message):
    options = {"window": 2, "damping": 1e-3} | options
    with pytest.raises(error, match=message):
        mfac.window_init(zeros(w=(3,)), **options)


def test_parameters_that_have_no_gradients():
    with pytest.raises(TypeError, match="steps: a window holds gradients of real"):
        mfac.window_init(zeros(int, steps=(3,)), window=2, damping=1e-3)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        (zeros(v=(3,)), "missing 'w'; not in the window's parameters 'v'"),
        (zeros(w=(4,)), r"w: grads has the shape \(4,\), the window's param"),
    ],
)
def test_gradients_of_another_model(grads, message):
    state = mfac.window_init(zeros(w=(3,)), window=2, damping=1e-3)
    with pytest.raises(ValueError, match=message):
        mfac.window_update(state, grads)
    with pytest.raises(ValueError, match=message):
        mfac.window_update_ihvp(state, grads)
    with pytest.raises(ValueError, match=message.replace("grads", "tree")):
        mfac.window_ihvp(state, grads)


def test_a_damping_that_is_not_positive_in_a_product():
    state = mfac.window_init(zeros(w=(3,)), window=2, damping=1e-3)
    with pytest.raises(ValueError, match="damping must be positive"):
        mfac.window_ihvp(state, zeros(w=(3,)), damping=0.0)
