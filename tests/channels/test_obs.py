"""Channels of whole models: scores, greedy choices and refits, by brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo.models import ZOO, array

import jaxsparse as js


def two_readers():
    """Hidden units that two kernels read, through the same and through other inputs."""
    shapes = {"up": (5, 8), "a": (8, 3), "b": (8, 2), "c": (8, 4)}
    params = {k: array(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}

    def apply_fn(p, x):
        h = jnp.tanh(x @ p["up"])
        return h @ p["a"], h @ p["b"], (h * h) @ p["c"]

    return apply_fn, params, array(64, 5, seed=9)


def outputs_error(apply_fn, params, new, x):
    pairs = zip(
        jax.tree.leaves(apply_fn(params, x)),
        jax.tree.leaves(apply_fn(new, x)),
        strict=True,
    )
    return sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)


def refitted_by_hand(apply_fn, params, x, gone):
    """Least squares of each kernel on the inputs that it keeps, by lstsq."""
    h = np.tanh(x @ params["up"])
    new, kept = dict(params), np.setdiff1d(np.arange(8), gone)
    for name, inputs in (("a", h), ("b", h), ("c", h * h)):
        w = np.zeros_like(params[name])
        w[kept] = np.linalg.lstsq(inputs[:, kept], inputs @ params[name])[0]
        new[name] = jnp.asarray(w)
    return new


def setting(damping=1e-9):
    apply_fn, params, x = two_readers()
    trace = js.trace(apply_fn, params, x)
    groups = js.coupling.groups(trace)
    stats = js.calibration.run(trace, params, [x], where=r"^[abc]$")
    return apply_fn, params, x, trace, groups, stats, {"rel_damping": damping}


def test_scores_are_the_rise_of_the_error_after_a_refit():
    with jax.enable_x64(True):
        apply_fn, params, x, _, groups, stats, options = setting()
        scores = js.channels.obs_errors(groups, params, stats, **options)
        (name,) = scores
        for i in range(8):
            new = refitted_by_hand(apply_fn, params, x, [i])
            expected = outputs_error(apply_fn, params, new, x) / len(x)
            np.testing.assert_allclose(scores[name][i], expected, rtol=1e-5)


def test_refits_are_least_squares_and_what_is_narrowed_then():
    with jax.enable_x64(True):
        apply_fn, params, x, trace, groups, stats, options = setting()
        drop = js.coupling.Drop({"up[1]": np.array([1, 4, 6])}, {"up[1]": 8})
        new = js.channels.obs_refit(groups, params, stats, drop, **options)
        by_hand = refitted_by_hand(apply_fn, params, x, [1, 4, 6])
        for name in params:
            np.testing.assert_allclose(new[name], by_hand[name], atol=1e-5)
        np.testing.assert_array_equal(new["up"], params["up"])
        small = js.narrowing.narrow(trace, new, drop)
        error = outputs_error(small.apply_fn, small.params, small.params, x)
        assert error == 0
        got = outputs_error(
            lambda p, x: (apply_fn if p is params else small.apply_fn)(p, x),
            params,
            small.params,
            x,
        )
        expected = outputs_error(apply_fn, params, by_hand, x)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_greedy_is_the_best_of_each_step():
    def apply_fn(p, x):
        h = jnp.tanh(x @ p["up"])
        return h @ p["a"], h @ p["b"]  # the same inputs: one inverse for both

    with jax.enable_x64(True):
        _, params, x = two_readers()
        params = {k: params[k] for k in ("up", "a", "b")}
        trace = js.trace(apply_fn, params, x)
        groups = js.coupling.groups(trace)
        stats = js.calibration.run(trace, params, [x], where=r"^[ab]$")
        drop = js.channels.obs_greedy(groups, params, stats, 0.5, rel_damping=1e-9)
        h, gone = np.tanh(x @ params["up"]), []
        both = np.concatenate([params["a"], params["b"]], 1)
        for _ in range(4):
            errors = {}
            for i in set(range(8)) - set(gone):
                kept = np.setdiff1d(np.arange(8), [*gone, i])
                w = np.linalg.lstsq(h[:, kept], h @ both)[0]
                errors[i] = np.sum((h @ both - h[:, kept] @ w) ** 2)
            gone.append(min(errors, key=lambda i: errors[i]))
        assert drop.indices["up[1]"].tolist() == sorted(gone)


@pytest.mark.parametrize(
    "name",
    [
        "moe",
        pytest.param("scan", marks=pytest.mark.exhaustive),
        pytest.param("attention_flax", marks=pytest.mark.exhaustive),
        pytest.param("grouped", marks=pytest.mark.exhaustive),
    ],
)
def test_on_whole_models_refitting_helps(name):
    with jax.enable_x64(True):
        apply_fn, params, inputs = ZOO[name]()
        rng = np.random.default_rng(3)
        more = tuple(jnp.asarray(rng.normal(size=(24, *x.shape[1:]))) for x in inputs)
        trace = js.trace(apply_fn, params, *more)
        groups = js.coupling.groups(trace).prunable
        stats = js.calibration.run(
            trace, params, [more[0]], where=r"kernel|gate|up|down"
        )
        # What no kernel reads alone (the width of queries) has no score.
        scores = js.channels.obs_errors(groups, params, stats)
        drop = js.channels.obs_greedy(groups, params, stats, 0.4)
        assert drop.indices.keys() == scores.keys()
        for name, gone in drop.indices.items():
            size, copies = groups[name].size, groups[name].copies
            assert gone.shape == (*copies, int(np.floor(0.4 * size + 0.5)))
        drops = [
            js.coupling.Drop({n: i}, {n: groups[n].size})
            for n, i in drop.indices.items()
            if i.size
        ]
        refit = functools.partial(js.channels.obs_refit, groups, params, stats)
        refitted = [refit(drop) for drop in drops]

        @jax.jit  # all at once: most of the time is compilation
        def errors(params, refitted):
            dense = apply_fn(params, *more)
            lost = lambda p, masks: jnp.sum(
                (apply_fn(js.patterns.apply(p, masks), *more) - dense) ** 2
            )
            masks = [js.narrowing.drop_masks(trace, drop) for drop in drops]
            return (
                jnp.stack([lost(p, m) for p, m in zip(refitted, masks, strict=True)]),
                jnp.stack([lost(params, m) for m in masks]),
            )

        after, before = errors(params, refitted)
        assert np.mean(after < before) > 0.5


def test_errors_name_the_kernel():
    _, params, x, trace, groups, stats, _ = setting()
    without = js.calibration.run(trace, params, [x], where=r"^[abc]$", gram=False)
    with pytest.raises(ValueError, match=r"[abc]: its statistics are without a gram"):
        js.channels.obs_errors(groups, params, without)
    fewer = js.calibration.run(trace, params, [x], where=r"^a$")
    with pytest.raises(ValueError, match=r"reads up\[1\] but has no statistics"):
        js.channels.obs_errors(groups, params, fewer, where=r"^[abc]$")
    assert stats.paths == ("a", "b", "c")
