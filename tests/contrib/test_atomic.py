import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

E, F, D, N = 3, 5, 4, 40


def tokens(seed=0, n=N):
    """Inputs and gradients that depend on one another, and who was routed where."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((E, n, F))
    g = rng.standard_normal((E, n, D)) + x[..., :D]
    down = rng.standard_normal((E, F, D))
    routed = (rng.random((E, n)) < 0.6).astype(np.float64)
    return x, g, down, routed


def added_up(x, g, down, weight=None):
    start = js.contrib.atomic_init(x.shape[:-2], x.shape[-1], dtype=x.dtype)
    return js.contrib.atomic_update(start, x, g, down, weight=weight)


def collect(*arrays, dtype=np.float64):
    return jax.jit(added_up)(*[a.astype(dtype) for a in arrays])


scores_of = jax.jit(js.contrib.atomic_scores, static_argnames="joint")


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
    np.testing.assert_allclose(scores_of(sums), by_covariances(*data), 1e-12)
    np.testing.assert_allclose(scores_of(sums, joint=True), by_tokens(*data), 1e-12)
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
    np.testing.assert_allclose(scores_of(sums), expected, 1e-12)
    np.testing.assert_allclose(scores_of(sums, joint=True), expected, 1e-12)


def test_float32_is_as_near_as_it_can_be():
    data = tokens()
    sums = collect(*data, dtype=np.float32)
    np.testing.assert_allclose(scores_of(sums), by_covariances(*data), 1e-5)


@pytest.mark.usefixtures("x64")
def test_chunks_merged_and_layers_stacked_give_the_same():
    x, g, down, routed = tokens()
    whole = collect(x, g, down, routed)
    parts = [
        collect(x[:, a:b], g[:, a:b], down, routed[:, a:b])
        for a, b in ((0, 15), (15, 25), (25, N))
    ]
    merged = js.contrib.atomic_merge(
        jax.jit(js.contrib.atomic_merge)(parts[0], parts[1]), parts[2]
    )
    twice = lambda a: np.stack([a, 2 * a])
    stacked = collect(twice(x), twice(g), twice(down), np.stack([routed, routed]))
    for got, layers, wanted in zip(merged, stacked, whole, strict=True):
        np.testing.assert_allclose(got, wanted, 1e-12)
        np.testing.assert_allclose(np.asarray(layers)[0], wanted, 1e-12)
    of_layers, of_whole = map(np.asarray, map(scores_of, (stacked, whole)))
    np.testing.assert_allclose(of_layers[1], 64 * of_whole, 1e-12)


@pytest.mark.usefixtures("x64")
def test_ragged_rows_give_what_routed_ones_do():
    x, g, down, routed = tokens()
    routed[1] = 0  # an expert without rows, in the middle
    chosen = [np.flatnonzero(r) for r in routed]
    pad = lambda a: np.concatenate([a, np.full((3, a.shape[1]), np.nan)])
    rows = pad(np.concatenate([x[e, c] for e, c in enumerate(chosen)]))
    grads = pad(np.concatenate([g[e, c] for e, c in enumerate(chosen)]))
    sizes = np.array([len(c) for c in chosen])
    start = js.contrib.atomic_init((E,), F, dtype=jnp.float64)
    sums = js.contrib.atomic_update_ragged(start, rows, grads, down, sizes)
    for got, wanted in zip(sums, collect(x, g, down, routed), strict=True):
        np.testing.assert_allclose(got, wanted, 1e-12)


def test_what_is_not_routed_does_not_matter_and_comes_last():
    x, g, down, routed = tokens()
    routed[2] = 0
    clean = np.asarray(scores_of(collect(x, g, down, routed, dtype=np.float32)))
    x[routed == 0], g[routed == 0] = np.nan, np.inf
    dirty = scores_of(collect(x, g, down, routed, dtype=np.float32))
    np.testing.assert_array_equal(dirty, clean)
    assert np.all(clean[2] == -1)
    assert np.all(clean[:2] > 0)


def test_sixteen_bit_rows_are_added_up_in_float32():
    data = [a.astype(jnp.bfloat16) for a in tokens()[:3]]
    start = js.contrib.atomic_init((E,), F)
    sums = jax.jit(js.contrib.atomic_update)(start, *data)
    exact = [np.asarray(a, np.float64) for a in data]
    expected = by_covariances(*exact, np.ones((E, N)))
    np.testing.assert_allclose(scores_of(sums), expected, 1e-5)


def moe(params, x, gates, zeros=None, scale=None):
    """SwiGLU experts; `zeros` join the outputs of down, `scale` is for its inputs."""
    up = jnp.einsum("nd,edf->enf", x, params["up"])
    hidden = jax.nn.silu(jnp.einsum("nd,edf->enf", x, params["gate"])) * up
    inputs = hidden if scale is None else hidden * scale
    outputs = jnp.einsum("enf,efd->end", inputs, params["down"])
    outputs = outputs if zeros is None else outputs + zeros
    return jnp.einsum("ne,end->nd", gates, outputs), hidden


@functools.cache
def real_moe(n=64):
    """A layer, what it gives, and the gradients of a loss; to be called in float64."""
    rng = np.random.default_rng(3)
    params = {
        "gate": rng.standard_normal((E, D, F)),
        "up": rng.standard_normal((E, D, F)),
        "down": rng.standard_normal((E, F, D)),
    }
    x = rng.standard_normal((n, D))
    logits = x @ rng.standard_normal((D, E))
    routed = logits > np.min(logits, axis=1, keepdims=True)  # two of three
    gates = np.where(routed, np.exp(logits), 0)
    gates = gates / gates.sum(1, keepdims=True)
    noise = rng.standard_normal((n, D))

    @jax.jit
    def run(params):
        y, hidden = moe(params, x, gates)
        loss = loss_to(y + noise)
        of = lambda **kw: loss(moe(params, x, gates, **kw)[0])
        zeros, ones = jnp.zeros((E, n, D)), jnp.ones((E, n, F))
        g = jax.grad(lambda z: of(zeros=z))(zeros)
        return y, hidden, g, jax.grad(lambda a: of(scale=a))(ones)

    y, hidden, g, gate = jax.device_get(run(params))
    return params, x, gates, routed, y, y + noise, hidden, g, gate


def loss_to(target):
    return lambda y: jnp.sum((y - target) ** 2) / 2


@pytest.mark.usefixtures("x64")
def test_on_a_real_moe_it_is_the_square_of_the_gates_gradient():
    params, _, gates, routed, y, target, hidden, g, gate = real_moe()
    by_hand = np.einsum("ne,nd->end", gates, y - target)
    np.testing.assert_allclose(g, by_hand, atol=1e-12)
    arrays = hidden, g, params["down"], routed.T
    sums = jax.jit(added_up)(*arrays)
    expected = np.sum(np.square(gate), 1) / routed.sum(0)[:, None]
    np.testing.assert_allclose(scores_of(sums, joint=True), expected, 1e-10)
    np.testing.assert_allclose(scores_of(sums), by_covariances(*arrays), 1e-12)


@pytest.mark.usefixtures("x64")
def test_what_scores_low_is_missed_less():
    params, x, gates, routed, y, target, hidden, g, _ = real_moe()
    sums = jax.jit(added_up)(hidden, g, params["down"], routed.T)

    @jax.jit
    def loss_with(scores):
        pattern = js.Unstructured(scope="global")
        mask = js.patterns.masks({"layer": scores}, 0.4, pattern=pattern)["layer"]
        up, down = mask[:, None, :], mask[:, :, None]
        masks = {"gate": up, "up": up, "down": down}
        return loss_to(target)(moe(js.patterns.apply(params, masks), x, gates)[0])

    before = np.sum((y - target) ** 2) / 2
    scores = np.asarray(scores_of(sums))
    low, high = loss_with(scores) - before, loss_with(-scores) - before
    rng = np.random.default_rng(4)
    draws = [loss_with(rng.random((E, F))) - before for _ in range(5)]
    assert 0 < low < min(draws)
    assert max(draws) < high


def test_a_global_rank_takes_experts_without_tokens_first():
    x, g, down, routed = tokens()
    routed[2] = 0
    scores = np.asarray(scores_of(collect(x, g, down, routed, dtype=np.float32)))
    layers = {"a": scores, "b": 100 * np.abs(scores)}
    pattern = js.Unstructured(scope="global")
    found = jax.jit(lambda x: js.patterns.masks(x, 0.3, pattern=pattern))(layers)
    found = jax.device_get(found)
    assert not np.any(found["a"][2])
    removed = sum(int(np.sum(~m)) for m in found.values())
    assert removed == int(0.3 * 2 * E * F + 0.5)
    assert np.all(found["b"])


def test_it_runs_under_jit():
    arrays = [a.astype(np.float32) for a in tokens()]
    scored = jax.jit(lambda *xs: js.contrib.atomic_scores(added_up(*xs)))
    eager = js.contrib.atomic_scores(added_up(*arrays))
    np.testing.assert_allclose(scored(*arrays), eager, 1e-6)


def test_errors_say_what_is_expected():
    x, g, down, routed = (a.astype(np.float32) for a in tokens())
    sums = js.contrib.atomic_init((E,), F)
    with pytest.raises(
        ValueError, match=r"x has shape \(40, 5\), expected \[3, n, 5\]"
    ):
        js.contrib.atomic_update(sums, x[0], g, down)
    with pytest.raises(ValueError, match=r"g has shape .*expected \[3, 40, 4\]"):
        js.contrib.atomic_update(sums, x, g[:, :-1], down)
    with pytest.raises(
        ValueError, match=r"down has shape \(3, 4, 5\), expected \[3, 5"
    ):
        js.contrib.atomic_update(sums, x, x, np.swapaxes(down, 1, 2))
    with pytest.raises(ValueError, match="does not broadcast"):
        js.contrib.atomic_update(sums, x, g, down, weight=routed.T)
    with pytest.raises(ValueError, match=r"weight must be at least 0; the least is -1"):
        js.contrib.atomic_update(sums, x, g, down, weight=-routed)
    with pytest.raises(TypeError, match="x must be real floating-point"):
        js.contrib.atomic_update(sums, x.astype(np.int32), g, down)
    with pytest.raises(ValueError, match=r"group_sizes has shape \(2,\), expected \(3"):
        js.contrib.atomic_update_ragged(sums, x[0], g[0], down, np.array([20, 20]))
    with pytest.raises(TypeError, match="group_sizes must be integers"):
        js.contrib.atomic_update_ragged(sums, x[0], g[0], down, np.ones(3))
    with pytest.raises(ValueError, match="add up to at most 40"):
        js.contrib.atomic_update_ragged(sums, x[0], g[0], down, np.array([20, 20, 1]))
    with pytest.raises(ValueError, match="one batch axis"):
        js.contrib.atomic_update_ragged(
            js.contrib.atomic_init((2, E), F), x, g, down, np.ones(3)
        )
    with pytest.raises(ValueError, match="cannot be merged"):
        js.contrib.atomic_merge(sums, js.contrib.atomic_init((E,), F + 1))
    with pytest.raises(ValueError, match="size must be at least 1"):
        js.contrib.atomic_init((E,), 0)
    with pytest.raises(TypeError, match="float32 or float64"):
        js.contrib.atomic_init((E,), F, dtype=jnp.bfloat16)


@pytest.mark.usefixtures("x64")
def test_rows_are_not_rounded_silently():
    x, g, down, _ = tokens()
    with pytest.raises(TypeError, match="would be rounded to float32"):
        js.contrib.atomic_update(js.contrib.atomic_init((E,), F), x, g, down)
