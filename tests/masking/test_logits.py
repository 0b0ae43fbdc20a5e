"""MaskLLM's masks against its formula in NumPy, and one training."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse import masking

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
TWO_OF_FOUR = js.NM(2, 4)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def patterns_of(keep, of):
    rows = [np.isin(range(of), c) for c in itertools.combinations(range(of), keep)]
    return np.array(rows)


def test_patterns_come_in_the_order_of_the_paper():
    logits = {"w": jnp.eye(6)[None]}  # output i prefers pattern i
    masks = masking.masks_of_logits(
        logits, {"w": jnp.ones((4, 6))}, pattern=TWO_OF_FOUR
    )
    found = ["".join(str(int(x)) for x in row) for row in masks["w"].T]
    assert found == ["1100", "1010", "1001", "0110", "0101", "0011"]


@pytest.mark.parametrize("at_once", [None, 2])
def test_soft_masks_are_softmaxes_over_patterns(at_once):
    w, pi = numbers(0, 16, 5), numbers(1, 4, 6, 5)
    f = functools.partial(
        masking.masked_by_logits,
        pattern=TWO_OF_FOUR,
        key=KEY,
        temperature=0.7,
        scale=3.0,
        groups_at_once=at_once,
    )
    out, back = jax.vjp(lambda pi: f({"w": w}, {"w": pi})["w"], pi)
    (own,) = jax.tree.leaves(js.tree.keys_like(KEY, {"w": w}))
    keys = [own] if at_once is None else jax.random.split(own, 2)
    gumbel = np.concatenate([
        np.asarray(jax.random.gumbel(k, (4 // len(keys), 6, 5)), np.float64)
        for k in keys
    ])
    y = np.exp((3.0 * pi + gumbel) / 0.7)
    y /= y.sum(1, keepdims=True)
    rows = patterns_of(2, 4)
    mask = np.einsum("gco,cj->gjo", y, rows).reshape(16, 5)
    np.testing.assert_allclose(out, w * mask, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mask.reshape(4, 4, 5).sum(1), 2)
    ct = numbers(2, 16, 5)
    dy = np.einsum("gjo,cj->gco", (ct * w).reshape(4, 4, 5), rows)
    expected = 3.0 / 0.7 * y * (dy - np.sum(y * dy, 1, keepdims=True))
    np.testing.assert_allclose(back(ct)[0], expected, rtol=1e-3, atol=1e-5)


def test_hard_masks_forward_and_the_soft_derivative():
    w, pi = numbers(0, 8, 3), numbers(1, 2, 6, 3)
    f = lambda hard, pi: masking.masked_by_logits(
        {"w": w}, {"w": pi}, pattern=TWO_OF_FOUR, key=KEY, scale=1.0, hard=hard
    )["w"]
    hard, back = jax.vjp(functools.partial(f, True), pi)
    _, soft_back = jax.vjp(functools.partial(f, False), pi)
    kept = np.isclose(hard, w)
    assert np.all(kept | np.isclose(hard, 0, atol=1e-6))
    np.testing.assert_array_equal(kept.reshape(2, 4, 3).sum(1), 2)
    ct = numbers(2, 8, 3)
    np.testing.assert_allclose(back(ct)[0], soft_back(ct)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("pattern", "shape", "axes"),
    [
        (TWO_OF_FOUR, (8, 6), None),
        (js.NM(1, 4), (3, 8, 6), js.Axes(input=(1,), output=(2,), batch=(0,))),
        (js.NM(4, 8), (6, 16), js.Axes(input=(1,), output=(0,))),
        (TWO_OF_FOUR, (3, 3, 4, 5), js.Axes(input=(0, 1, 2), output=(3,))),
        (js.NM(2, 4), (2, 6, 5), js.Axes(input=(0, 1), output=(2,))),
    ],
    ids=str,
)
def test_a_prior_is_the_first_choice(pattern, shape, axes):
    params = {"w": numbers(0, *shape), "bias": numbers(1, 3)}
    where = lambda path, leaf: path == "w"
    options = {"pattern": pattern, "axes": axes}
    masks = js.prune(params, where=where, **options).masks
    logits = masking.init_mask_logits(
        params, key=KEY, masks=masks, strength=8.0, where=where, **options
    )
    found = masking.masks_of_logits(logits, params, **options)
    np.testing.assert_array_equal(found["w"], masks["w"])
    assert found["bias"].shape == ()
    drawn = masking.masked_by_logits(
        params, logits, key=KEY, scale=1e4, temperature=0.05, **options
    )
    np.testing.assert_allclose(drawn["w"], params["w"] * masks["w"], atol=1e-6)
    np.testing.assert_array_equal(drawn["bias"], params["bias"])


def test_learned_masks_beat_their_prior_under_frozen_weights():
    x, w = numbers(0, 128, 16) @ numbers(1, 16, 16), numbers(2, 16, 8)
    params, target = {"kernel": jnp.asarray(w)}, x @ w
    masks = js.prune(params, pattern=TWO_OF_FOUR).masks
    start = masking.init_mask_logits(params, pattern=TWO_OF_FOUR, key=KEY, masks=masks)
    loss = lambda params: jnp.mean((x @ params["kernel"] - target) ** 2)
    tx, steps = optax.adam(0.02), 300
    cold = optax.linear_schedule(4.0, 0.05, steps)
    sharp = optax.linear_schedule(1e2, 5e2, steps)

    def step(carry, t):
        logits, state = carry

        def soft(logits):
            masked = masking.masked_by_logits(
                params,
                logits,
                pattern=TWO_OF_FOUR,
                key=jax.random.fold_in(KEY, t),
                temperature=cold(t),
                scale=sharp(t),
            )
            return loss(masked)

        updates, state = tx.update(jax.grad(soft)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps))[0])
    logits, _ = run((start, tx.init(start)))
    learned = masking.masks_of_logits(logits, params, pattern=TWO_OF_FOUR)
    js.patterns.verify(learned, params, pattern=TWO_OF_FOUR)
    error = lambda masks: float(loss(js.patterns.apply(params, masks)))
    assert error(learned) < 0.7 * error(masks)


def test_errors():
    params = {"w": jnp.ones((8, 3))}
    make = functools.partial(masking.init_mask_logits, params, key=KEY)
    with pytest.raises(TypeError, match="over N:M patterns"):
        make(pattern=js.Unstructured())
    with pytest.raises(ValueError, match="12,870 patterns"):
        masking.init_mask_logits(
            {"w": jnp.ones((16, 1))}, key=KEY, pattern=js.NM(8, 16)
        )
    with pytest.raises(ValueError, match=r"w: .*needs a number of inputs"):
        make(pattern=js.NM(1, 16))
    logits = make(pattern=TWO_OF_FOUR)
    draw = functools.partial(masking.masked_by_logits, params, key=KEY)
    with pytest.raises(ValueError, match=r"w: logits of shape \(2, 6, 3\)"):
        draw(logits, pattern=js.NM(1, 4))
    with pytest.raises(ValueError, match="groups_at_once=3"):
        masking.masked_by_logits(
            {"w": jnp.ones((16, 3))},
            {"w": jnp.ones((4, 6, 3))},
            key=KEY,
            pattern=TWO_OF_FOUR,
            groups_at_once=3,
        )
    with pytest.raises(ValueError, match="Logits for"):
        draw({"other": logits["w"]}, pattern=TWO_OF_FOUR)
