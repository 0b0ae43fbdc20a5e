"""What bad input gets: the path, what was got, what was expected, what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature import problems

import jaxsparse as js

curvature = js.curvature


def ones(shape, dtype=np.float32):
    """On the device, without a program compiled for it."""
    return jax.device_put(np.ones(shape, dtype))


def ones_but(index, value):
    x = np.ones((4, 6), np.float32)
    x[index] = value
    return jax.device_put(x)


GRADS = {"a": {"kernel": jax.device_put(problems.values(4, 6, 5))}, "b": None}
PARAMS = {"a": {"kernel": ones((6, 5))}, "b": ones(3)}


def fisher_of(grads=GRADS, block_size=4, damping=1.0, **options):
    return curvature.block_fisher(
        grads, block_size=block_size, damping=damping, **options
    )


def loss(params, batch):
    return jnp.mean(batch @ params["a"]["kernel"])


KINDS = {
    "block": fisher_of,
    "mfac": lambda grads=GRADS, damping=1.0, **options: curvature.mfac(
        grads, damping=damping, **options
    ),
    "mfac in blocks": lambda grads=GRADS, damping=1.0, **options: curvature.mfac(
        grads, damping=damping, block_size=4, **options
    ),
    "diagonal": lambda grads=GRADS, damping=1.0, **options: curvature.diagonal_fisher(
        grads, damping=damping, **options
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)
ESTIMATORS = {
    "block": lambda: curvature.block_estimator(block_size=4),
    "diagonal": curvature.diagonal_estimator,
}
estimators = pytest.mark.parametrize("kind", ESTIMATORS)


def raises(*words, error=ValueError):
    """Of a message each part has to be there."""
    pattern = "".join(f"(?=.*{re.escape(w)})" for w in words)
    return pytest.raises(error, match=f"(?s)^{pattern}")


# Gradients.


@kinds
def test_no_gradients(kind):
    with raises("a/kernel", "(0, 6, 5)", "m = 0"):
        KINDS[kind]({"a": {"kernel": jnp.zeros((0, 6, 5))}})


@kinds
def test_no_arrays(kind):
    with raises("without arrays", "where"):
        KINDS[kind]({"a": None})


@kinds
def test_a_scalar_has_no_axis_for_m(kind):
    with raises("w:", "leading axis", "per_example_grads"):
        KINDS[kind]({"w": jnp.float32(1)})


@kinds
def test_leaves_disagree_about_m(kind):
    with raises("a holds 4", "b holds 3"):
        KINDS[kind]({"a": ones((4, 6)), "b": ones((3, 6))})


@kinds
@pytest.mark.parametrize("leaf", [ones((4, 6), int), ones((4, 6), bool)])
def test_gradients_that_are_no_floating_arrays(kind, leaf):
    with raises("x/w: ", "floating", "where", error=TypeError):
        KINDS[kind]({"x": {"w": leaf}})
    with raises("x/w: grads must hold arrays", error=TypeError):
        KINDS[kind]({"x": {"w": 1.0}})


@kinds
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_found_in_the_parameter_that_has_them(kind, bad):
    one, other = ones((4, 6)), ones_but((2, 1), bad)
    with raises("other: 1 of 4", "first is number 2"):
        KINDS[kind]({"fine": one, "other": other})


@pytest.mark.parametrize("kind", ["block", "mfac", "diagonal"])
def test_squares_that_leave_the_range(kind):
    with raises("big: ", "squares", "Scale the loss"):
        KINDS[kind]({"big": ones_but(..., 1e30)})


# Damping.


@kinds
@pytest.mark.parametrize(
    "damping", [0, 0.0, -1e-7, float("nan"), float("inf"), np.float32(0), jnp.zeros(())]
)
def test_damping_that_is_not_positive(kind, damping):
    with raises("damping must be positive", "singular"):
        KINDS[kind](damping=damping)


@kinds
def test_relative_damping_that_is_not_positive(kind):
    with raises("rel_damping must be positive"):
        KINDS[kind](damping=None, rel_damping=0.0)


@kinds
@pytest.mark.parametrize("damping", [True, "1e-7", 1j, ones(2)])
def test_damping_that_is_no_number(kind, damping):
    with raises("damping must be a number", error=TypeError):
        KINDS[kind](damping=damping)


@kinds
def test_both_kinds_of_damping_or_none(kind):
    with raises("either damping", "rel_damping=None"):
        KINDS[kind](damping=None)
    with raises("either damping", "rel_damping=0.1"):
        KINDS[kind](rel_damping=0.1)


@kinds
def test_damping_that_is_lost(kind):
    with raises("damping is 0", "rel_damping=0.1", "larger damping"):
        KINDS[kind]({"w": ones_but(..., 0)}, damping=None, rel_damping=0.1)
    with raises("damping is 0", "damping=1e-60", "float32"):
        KINDS[kind](damping=1e-60)


# Blocks.


@pytest.mark.parametrize("kind", ["block", "estimator", "mfac"])
@pytest.mark.parametrize("block_size", [31, 1000])
def test_a_block_larger_than_its_kernel(kind, block_size):
    with raises("a/kernel: ", f"{block_size=}", "30 weights", "(6, 5)", "where"):
        if kind == "block":
            fisher_of(block_size=block_size)
        elif kind == "mfac":
            curvature.mfac(GRADS, damping=1.0, block_size=block_size)
        else:
            curvature.block_estimator(block_size=block_size).init(PARAMS)


def test_a_block_larger_than_a_layer_of_several():
    axes = js.Axes(input=(1,), output=(2,), batch=(0,))
    with raises("w: ", "6 weights", "in each layer"):
        fisher_of({"w": ones((4, 7, 2, 3))}, block_size=8, axes=axes)


@pytest.mark.parametrize("block_size", [0, -4])
def test_a_block_size_that_is_not_positive(block_size):
    with raises("block_size", "at least 1"):
        fisher_of(block_size=block_size)


@pytest.mark.parametrize("block_size", [4.0, True, "4"])
def test_a_block_size_that_is_no_integer(block_size):
    with raises("block_size must be an integer", error=TypeError):
        fisher_of(block_size=block_size)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (js.NM(2, 4), ["a/kernel: ", "inputs", "4 divides", "6"]),
        (js.Block((4, 1)), ["a/kernel: ", "axis 0", "6"]),
        (js.Block((3, 2)), ["a/kernel: ", "axis 1", "5"]),
        (js.Block((3, 1)), ["a/kernel: ", "units of 3", "blocks of 4"]),
        (js.Block((6, 1)), ["a/kernel: ", "units of 6", "blocks of 4"]),
    ],
    ids=repr,
)
def test_a_pattern_that_does_not_fit(pattern, words):
    with raises(*words):
        fisher_of(pattern=pattern)


def test_units_need_to_know_the_axes():
    with raises("w: ", "three axes", "State which"):
        fisher_of({"w": ones((4, 2, 4, 4))}, pattern=js.NM(2, 4))
    with raises("w: ", "no input and output"):
        fisher_of({"w": ones((4, 8))}, pattern=js.NM(2, 4))


@pytest.mark.parametrize("accurate", [True, False])
@pytest.mark.parametrize("kind", ["block", "mfac"])
def test_a_factorisation_that_fails_says_what_damping_would_do(kind, accurate):
    """It names the path and the condition; with the damping it names it works."""
    alike = problems.values(4, 1, 1) * problems.values(1, 20, 5)  # of rank one
    fine = jax.device_put(1e-12 * problems.values(4, 6, 5))
    grads = {"1 fine": fine, "2 not": jax.device_put(100 * alike)}
    damping = 1e-13 if accurate else 1e-9
    name = "2 not: " if kind == "block" else "G G^T: "
    with raises(name, "could not be factored", "condition number") as found:
        KINDS[kind](grads, damping=damping, accurate=accurate)
    message = str(found.value)
    assert ("or accurate=True" in message) != accurate
    enough = float(re.search(r"Take damping=([\d.e+-]*\d)", message)[1])
    assert damping < enough < 1
    KINDS[kind](grads, damping=enough, accurate=accurate)


# Trees of another model.


@estimators
def test_sums_of_gradients_of_another_structure(kind):
    estimator = ESTIMATORS[kind]()
    sums = estimator.init(PARAMS)
    with raises("grads lacks ['a/kernel']", "another model"):
        estimator.update(sums, {"b": ones((4, 3))})
    with raises("a/kernel: ", "(4, 5, 6)", "('m', 6, 5)"):
        estimator.update(sums, {"a": {"kernel": ones((4, 5, 6))}})
    with raises("m = 0", "update"):
        estimator.finalize(sums, damping=1.0)
    with raises("either damping"):
        estimator.finalize(sums)
    other = estimator.init({"a": {"kernel": ones((5, 6))}})
    with raises("other parameters", "one estimator"):
        estimator.merge(sums, other)


@estimators
def test_streamed_gradients_with_nan(kind):
    estimator = ESTIMATORS[kind]()
    bad = np.array(GRADS["a"]["kernel"])
    bad[3] = np.nan
    with raises("a/kernel: 1 of 4", "number 3"):
        estimator.update(estimator.init(PARAMS), {"a": {"kernel": bad}})


@kinds
def test_trees_that_lack_a_parameter_or_have_another_shape(kind):
    fisher = KINDS[kind]()
    with raises("tree lacks ['a/kernel']"):
        curvature.ihvp(fisher, {"b": ones(3)})
    other = {"a": {"kernel": ones((5, 6))}}
    with raises("a/kernel: ", "(5, 6)", "(6, 5)"):
        curvature.ihvp(fisher, other)
    masks = jax.tree.map(lambda w: np.ones(w.shape, bool), PARAMS)
    with raises("params lacks ['a/kernel']"):
        curvature.eliminate(fisher, {"b": ones(3)}, masks)
    with raises("removed lacks ['a/kernel']"):
        curvature.eliminate(fisher, PARAMS, {"b": masks["b"]})
    with raises("(5, 6)"):
        curvature.restrict(fisher, {"a": {"kernel": ones((5, 6), bool)}})
    with pytest.raises((TypeError, ValueError), match="bool"):
        curvature.restrict(fisher, PARAMS)


def test_coefficients_for_another_number_of_gradients():
    with raises("coefficients", "4 gradients", "(3,)"):
        curvature.span_ihvp(KINDS["mfac"](), ones(3))


def test_what_only_a_block_fisher_can_do():
    for kind in ("mfac", "diagonal"):
        fisher = KINDS[kind]()
        name = type(fisher).__name__
        with raises("inverse_blocks", "block_fisher", name, error=TypeError):
            curvature.inverse_blocks(fisher)
        with raises("block_fisher", name, error=TypeError):
            curvature.group_scores(fisher, PARAMS)
        with raises("block_fisher", name, error=TypeError):
            curvature.greedy_scores(fisher, PARAMS)


def test_groups_that_do_not_fill_blocks():
    with raises("a/kernel: ", "groups of 3", "blocks of 4"):
        curvature.inverse_blocks(fisher_of(), size=3)
    with raises("size", "at least 1"):
        curvature.inverse_blocks(fisher_of(), size=0)


def test_a_parameter_without_curvature():
    curvature.check_covers(fisher_of(), "a/kernel")
    with raises("b: ", "where"):
        curvature.check_covers(fisher_of(), "b")


# Losses and batches.


@pytest.mark.parametrize("n", [0, 3])
def test_batches_that_are_none(n):
    for batch in ((), jnp.float32(1), {"x": ones((2, 6)), "y": ones(n)}):
        with raises("leading axis numbers the examples"):
            curvature.per_example_grads(loss, PARAMS, batch)


def test_an_empty_batch():
    with raises("empty batch", "m = 0"):
        curvature.per_example_grads(loss, PARAMS, ones((0, 6)))


@pytest.mark.parametrize(
    "bad",
    [
        lambda params, x: x @ params["a"]["kernel"],
        lambda params, x: (loss(params, x), x),
        lambda params, x: None,
    ],
    ids=["vector", "with aux", "none"],
)
def test_a_loss_that_is_no_scalar(bad):
    with raises("scalar", "mean over the batch"):
        curvature.per_example_grads(bad, PARAMS, ones((4, 6)))


def test_groups_that_do_not_divide_the_batch():
    with raises("average=3", "4 examples", "Leave 1"):
        curvature.per_example_grads(loss, PARAMS, ones((4, 6)), average=3)
    for options in ({"average": 0}, {"chunk": 0}):
        with raises("at least 1"):
            curvature.per_example_grads(loss, PARAMS, ones((4, 6)), **options)


def test_a_batch_whose_loss_is_nan():
    batch = ones_but((2, 0), np.nan)
    with raises("a/kernel: 1 of 4", "number 2"):
        curvature.per_example_grads(loss, PARAMS, batch)


def test_parameters_of_integers_that_where_selects():
    params = {"a": {"kernel": ones((6, 5), int)}}
    with raises("a/kernel: ", "int", "where", error=TypeError):
        curvature.per_example_grads(loss, params, ones((4, 6)), where="kernel")


def test_masks_of_another_model():
    with raises("masks", "structure"):
        curvature.per_example_grads(
            loss, PARAMS, ones((4, 6)), masks={"a": {"kernel": np.ones((), bool)}}
        )


def test_a_stream_with_fewer_gradients_than_were_asked_for():
    batches = [ones((4, 6))] * 2
    with raises("8 gradients", "asked for 9", "used up"):
        list(curvature.stream_grads(loss, PARAMS, batches, count=9))
    with raises("gave 0 gradients"):
        list(curvature.stream_grads(loss, PARAMS, []))
    with raises("0 gradients of 8 examples"):
        list(curvature.stream_grads(loss, PARAMS, batches, average=8))
    for options in ({"count": 0}, {"average": 0}):
        with raises("at least 1"):
            list(curvature.stream_grads(loss, PARAMS, batches, **options))
    with raises("gave 4 gradients", "asked for 5"):
        curvature.collect_grads(iter([GRADS]), count=5)
    with raises("count", "at least 1"):
        curvature.collect_grads(iter([GRADS]), count=0)
