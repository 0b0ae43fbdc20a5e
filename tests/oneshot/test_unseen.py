"""Experts that no row reached, and inputs that are always 0: magnitude decides."""

import functools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

SOLVERS = {"sparsegpt": js.solvers.sparsegpt, "wanda": js.solvers.wanda}


@functools.cache
def routed():
    """Three experts, of which the last gets nothing."""
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    gate = jnp.asarray(np.eye(3)[np.arange(30) % 2], jnp.float32)
    return {"up": normal(3, 4, 8)}, (normal(30, 4), gate)


def apply_fn(p, x, gate):
    return jnp.einsum("etd,edf->etf", jnp.einsum("te,td->etd", gate, x), p["up"])


@functools.cache
def solved(solver, unseen):
    params, batch = routed()
    options = {"sparsity": 0.5, "solver": SOLVERS[solver], "unseen": unseen}
    with pytest.warns(UserWarning, match=r"^up \(batch index 2\): no row reached it"):
        return js.oneshot.layerwise(apply_fn, params, [batch], **options)


def largest(w, keep):
    flat = np.abs(np.asarray(w)).ravel()
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(flat)[flat.size - keep :]] = True
    return mask.reshape(np.shape(w))


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_expert_without_rows_is_pruned_by_magnitude_and_its_error_is_not_known(
    solver,
):
    params, _ = routed()
    pruned = solved(solver, "magnitude")
    mask, info = np.asarray(pruned.masks["up"]), pruned.info["up"]
    assert mask.sum((1, 2)).tolist() == [16, 16, 16]
    np.testing.assert_array_equal(mask[2], largest(params["up"][2], 16))
    np.testing.assert_array_equal(
        pruned.params["up"][2], np.where(mask[2], params["up"][2], 0)
    )
    for errors in (info.error, info.relative_error, info.masked_error):
        assert np.isnan(errors).tolist() == [False, False, True]
    assert info.rows.tolist() == [15, 15, 0]
    assert "nan" not in js.report.layer_table(pruned.info)


def test_or_it_stays_dense():
    params, _ = routed()
    pruned = solved("wanda", "dense")
    assert np.asarray(pruned.masks["up"]).sum((1, 2)).tolist() == [16, 16, 32]
    np.testing.assert_array_equal(pruned.params["up"][2], params["up"][2])
    info = pruned.info["up"]
    np.testing.assert_allclose(info.sparsity, [0.5, 0.5, 0])
    assert np.isnan(info.relative_error).tolist() == [False, False, True]


def test_a_layer_that_only_sees_zeros_is_named_too():
    params = {"w": routed()[0]["up"][0]}
    run = functools.partial(js.oneshot.layerwise, solver=js.solvers.wanda, sparsity=0.5)
    with pytest.warns(UserWarning, match=r"^w: its inputs were 0 in all of 5 rows"):
        pruned = run(lambda p, x: x @ p["w"], params, [np.zeros((5, 4), np.float32)])
    np.testing.assert_array_equal(pruned.masks["w"], largest(params["w"], 16))
    assert np.isnan(pruned.info["w"].relative_error)
    assert "nan" in js.report.layer_table(pruned.info)


def test_another_word_for_unseen_is_refused():
    params, batch = routed()
    with pytest.raises(ValueError, match="unseen must be one of"):
        js.oneshot.layerwise(apply_fn, params, [batch], sparsity=0.5, unseen="skip")


@functools.cache
def statistics():
    params, batch = routed()
    trace = js.trace(apply_fn, params, *batch)
    with pytest.warns(UserWarning, match=r"^up \(batch index 2\): no row reached it"):
        return js.calibration.run(trace, params, [batch])


@pytest.mark.parametrize("score", ["wanda", "gblm", "flap"])
def test_scores_of_an_expert_without_rows_are_those_of_its_weights(score):
    params, _ = routed()
    gradients = {"up": jnp.ones((3, 4, 8)).at[2].set(0)}
    more = (gradients,) if score == "gblm" else ()
    found = np.asarray(getattr(js.scores, score)(params, statistics(), *more)["up"])
    w = np.asarray(params["up"][2])
    if score == "flap":
        w = np.broadcast_to(np.sum(w * w, 1, keepdims=True), w.shape)
    np.testing.assert_allclose(found[2] / found[2].max(), abs(w) / abs(w).max(), 1e-5)
    seen = found[:2].mean()
    assert 0.1 * seen < found[2].mean() < 10 * seen  # in the unit of the others


def test_a_model_of_which_all_was_seen_warns_of_nothing():
    params, (x, _) = routed()
    full = jnp.asarray(np.eye(3)[np.arange(30) % 3], jnp.float32)
    trace = js.trace(apply_fn, params, x, full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        js.calibration.run(trace, params, [(x, full)])
