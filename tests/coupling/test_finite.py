"""Masks that make NaN: 0 / 0, log 0, infinite derivatives. They are flagged, no others.

Every model is run masked and narrowed, in values and gradients, in one program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.scipy.special import xlog1py, xlogy
from zoo.models import loosely

import jaxsparse as js

SHAPES = {
    "in": (4, 4),
    "v": (4, 6),
    "o": (6, 2),
    "q": (4, 3, 2),
    "k": (4, 3, 2),
    "ho": (3, 2, 2),
    "up": (3, 4, 6),
    "down": (3, 6, 4),
    "gain": (6,),
}


@jax.custom_vjp
def slow(x):
    return jnp.tanh(x) / (1 + x * x)


slow.defvjp(lambda x: (slow(x), x), lambda x, g: (g * jnp.cos(x),))


@jax.custom_vjp
def rooted(x):
    return jnp.tanh(x) / (1 + x * x)


rooted.defvjp(lambda x: (rooted(x), x), lambda x, g: (g * lax.rsqrt(jnp.abs(x)),))


def of_channels(act):
    return lambda p, x: act(x @ p["in"] @ p["v"]) @ p["o"]


def of_kernel(change):
    return lambda p, x: jnp.tanh(x @ p["in"] @ change(p["v"])) @ p["o"]


def of_heads(act):
    def apply_fn(p, x):
        q, k = (jnp.einsum("bi,ihd->bhd", x @ p["in"], p[name]) for name in "qk")
        shares = jax.nn.softmax(jnp.einsum("bhd,chd->hbc", act(q), act(k)))
        return jnp.einsum("hbc,chd,hdo->bo", shares, k, p["ho"])

    return apply_fn


def masked_heads(p, x):
    """Infinities that a model writes itself are of no concern."""
    q = jnp.einsum("bi,ihd->bhd", x @ p["in"], p["q"])
    scores = jnp.where(
        jnp.tri(5, dtype=bool), jnp.einsum("bhd,chd->hbc", q, q), -jnp.inf
    )
    return jnp.einsum("hbc,chd,hdo->bo", jax.nn.softmax(scores), q, p["ho"])


def stacked(change):
    def apply_fn(p, x):
        layer = lambda x, w: (x + jnp.tanh(x @ change(w[0])) @ w[1], None)
        x = lax.scan(jax.checkpoint(layer), x @ p["in"], (p["up"], p["down"]))[0]
        return x @ p["v"] @ p["o"]

    return apply_fn


def branches(p, x):
    h = x @ p["in"] @ p["v"]
    return lax.cond(x.sum() > 0, lambda h: jnp.sin(h) / h, jnp.tanh, h) @ p["o"]


def other_part(p, x):
    """Of two values that are joined and split again, the one that is not divided."""
    h = x @ p["in"] @ p["v"]
    other = jnp.tanh(x @ p["in"])
    both = jnp.concatenate([lax.stop_gradient(h / jnp.abs(h)), other], -1)
    return jnp.tanh(h) @ p["o"] + both[:, 6:].sum(-1, keepdims=True)


norm = functools.partial(jnp.linalg.norm, keepdims=True)
root_mean = lambda h, axis: jnp.sqrt(jnp.mean(h**2, axis, keepdims=True))
CHANNELS = {
    # by the name of a model: what it does, the primitive that is not finite
    "x sinc": (lambda h: jnp.sin(h) / h, "div"),
    "entropy": (lambda h: h * jnp.log(jnp.abs(h)), "log"),
    "(exp - 1) / x": (lambda h: (jnp.exp(h) - 1) / h, "div"),
    "expm1 / x": (lambda h: jnp.expm1(h) / h, "div"),
    "log1p / x": (lambda h: jnp.log1p(h * h) / h, "div"),
    "gradient of xlogy": (lambda h: xlogy(h, h**2), "xlogy"),
    "root mean over samples": (
        lambda h: h * lax.rsqrt(jnp.mean(h**2, 0, keepdims=True)), "rsqrt"),
    "deviation over samples": (lambda h: h / h.std(0), "div"),
    "its gradient": (lambda h: h / (h.std(0) + 1e-3), "sqrt"),
    "signed root": (lambda h: jnp.sign(h) * jnp.sqrt(jnp.abs(h)), "sqrt"),
    "power": (lambda h: h * jnp.abs(h) ** -1.5, "pow"),
    "gradient of a power": (lambda h: jnp.abs(h) ** 0.5, "pow"),
    "reciprocal": (lambda h: jnp.tanh(h**-1), "integer_pow"),
    "bounded": (lambda h: jnp.exp(-1 / h**2), "div"),
    "angle": (lambda h: jnp.arctan2(h, 2 * h), "atan2"),
    "remainder": (lambda h: lax.rem(h, h), "rem"),
    "guarded, not its gradient": (
        lambda h: jnp.where(h == 0, 1.0, jnp.sin(h) / h), "div"),
    "rule that divides": (rooted, "rooted"),
    "layer norm": (lambda h: (h - h.mean(-1, keepdims=True)) / jnp.sqrt(
        h.var(-1, keepdims=True) + 1e-5), None),
    "deviation and epsilon": (
        lambda h: h / (jnp.sqrt(h.var(-1, keepdims=True)) + 1e-5), None),
    "root mean over channels": (
        lambda h: h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True)), None),
    "norm over channels": (lambda h: h / norm(h, axis=-1), None),
    "variance over samples": (
        lambda h: (h - h.mean(0)) * lax.rsqrt(h.var(0) + 1e-3), None),
    "guarded twice": (
        lambda h: jnp.where(h == 0, 1.0, jnp.sin(h) / jnp.where(h == 0, 1.0, h)), None),
    "guarded by a bound": (lambda h: h / jnp.maximum(jnp.abs(h), 1e-3), None),
    "jnp.sinc": (lambda h: h * jnp.sinc(h), None),
    "xlogy": (lambda h: xlogy(h, h**2 + 1) + xlog1py(h, h * h), None),
    "no gradient": (lambda h: h * lax.stop_gradient(jnp.sqrt(jnp.abs(h))), None),
    "harmless power": (lambda h: jnp.abs(h) ** 1.5 + h**3, None),
    "rule that does not": (slow, None),
    "gelu": (jax.nn.gelu, None),
    "silu": (jax.nn.silu, None),
    "mish": (jax.nn.mish, None),
    "softplus": (lambda h: jax.nn.softplus(h) * h, None),
    "log_sigmoid": (lambda h: jax.nn.log_sigmoid(h) * h, None),
    "elu": (jax.nn.elu, None),
    "log1p": (lambda h: jnp.log1p(h * h), None),
}  # fmt: skip
MODELS = {
    **{name: (of_channels(act), "v[1]", at) for name, (act, at) in CHANNELS.items()},
    "weight norm": (of_kernel(lambda v: v / norm(v, axis=0)), "v[1]", "div"),
    "largest weight": (
        of_kernel(lambda v: jnp.round(v / jnp.abs(v).max(0))), "v[1]", "div"),
    "weight norm and epsilon": (
        of_kernel(lambda v: v / (norm(v, axis=0) + 1e-6)), "v[1]", None),
    "weight norm and bound": (
        of_kernel(lambda v: v / jnp.maximum(norm(v, axis=0), 1e-6)), "v[1]", None),
    "standardized kernel": (
        of_kernel(lambda v: (v - v.mean(0)) / (v.std(0) + 1e-3)), "v[1]", None),
    "weight norm over outputs": (
        of_kernel(lambda v: v / norm(v, axis=1)), "v[1]", None),
    "normed heads": (of_heads(lambda q: q / norm(q, axis=-1)), "k[1]", "div"),
    "normed widths": (of_heads(lambda q: q / norm(q, axis=-1)), "k[2]", None),
    "heads and epsilon": (
        of_heads(lambda q: q * lax.rsqrt((q * q).mean(-1, keepdims=True) + 1e-6)),
        "k[1]", None),
    "causal heads": (masked_heads, "q[1]", None),
    "scan": (stacked(lambda w: w / norm(w, axis=0)), "up[2]", "div"),
    "scan and epsilon": (
        stacked(lambda w: w / (norm(w, axis=0) + 1e-6)), "up[2]", None),
    "branches": (branches, "v[1]", "div"),
    "gain": (
        lambda p, x: jnp.tanh(x @ p["in"] @ p["v"]) * (p["gain"] / norm(p["gain"]))
        @ p["o"], "v[1]", None),
}  # fmt: skip


def parameters():
    draw = np.random.default_rng(0).normal
    return {name: draw(size=shape) / 2 for name, shape in SHAPES.items()}


X = np.random.default_rng(1).normal(size=(5, 4))


def drop_of(group):
    return {group.name: np.broadcast_to([1], (*group.copies, 1))}


@functools.cache
def traced(name):
    with jax.enable_x64(True):
        trace = js.trace(loosely(MODELS[name][0]), parameters(), X)
    return trace, js.coupling.groups(trace)[MODELS[name][1]]


@functools.cache
def run():
    """Results and gradients of all models, masked and narrowed."""

    def one(name, params):
        apply_fn, (trace, group) = loosely(MODELS[name][0]), traced(name)
        drop, allow = drop_of(group), ("nonfinite",)
        narrow = lambda p: js.narrowing.narrow(trace, p, drop, allow=allow)
        masks = js.narrowing.drop_masks(trace, drop, allow=allow)
        small = narrow(params)

        def both(f, p):
            loss = lambda p, x: jnp.sum(jnp.sin(f(p, x)))
            return f(p, X), jax.grad(loss, (0, 1))(p, X)

        got, (slopes, slope) = both(small.apply_fn, small.params)
        want, (whole, other) = both(apply_fn, js.patterns.apply(params, masks))
        return (got, slopes, slope), (want, narrow(whole).params, other)

    every = lambda params: {name: one(name, params) for name in MODELS}
    with jax.enable_x64(True):
        return jax.device_get(jax.jit(every)(parameters()))


def is_finite(tree):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_masked_is_finite_unless_it_is_flagged(name):
    primitive, (_, group) = MODELS[name][2], traced(name)
    narrowed, masked = run()[name]
    assert is_finite(narrowed)
    assert is_finite(masked) == (primitive is None)
    assert group.flags == ({"nonfinite"} if primitive else set())
    if primitive is None:
        close = functools.partial(np.testing.assert_allclose, atol=1e-12)
        jax.tree.map(close, narrowed, masked)
        return
    assert not group.zero_invariant
    assert not group.prunable
    (reason,) = group.reasons
    assert reason.detail.split()[-1] == primitive
    assert "test_finite.py:" in reason.source
    assert ("gradients" in reason.detail) == is_finite(masked[0])


def test_masks_and_narrow_refuse_it():
    trace, group = traced("weight norm")
    for change in (
        lambda **options: js.narrowing.drop_masks(trace, drop_of(group), **options),
        lambda **options: js.narrowing.narrow(
            trace, parameters(), drop_of(group), **options
        ),
    ):
        with pytest.raises(ValueError, match=r"v\[1\].*\n  nonfinite: .*NaN or Inf in"):
            change()
        change(allow={"nonfinite"})


def test_an_epsilon_that_is_zero_in_its_type():
    def flags(dtype, epsilon):
        eps = np.asarray(epsilon, dtype)
        act = lambda h: h * lax.rsqrt(jnp.mean(h**2, 0) + eps)
        params = {k: np.ones(SHAPES[k], dtype) for k in ("in", "v", "o")}
        trace = js.trace(loosely(of_channels(act)), params, np.ones((5, 4), dtype))
        return js.coupling.groups(trace)["v[1]"].flags

    assert flags(np.float16, 1e-2) == set()
    assert flags(np.float16, 1e-5) == {"nonfinite"}  # its derivative is 1.6e7
    assert flags(np.float16, 1e-9) == {"nonfinite"}
    assert flags(np.float32, 1e-9) == set()


def test_whole_numbers_that_are_divided_by_zero():
    """What that gives depends on the processor."""
    whole = lambda h: jnp.floor(jnp.abs(h)).astype(jnp.int32)
    with jax.enable_x64(True):
        for act, flags in (
            (lambda h: h * lax.div(whole(h), whole(h)), {"nonfinite"}),
            (lambda h: h * lax.div(whole(h), whole(h) + 1), set()),
        ):
            trace = js.trace(loosely(of_channels(act)), parameters(), X)
            assert js.coupling.groups(trace)["v[1]"].flags == flags


def test_parts_of_what_is_joined_are_apart():
    with jax.enable_x64(True):
        trace = js.trace(loosely(other_part), parameters(), X)
    assert "nonfinite" not in js.coupling.groups(trace)["v[1]"].flags
