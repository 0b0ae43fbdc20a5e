"""Gradients from losses alone against `jax.grad` and dense formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse import zeroth_order
from jaxsparse.zeroth_order._tails import evaluate, tail

SHAPES = {"a": (5, 7), "b": (7, 6), "bias": (6,), "c": (6, 3)}


def draw(seed, shape, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def parameters(dtype=np.float64):
    return {k: jnp.asarray(draw(0, s, dtype) / 2) for k, s in SHAPES.items()}


def loss_fn(params, batch):
    x, y = batch

    @jax.jit  # a call, with one within
    def layer(x, w):
        return jax.nn.silu(x @ w)

    x = layer(layer(x, params["a"]), params["b"]) + params["bias"][None]
    return jnp.mean((x @ params["c"] - y) ** 2)


def batch(dtype=np.float64):
    return jnp.asarray(draw(1, (4, 5), dtype)), jnp.asarray(draw(2, (4, 3), dtype))


@functools.cache
def in_float64():
    """The estimates at three steps, the gradient, and half the Hessian's diagonal."""
    with jax.enable_x64(True):
        params, data = parameters(), batch()
        found = {}
        for mu in (1e-2, 1e-4):
            made = functools.partial(zeroth_order.coordinate_grads, loss_fn, mu=mu)
            found[mu] = jax.jit(made)(params, data)
        grads = jax.grad(loss_fn)(params, data)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        hessian = jax.hessian(lambda w: loss_fn(unravel(w), data))(flat)
        half = unravel(jnp.diag(hessian) / 2)
        return jax.device_get((found, grads, half))


def test_a_coordinate_is_off_by_its_curvature():
    found, grads, half = in_float64()
    for mu, made in found.items():
        for k in SHAPES:
            np.testing.assert_allclose(
                made[k], grads[k] + mu * half[k], atol=20 * mu**2, rtol=0
            )
    # So the error is a hundredth at a hundredth of the step.
    worst = lambda mu: max(np.abs(found[mu][k] - grads[k]).max() for k in SHAPES)
    assert 80 < worst(1e-2) / worst(1e-4) < 120


def test_only_listed_coordinates_have_a_gradient():
    masks = {k: jnp.asarray(draw(3, s) > 0) for k, s in SHAPES.items() if k != "c"}
    masks["c"] = jnp.zeros((6, 3), bool)
    params = parameters(np.float32)
    indices = js.patterns.indices(masks, params)
    assert indices["c"].size == 0

    @jax.jit
    def estimate(params, data, indices):
        return zeroth_order.coordinate_grads(
            loss_fn, params, data, indices=indices, mu=2**-6, chunk=4
        )

    got = estimate(params, batch(np.float32), indices)
    grads = jax.grad(loss_fn)(params, batch(np.float32))
    for k, mask in masks.items():
        assert np.all(np.asarray(got[k])[~np.asarray(mask)] == 0)
        here = np.asarray(mask)
        # A difference is off by half of mu = 2^-6 times the curvature.
        np.testing.assert_allclose(got[k][here], grads[k][here], atol=0.02)
    # Another draw of as many weights compiles nothing.
    other = {
        k: np.sort(np.random.default_rng(4).permutation(parameters()[k].size)[: len(v)])
        for k, v in indices.items()
    }
    estimate(params, batch(np.float32), other)
    assert estimate._cache_size() == 1


def test_what_comes_before_a_layer_is_not_computed_again():
    params, data = parameters(np.float32), batch(np.float32)
    at = evaluate(loss_fn, params, data)
    products = {}
    for i, (k, w) in enumerate(params.items()):
        jaxpr = jax.make_jaxpr(tail(at, i))(w)
        products[k] = sum(e.primitive.name == "dot_general" for e in jaxpr.jaxpr.eqns)
        np.testing.assert_array_equal(tail(at, i)(w), at.loss)
    assert products == {"a": 3, "b": 2, "bias": 1, "c": 1}


def test_a_loss_that_ignores_a_parameter_and_one_in_a_scan():
    params = {"stack": jnp.ones((3, 2, 2)), "unused": jnp.ones(2)}

    def of_scan(params, x):
        return jnp.sum(
            jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]
        )

    x = jnp.array([[0.1, -0.2]])
    got = zeroth_order.coordinate_grads(of_scan, params, x, mu=2**-8)
    expected = jax.grad(of_scan)(params, x)
    np.testing.assert_allclose(got["stack"], expected["stack"], atol=5e-3)
    assert np.all(got["unused"] == 0)


def test_a_loss_without_a_derivative():
    def steps(params, x):
        return jnp.sum(jnp.round(params["w"] * 8) / 8 * x)

    x = jnp.array([2.0, -3.0])
    params = {"w": jnp.array([0.5, 0.25])}
    got = zeroth_order.coordinate_grads(steps, params, x, mu=0.125)
    np.testing.assert_array_equal(got["w"], x)


def test_sixteen_bits_do_not_swallow_the_step():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), parameters(np.float32))
    data = jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch(np.float32))
    got = zeroth_order.coordinate_grads(loss_fn, params, data, mu=2**-7)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    grads = jax.grad(loss_fn)(wide(params), wide(data))
    for k in SHAPES:
        assert got[k].dtype == jnp.bfloat16
        # Off by mu times the curvature, and by the rounding of bfloat16, 2^-9.
        np.testing.assert_allclose(np.float32(got[k]), grads[k], atol=0.03)


# Random directions


def directions(params, key, count, masks=None):
    """Those that are drawn, as rows, in the order of the flat parameters."""
    rows = []
    for k in jax.random.split(key, count):
        keys = js.tree.keys_like(k, params)
        u = {n: jax.random.normal(keys[n], w.shape, w.dtype) for n, w in params.items()}
        row = np.concatenate([
            np.where(True if masks is None else masks[n], u[n], 0).ravel() for n in u
        ])
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


def flat_of(tree):
    return np.concatenate([np.ravel(tree[k]) for k in SHAPES])


@functools.cache
def quadratic():
    """`w' A w / 2` over all parameters, and `A`, in float64."""
    size = sum(map(np.prod, SHAPES.values()))
    a = draw(5, (size, size)) / 5
    a = a + a.T

    def loss(params, a):
        w = jnp.concatenate([params[k].reshape(-1) for k in SHAPES])
        return w @ a @ w / 2

    return loss, a


@pytest.mark.parametrize("masked", [False, True])
def test_random_estimates_are_the_formula(masked):
    loss, a = quadratic()
    masks = {k: draw(6, s) > 0 for k, s in SHAPES.items()} if masked else None
    with jax.enable_x64(True):
        params, key, mu, count = parameters(), jax.random.key(3), 1e-2, 5
        got = jax.jit(
            lambda p, a: zeroth_order.random_grads(
                loss, p, a, key=key, count=count, mu=mu, chunk=2, masks=masks
            )
        )(params, jnp.asarray(a))
        u = directions(params, key, 6, masks)[:count]  # the last turn draws one more
    w = flat_of(params)
    size = flat_of(masks).sum() if masked else len(w)
    slopes = u @ (a @ w) + mu / 2 * np.einsum("id,de,ie->i", u, a, u)
    expected = size / count * slopes @ u
    np.testing.assert_allclose(flat_of(got), expected, rtol=1e-8, atol=1e-9)
    if masked:
        assert np.all(flat_of(got)[~flat_of(masks)] == 0)


def test_random_estimates_are_unbiased():
    _, a = quadratic()
    params = parameters(np.float32)
    x = jnp.float32(draw(7, (len(a),)))
    linear = lambda p, x: jnp.concatenate([p[k].reshape(-1) for k in SHAPES]) @ x
    got = jax.jit(
        lambda p, x: zeroth_order.random_grads(
            linear, p, x, key=jax.random.key(0), count=20_000, mu=1.0, chunk=100
        )
    )(params, x)
    off = np.linalg.norm(flat_of(got) - x) / np.linalg.norm(x)
    expected = np.sqrt(len(a) / 20_000)  # 0.078
    assert 0.7 * expected < off < 1.3 * expected


def test_zo_grasp_is_the_formula():
    loss, a = quadratic()
    with jax.enable_x64(True):
        params, key, mu, count = parameters(), jax.random.key(4), 1e-1, 6
        options = {"key": key, "count": count, "mu": mu, "chunk": 3}
        got = jax.jit(lambda p, a: zeroth_order.grasp(loss, p, a, **options))(
            params, jnp.asarray(a)
        )
        u = directions(params, key, count)
    w = flat_of(params)
    project = len(w) / count * u.T @ u
    g0 = project @ (a @ w) + len(w) / count * mu / 2 * u.T @ np.einsum(
        "id,de,ie->i", u, a, u
    )
    # The curvature's part is the same at both points of a quadratic, and cancels out.
    expected = w * (project @ (a @ g0))
    np.testing.assert_allclose(flat_of(got), expected, rtol=1e-6, atol=1e-6)


def test_zo_grasp_orders_layers_as_grasp_does():
    """The sparsities of layers of one scale apart, from many directions."""
    params = {
        k: w * s
        for (k, w), s in zip(
            parameters(np.float32).items(), (1, 3, 1, 0.3), strict=True
        )
    }
    data = batch(np.float32)
    exact = js.scores.grasp(loss_fn, params, data)
    got = jax.jit(
        lambda p, d: zeroth_order.grasp(
            loss_fn, p, d, key=jax.random.key(0), count=1500, mu=0.05, chunk=50
        )
    )(params, data)
    correlation = np.corrcoef(flat_of(exact), flat_of(got))[0, 1]
    assert correlation > 0.8  # 0.86 to 0.92 with other keys
    sparsities = js.allocations.from_global_scores(got, 0.5)
    assert sparsities["bias"] == 0.0
    assert len({sparsities[k] for k in "abc"}) == 3


def test_a_gradient_of_zero_scores_zero():
    loss = lambda params, x: jnp.sum(params["w"] * 0 * x)
    params = {"w": jnp.ones(3)}
    got = zeroth_order.grasp(loss, params, jnp.ones(3), key=jax.random.key(0), count=2)
    assert np.all(got["w"] == 0)


def test_deepzero_trains_with_the_gradients_of_a_random_part():
    """A part drawn anew in each interval, at the densities that were found once."""
    params, data = parameters(np.float32), batch(np.float32)
    key = jax.random.key(1)
    scores = zeroth_order.grasp(loss_fn, params, data, key=key, count=48, mu=0.05)
    sparsities = js.allocations.from_global_scores(jax.tree.map(jnp.abs, scores), 0.6)

    @jax.jit
    def step(params, data, indices):
        grads = zeroth_order.coordinate_grads(loss_fn, params, data, indices=indices)
        return jax.tree.map(lambda w, g: w - 0.3 * g, params, grads)

    before = loss_fn(params, data)
    seen = set()
    for interval in range(4):
        draws = js.scores.random(params, key=jax.random.fold_in(key, interval))
        indices = js.patterns.indices(js.patterns.masks(draws, sparsities), params)
        seen.add(tuple(indices["a"].tolist()))
        for _ in range(5):
            params = step(params, data, indices)
    assert len(seen) == 4
    assert step._cache_size() == 1
    assert loss_fn(params, data) < 0.5 * before


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_gradients_lie_as_parameters_do(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    put = lambda w: jax.device_put(
        w, NamedSharding(mesh, P(*[None] * (w.ndim - 1), "x"))
    )
    plain = {"a": jnp.asarray(draw(0, (4, 8), np.float32))}
    params = jax.tree.map(put, plain)
    x = jnp.asarray(draw(1, (2, 4), np.float32))
    loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["a"]) ** 2)
    coordinates = functools.partial(zeroth_order.coordinate_grads, loss, mu=2**-6)
    along = functools.partial(
        zeroth_order.random_grads, loss, key=jax.random.key(0), count=3
    )
    for estimate in (coordinates, along):
        one = jax.jit(estimate)(plain, x)["a"]
        with jax.set_mesh(mesh):
            many = jax.jit(estimate)(params, x)["a"]
        assert many.sharding.is_equivalent_to(params["a"].sharding, 2)
        np.testing.assert_allclose(many, one, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mu": 0.0}, ValueError, "mu must be positive"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"loss_fn": lambda p, x: p["w"]}, ValueError, "one scalar"),
        ({"loss_fn": lambda p, x: p["v"]}, KeyError, "v"),
        ({"params": {"w": jnp.arange(3)}}, TypeError, "w: params must be floating"),
        (
            {"indices": {"w": jnp.array([0, 3])}},
            ValueError,
            "from 0 to 3.* has 3 weights",
        ),
        ({"indices": {"w": jnp.array([0.5])}}, TypeError, "w: indices must be vectors"),
        ({"indices": {"v": jnp.array([0])}}, ValueError, "indices must have exactly"),
    ],
)
def test_what_cannot_be_estimated_is_named(change, error, message):
    given = {
        "loss_fn": lambda p, x: jnp.sum(p["w"]),
        "params": {"w": jnp.ones(3)},
        "batch": None,
    }
    with pytest.raises(error, match=message):
        zeroth_order.coordinate_grads(**given | change)
