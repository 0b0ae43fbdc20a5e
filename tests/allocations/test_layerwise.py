import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.allocations import erk_densities

import jaxsparse as js

DIMS = {"conv": (3, 3, 4, 8), "head": (64, 10), "mlp": (64, 128), "stem": (4, 4)}
params = {k: jnp.ones(d) for k, d in DIMS.items()} | {"bias": jnp.ones(10)}
SIZES = {k: math.prod(d) for k, d in DIMS.items()}


def total(sparsities):
    removed = sum(sparsities[k] * n for k, n in SIZES.items())
    return removed / sum(SIZES.values())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
def test_erk_solves_its_equation(sparsity, power):
    found = js.allocations.erk(params, sparsity, power=power)
    expected = erk_densities(list(DIMS.values()), 1 - sparsity, power)
    for name, density in zip(DIMS, expected, strict=True):
        assert found[name] == pytest.approx(1 - density, abs=1e-9)
    assert found["bias"] == 0.0


@pytest.mark.parametrize(
    ("sparsity", "exceptions"),
    [
        (0.0, None),
        (0.99, None),
        (0.0, {"stem": 0.0}),
        (0.95, {"stem": 0.0}),
        (0.5, {"stem|head": 0.25, "head": 0.9}),
        (0.9, {"stem|head": 0.25, "head": 0.9}),
    ],
)
@pytest.mark.parametrize("allocate", [js.allocations.uniform, js.allocations.erk])
def test_the_total_is_met_with_exceptions_too(allocate, exceptions, sparsity):
    found = allocate(params, sparsity, exceptions=exceptions)
    assert total(found) == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= s < 1 for s in found.values())
    if exceptions == {"stem": 0.0}:
        assert found["stem"] == 0.0
    elif exceptions:
        assert found["stem"] == found["head"] == 0.25  # the first rule wins


def test_layers_too_small_for_their_density_stay_dense():
    found = js.allocations.erk(params, 0.5)
    assert found["stem"] == 0.0
    assert found["mlp"] > 0.5


def test_erk_counts_a_stack_of_layers_as_its_layers():
    layers = {"a": jnp.ones((10, 20)), "b": jnp.ones((30, 40))}
    stacked = {"a": jnp.ones((6, 10, 20)), "b": jnp.ones((6, 30, 40))}
    axes = {"a|b": js.Axes(input=(1,), output=(2,), batch=(0,))}
    found = js.allocations.erk(stacked, 0.8, axes=axes)
    expected = js.allocations.erk(layers, 0.8)
    assert found == pytest.approx(expected, abs=1e-12)


def test_uniform_gives_every_parameter_the_number_itself():
    found = js.allocations.uniform(params, 0.7)
    assert {k: found[k] for k in DIMS} == dict.fromkeys(DIMS, 0.7)


@pytest.mark.parametrize("allocate", [js.allocations.uniform, js.allocations.erk])
def test_shapes_are_all_it_needs(allocate):
    abstract = jax.eval_shape(lambda: params)
    assert allocate(abstract, 0.8) == allocate(params, 0.8)


@pytest.mark.parametrize("allocate", [js.allocations.uniform, js.allocations.erk])
def test_numbers_come_out_as_python_floats(allocate):
    for sparsity in (0.8, np.float32(0.75), jnp.float32(0.75)):
        found = allocate(params | {"empty": jnp.ones((0, 4))}, sparsity)
        assert {type(s) for s in found.values()} == {float}


@pytest.mark.parametrize("allocate", [js.allocations.uniform, js.allocations.erk])
@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), 90])
def test_a_sparsity_outside_its_range_is_refused(allocate, sparsity):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        allocate(params, sparsity)


def test_an_exception_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"exceptions\['stem'\] must lie in \[0, 1\)"):
        js.allocations.uniform(params, 0.5, exceptions={"stem": 1.0})


@pytest.mark.parametrize("rule", ["steem", "bias"])
def test_an_exception_that_matches_nothing_selected_is_refused(rule):
    with pytest.raises(ValueError, match=rf"'{rule}' matches none .*nearest"):
        js.allocations.uniform(params, 0.5, exceptions={rule: 0.0})


@pytest.mark.parametrize(
    "exceptions",
    [{"mlp": 0.0}, {"mlp": 0.999, "conv": 0.999}, {"": 0.5}],
    ids=["too little is left to remove", "too much is removed", "nothing is left"],
)
@pytest.mark.parametrize("allocate", [js.allocations.uniform, js.allocations.erk])
def test_exceptions_that_make_the_total_impossible_are_refused(allocate, exceptions):
    with pytest.raises(ValueError, match=r"0\.9 cannot be met"):
        allocate(params, 0.9, exceptions=exceptions)


def test_exceptions_for_all_may_meet_the_total():
    found = js.allocations.uniform(params, 0.5, exceptions={"": 0.5})
    assert total(found) == 0.5
