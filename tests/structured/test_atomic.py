import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

E, F, D, N = 3, 5, 4, 40
s = js.structured


def tokens(seed=0, n=N):
    """Inputs and gradients that depend on one another, and who was routed where."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((E, n, F))
    g = rng.standard_normal((E, n, D)) + x[..., :D]
    down = rng.standard_normal((E, F, D))
    routed = (rng.random((E, n)) < 0.6).astype(np.float64)
    return x, g, down, routed


def collect(x, g, down, weight=None, dtype=jnp.float64):
    start = s.atomic_init(x.shape[:-2], x.shape[-1], dtype=dtype)
    x, g, down = (jnp.asarray(a, dtype) for a in (x, g, down))
    if weight is not None:
        weight = jnp.asarray(weight, dtype)
    return s.atomic_update(start, x, g, down, weight=weight)


def by_covariances(x, g, down, routed):
    """The formula of the paper, with C_e formed, one expert after the other."""
    scores = np.full((E, F), -1.0)
    for e in range(E):
        mine = routed[e] > 0
        if mine.any():
            covariance = g[e, mine].T @ g[e, mine] / mine.sum()
            for k in range(F):
                w = down[e, k]
                scores[e, k] = np.mean(x[e, mine, k] ** 2) * (w @ covariance @ w)
    return scores


def by_tokens(x, g, down, routed):
    """The quadratic term of every token: what removing the unit does to it."""
    scores = np.full((E, F), -1.0)
    for e in range(E):
        mine = routed[e] > 0
        if mine.any():
            for k in range(F):
                removed = x[e, mine, k, None] * down[e, k]
                scores[e, k] = np.mean(np.sum(g[e, mine] * removed, axis=1) ** 2)
    return scores


@pytest.mark.usefixtures("x64")
def test_the_scores_are_those_of_the_dense_covariances():
    data = tokens()
    sums = collect(*data)
    np.testing.assert_allclose(s.atomic_scores(sums), by_covariances(*data), 1e-12)
    np.testing.assert_allclose(
        s.atomic_scores(sums, joint=True), by_tokens(*data), 1e-12
    )
    # The two differ here, or the next test would say nothing.
    assert np.max(abs(by_tokens(*data) / by_covariances(*data) - 1)) > 0.1


@pytest.mark.usefixtures("x64")
def test_both_are_the_quadratic_term_of_each_token_where_inputs_are_independent():
    rng = np.random.default_rng(1)
    some_x, some_g = rng.standard_normal((E, 6, F)), rng.standard_normal((E, 7, D))
    x = np.repeat(some_x, 7, axis=1)  # every input with every gradient
    g = np.tile(some_g, (1, 6, 1))
    down = rng.standard_normal((E, F, D))
    sums, all_rows = collect(x, g, down), np.ones((E, 42))
    expected = by_tokens(x, g, down, all_rows)
    np.testing.assert_allclose(s.atomic_scores(sums), expected, 1e-12)
    np.testing.assert_allclose(s.atomic_scores(sums, joint=True), expected, 1e-12)


def test_float32_is_as_near_as_it_can_be():
    data = tokens()
    sums = collect(*data, dtype=jnp.float32)
    np.testing.assert_allclose(s.atomic_scores(sums), by_covariances(*data), 1e-5)


@pytest.mark.usefixtures("x64")
def test_chunks_merged_and_layers_stacked_give_the_same():
    x, g, down, routed = tokens()
    whole = collect(x, g, down, routed)
    parts = [
        collect(x[:, a:b], g[:, a:b], down, routed[:, a:b])
        for a, b in ((0, 7), (7, 30), (30, N))
    ]
    merged = s.atomic_merge(s.atomic_merge(parts[0], parts[1]), parts[2])
    twice = lambda a: np.stack([a, 2 * a])
    stacked = collect(twice(x), twice(g), twice(down), np.stack([routed, routed]))
    for got, layers, wanted in zip(merged, stacked, whole, strict=True):
        np.testing.assert_allclose(got, wanted, 1e-12)
        np.testing.assert_allclose(layers[0], wanted, 1e-12)
    np.testing.assert_allclose(
        s.atomic_scores(stacked)[1], 64 * s.atomic_scores(whole), 1e-12
    )


@pytest.mark.usefixtures("x64")
def test_ragged_rows_give_what_routed_ones_do():
    x, g, down, routed = tokens()
    routed[1] = 0  # an expert without rows, in the middle
    chosen = [np.flatnonzero(r) for r in routed]
    pad = lambda a: np.concatenate([a, np.full((3, a.shape[1]), np.nan)])
    rows = pad(np.concatenate([x[e, c] for e, c in enumerate(chosen)]))
    grads = pad(np.concatenate([g[e, c] for e, c in enumerate(chosen)]))
    sizes = jnp.asarray([len(c) for c in chosen])
    start = s.atomic_init((E,), F, dtype=jnp.float64)
    sums = s.atomic_update_ragged(
        start, jnp.asarray(rows), jnp.asarray(grads), jnp.asarray(down), sizes
    )
    for got, wanted in zip(sums, collect(x, g, down, routed), strict=True):
        np.testing.assert_allclose(got, wanted, 1e-12)


def test_what_is_not_routed_does_not_matter_and_comes_last():
    x, g, down, routed = tokens()
    routed[2] = 0
    clean = s.atomic_scores(collect(x, g, down, routed, jnp.float32))
    x[routed == 0], g[routed == 0] = np.nan, np.inf
    np.testing.assert_array_equal(
        s.atomic_scores(collect(x, g, down, routed, jnp.float32)), clean
    )
    assert np.all(clean[2] == -1)
    assert np.all(clean[:2] > 0)


def test_sixteen_bit_rows_are_added_up_in_float32():
    data = [jnp.asarray(a, jnp.bfloat16) for a in tokens()[:3]]
    sums = s.atomic_update(s.atomic_init((E,), F), *data)
    exact = [np.asarray(a, np.float64) for a in data]
    expected = by_covariances(*exact, np.ones((E, N)))
    np.testing.assert_allclose(s.atomic_scores(sums), expected, 1e-5)


def moe(params, x, gates, zeros=None, scale=None):
    """SwiGLU experts; `zeros` join the outputs of down, `scale` is for its inputs."""
    up = jnp.einsum("nd,edf->enf", x, params["up"])
    hidden = jax.nn.silu(jnp.einsum("nd,edf->enf", x, params["gate"])) * up
    inputs = hidden if scale is None else hidden * scale
    outputs = jnp.einsum("enf,efd->end", inputs, params["down"])
    outputs = outputs if zeros is None else outputs + zeros
    return jnp.einsum("ne,end->nd", gates, outputs), hidden


def real_moe(n=64):
    rng = np.random.default_rng(3)
    params = {
        "gate": jnp.asarray(rng.standard_normal((E, D, F))),
        "up": jnp.asarray(rng.standard_normal((E, D, F))),
        "down": jnp.asarray(rng.standard_normal((E, F, D))),
    }
    x = jnp.asarray(rng.standard_normal((n, D)))
    logits = x @ jnp.asarray(rng.standard_normal((D, E)))
    routed = logits > jnp.min(logits, axis=1, keepdims=True)  # two of three
    gates = jax.nn.softmax(jnp.where(routed, logits, -jnp.inf), axis=1)
    noise = jnp.asarray(rng.standard_normal((n, D)))
    target = moe(params, x, gates)[0] + noise
    loss = lambda y: jnp.sum((y - target) ** 2) / 2
    return params, x, gates, routed, target, loss


@pytest.mark.usefixtures("x64")
def test_on_a_real_moe_it_is_the_square_of_the_gates_gradient():
    params, x, gates, routed, target, loss = real_moe()
    n = x.shape[0]
    zeros = jnp.zeros((E, n, D))
    g = jax.grad(lambda z: loss(moe(params, x, gates, zeros=z)[0]))(zeros)
    y, hidden = moe(params, x, gates)
    by_hand = np.einsum("ne,nd->end", gates, y - target)
    np.testing.assert_allclose(g, by_hand, atol=1e-12)
    start = s.atomic_init((E,), F, dtype=jnp.float64)
    sums = s.atomic_update(start, hidden, g, params["down"], weight=routed.T)

    ones = jnp.ones((E, n, F))
    gate = jax.grad(lambda a: loss(moe(params, x, gates, scale=a)[0]))(ones)
    expected = (
        np.sum(np.square(np.asarray(gate)), 1) / np.asarray(routed).sum(0)[:, None]
    )
    np.testing.assert_allclose(s.atomic_scores(sums, joint=True), expected, 1e-10)
    arrays = [np.asarray(a) for a in (hidden, g, params["down"], routed.T)]
    np.testing.assert_allclose(s.atomic_scores(sums), by_covariances(*arrays), 1e-12)


@pytest.mark.usefixtures("x64")
def test_what_scores_low_is_missed_less():
    params, x, gates, routed, _, loss = real_moe()
    zeros = jnp.zeros((E, x.shape[0], D))
    g = jax.grad(lambda z: loss(moe(params, x, gates, zeros=z)[0]))(zeros)
    hidden = moe(params, x, gates)[1]
    start = s.atomic_init((E,), F, dtype=jnp.float64)
    sums = s.atomic_update(start, hidden, g, params["down"], weight=routed.T)

    def loss_with(scores):
        pattern = js.Unstructured(scope="global")
        mask = js.patterns.masks({"layer": scores}, 0.4, pattern=pattern)["layer"]
        up, down = mask[:, None, :], mask[:, :, None]
        masks = {"gate": up, "up": up, "down": down}
        return loss(moe(js.patterns.apply(params, masks), x, gates)[0])

    before = loss(moe(params, x, gates)[0])
    scores = s.atomic_scores(sums)
    low, high = loss_with(scores) - before, loss_with(-scores) - before
    rng = np.random.default_rng(4)
    draws = [loss_with(jnp.asarray(rng.random((E, F)))) - before for _ in range(5)]
    assert 0 < low < min(draws)
    assert max(draws) < high


def test_a_global_rank_takes_experts_without_tokens_first():
    x, g, down, routed = tokens()
    routed[2] = 0
    scores = s.atomic_scores(collect(x, g, down, routed, jnp.float32))
    layers = {"a": scores, "b": 100 * jnp.abs(scores)}
    found = js.patterns.masks(layers, 0.3, pattern=js.Unstructured(scope="global"))
    assert not np.any(found["a"][2])
    removed = sum(int(np.sum(~np.asarray(m))) for m in found.values())
    assert removed == int(0.3 * 2 * E * F + 0.5)
    assert np.all(found["b"])


def test_it_runs_under_jit():
    x, g, down, routed = (jnp.asarray(a, jnp.float32) for a in tokens())

    @jax.jit
    def scored(x, g, down, routed):
        sums = s.atomic_init((E,), F)
        return s.atomic_scores(s.atomic_update(sums, x, g, down, weight=routed))

    eager = s.atomic_scores(collect(x, g, down, routed, jnp.float32))
    np.testing.assert_allclose(scored(x, g, down, routed), eager, 1e-6)


def test_errors_say_what_is_expected():
    x, g, down, routed = (jnp.asarray(a, jnp.float32) for a in tokens())
    sums = s.atomic_init((E,), F)
    with pytest.raises(
        ValueError, match=r"x has shape \(40, 5\), expected \[3, n, 5\]"
    ):
        s.atomic_update(sums, x[0], g, down)
    with pytest.raises(ValueError, match=r"g has shape .*expected \[3, 40, 4\]"):
        s.atomic_update(sums, x, g[:, :-1], down)
    with pytest.raises(
        ValueError, match=r"down has shape \(3, 4, 5\), expected \[3, 5"
    ):
        s.atomic_update(sums, x, x, jnp.swapaxes(down, 1, 2))
    with pytest.raises(ValueError, match="does not broadcast"):
        s.atomic_update(sums, x, g, down, weight=routed.T)
    with pytest.raises(ValueError, match=r"weight must be at least 0; the least is -1"):
        s.atomic_update(sums, x, g, down, weight=-routed)
    with pytest.raises(TypeError, match="x must be real floating-point"):
        s.atomic_update(sums, x.astype(jnp.int32), g, down)
    with pytest.raises(ValueError, match=r"group_sizes has shape \(2,\), expected \(3"):
        s.atomic_update_ragged(sums, x[0], g[0], down, jnp.array([20, 20]))
    with pytest.raises(TypeError, match="group_sizes must be integers"):
        s.atomic_update_ragged(sums, x[0], g[0], down, jnp.ones(3))
    with pytest.raises(ValueError, match="add up to at most 40"):
        s.atomic_update_ragged(sums, x[0], g[0], down, jnp.array([20, 20, 1]))
    with pytest.raises(ValueError, match="one batch axis"):
        s.atomic_update_ragged(s.atomic_init((2, E), F), x, g, down, jnp.ones(3))
    with pytest.raises(ValueError, match="cannot be merged"):
        s.atomic_merge(sums, s.atomic_init((E,), F + 1))
    with pytest.raises(ValueError, match="size must be at least 1"):
        s.atomic_init((E,), 0)
    with pytest.raises(TypeError, match="float32 or float64"):
        s.atomic_init((E,), F, dtype=jnp.bfloat16)


@pytest.mark.usefixtures("x64")
def test_rows_are_not_rounded_silently():
    x, g, down, _ = (jnp.asarray(a) for a in tokens())
    with pytest.raises(TypeError, match="would be rounded to float32"):
        s.atomic_update(s.atomic_init((E,), F), x, g, down)
