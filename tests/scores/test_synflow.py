import jax
import jax.numpy as jnp
import numpy as np
from reference import gradients

import jaxsparse as js


def linear(params, x):
    return x @ params["a"] @ params["b"]


def relu(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def weights():
    rng = np.random.default_rng(0)
    return rng.standard_normal((4, 5)), rng.standard_normal((5, 3))


def test_a_score_is_the_sum_over_the_paths_through_a_weight(x64):
    a, b = weights()
    x = np.zeros((1, 4))
    jitted = jax.jit(js.scores.synflow, static_argnums=0)
    for synflow, apply_fn in ((jitted, linear), (js.scores.synflow, relu)):
        scores = synflow(apply_fn, {"a": jnp.asarray(a), "b": jnp.asarray(b)}, x)
        for got, paths in zip(scores.values(), gradients.synflow(a, b), strict=True):
            np.testing.assert_allclose(got, paths, rtol=1e-12)


def test_every_layer_has_the_same_total(x64):
    a, b = weights()
    params = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    scores = js.scores.synflow(relu, params, np.zeros((1, 4)))
    total = {k: np.asarray(score).sum() for k, score in scores.items()}
    np.testing.assert_allclose(total["a"], total["b"], rtol=1e-12)


def test_neither_the_data_nor_the_signs_count():
    a, b = weights()
    params = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    flipped = jax.tree.map(lambda w: -np.asarray(w), params)
    zeros, ones = np.zeros((1, 4), "float32"), np.full((1, 4), 17, "float32")
    synflow = jax.jit(js.scores.synflow, static_argnums=0)
    first, second = synflow(relu, params, zeros), synflow(relu, flipped, ones)
    for name in params:
        np.testing.assert_array_equal(first[name], second[name])


def test_a_hundred_rounds_never_cut_a_layer_off():
    """Its purpose: at 1 - 6/500 a single cut by magnitude disconnects this net."""
    rng = np.random.default_rng(0)
    wide = {f"layer_{i}": rng.standard_normal((10, 10)) for i in range(5)}
    scale = {"layer_2": 1e-3}
    params = {k: jnp.asarray(w * scale.get(k, 1), jnp.float32) for k, w in wide.items()}

    def deep(params, x):
        for i in range(5):
            x = jax.nn.relu(x @ params[f"layer_{i}"])
        return x

    pattern = js.Unstructured("global")
    scores = js.scores.magnitude(params)
    by_magnitude = js.patterns.masks(scores, 1 - 6 / 500, pattern=pattern, min_keep=0)
    assert not np.any(by_magnitude["layer_2"])
    x = np.zeros((1, 10), "float32")
    score = jax.jit(lambda p: js.scores.synflow(deep, p, x))
    by_flow = js.prune(params, 1 - 6 / 500, score=score, pattern=pattern, steps=100)
    masks = {k: np.asarray(mask) for k, mask in by_flow.masks.items()}
    assert all(mask.any() for mask in masks.values())
    assert sum(mask.sum() for mask in masks.values()) == 6
    flow = np.ones((1, 10))
    for w in by_flow.params.values():
        flow = flow @ abs(np.asarray(w))
    assert flow.sum() > 0
