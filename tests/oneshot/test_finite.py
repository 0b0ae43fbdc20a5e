"""NaN, Inf and nothing at all in what calibration reads: named where they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js


@functools.cache
def numbers():
    rng = np.random.default_rng(0)
    normal = lambda *s: rng.standard_normal(s).astype(np.float32)
    params = {"bias": normal(1, 8), "down": normal(8, 3), "up": normal(4, 8)}
    return params, [normal(6, 4) for _ in range(3)]


def apply_fn(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


def overflowing(p, x):
    return jnp.log(0 * x) @ p["up"]


def spoiled(path, value):
    params, batches = numbers()
    params = {k: x.copy() for k, x in params.items()}
    if path in params:
        params[path].flat[3] = value
    return params, batches


def layerwise(f, params, batches):
    solver = js.solvers.magnitude
    return js.oneshot.layerwise(f, params, batches, sparsity=0.5, solver=solver)


def calibrated(f, params, batches):
    trace = js.trace(f, params, batches[0])
    return js.calibration.run(trace, params, batches)


both = pytest.mark.parametrize("run", [layerwise, calibrated])


@both
@pytest.mark.parametrize("path", ["up", "down", "bias"])
def test_nan_in_a_parameter_is_named_there(run, path):
    with pytest.raises(ValueError, match=rf"^{path}: 1 of its entries are NaN"):
        run(apply_fn, *spoiled(path, np.nan))


@both
def test_inf_in_a_kernel_is_named_there_and_in_others_where_it_reaches_one(run):
    with pytest.raises(ValueError, match=r"^up: 0 .* are NaN and 1 are Inf"):
        run(apply_fn, *spoiled("up", np.inf))
    with pytest.raises(
        ValueError, match=r"batch 0: the inputs of down.*parameter bias"
    ):
        run(apply_fn, *spoiled("bias", np.inf))
    run(apply_fn, *spoiled("bias", -np.inf))  # relu makes it 0: a dead input


@both
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_is_named_by_its_number(run, value):
    params, batches = numbers()
    batches = [x.copy() for x in batches]
    batches[1][2, 3] = value
    pattern = "batch 1: the inputs of up hold NaN or Inf, because array 0 .* 1 entries"
    with pytest.raises(ValueError, match=pattern):
        run(apply_fn, params, batches)


@both
def test_what_the_model_makes_is_told_from_its_data(run):
    pattern = "batch 0: the inputs of up .* though the batch and all parameters"
    with pytest.raises(ValueError, match=pattern):
        run(overflowing, *numbers())


@both
def test_a_batch_without_rows_is_refused(run):
    params, batches = numbers()
    with pytest.raises(ValueError, match=r"batch 1 is empty.*\(0, 4\)"):
        run(apply_fn, params, [batches[0], batches[1][:0]])
    with pytest.raises(ValueError, match=r"batch 0 is empty.*\(0, 4\)"):
        run(apply_fn, params, [batches[1][:0]])


def test_rows_that_do_not_count_may_be_nan():
    params, batches = numbers()
    x = batches[0].copy()
    x[2] = np.nan
    trace = js.trace(apply_fn, params, x)
    weight = lambda x: ~np.isnan(x[:, 0])
    stats = js.calibration.run(trace, params, [x], weight=weight)
    assert stats.of("up").count == 5


def test_channel_recipes_name_a_kernel_with_nan():
    params, batches = numbers()
    trace = js.trace(apply_fn, params, batches[0])
    groups = js.coupling.groups(trace)
    stats = js.calibration.run(trace, params, batches)
    broken, _ = spoiled("down", np.nan)
    with pytest.raises(ValueError, match=r"^down: 1 of its entries are NaN"):
        js.channels.obs_errors(groups, broken, stats)
