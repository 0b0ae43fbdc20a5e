"""What is wrong only later: in an update, a later batch, in what a function returns.

And what a jitted caller gets, where values cannot be looked at.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import calls

import jaxsparse as js
from jaxsparse import _checks

PARAMS = {"a": {"kernel": np.arange(16.0, dtype=np.float32).reshape(4, 4) + 1}}
ROWS = np.ones((3, 4), np.float32)


def apply_fn(params, x):
    return x @ params["a"]["kernel"]


def with_leaf(value):
    return {"a": {"kernel": value}}


def update(tx, grads):
    return tx.update(grads, tx.init(PARAMS), PARAMS)


TRANSFORMS = {
    "enforce": lambda: js.prune_schedule(0.5, every=js.schedules.at(3)).wrap(
        optax.sgd(0.1)
    ),
    "literal": lambda: js.prune_schedule(0.5, every=js.schedules.at(3)),
    "keep_sparse": lambda: js.keep_sparse(with_leaf(np.ones((4, 4), bool))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    ("grads", "message"),
    [
        (with_leaf(ROWS), r"a/kernel: updates has the shape \(3, 4\), .* \(4, 4\)"),
        (PARAMS["a"], "updates must have exactly the structure of params"),
        (with_leaf([1.0, 2.0]), "a/kernel/0: updates must hold arrays; got 1.0"),
    ],
    ids=["shape", "structure", "list"],
)
def test_gradients_of_another_model_are_named_in_the_update(name, grads, message):
    with pytest.raises((TypeError, ValueError), match=message):
        update(TRANSFORMS[name](), grads)


SCORES = {
    "scalars": lambda params: jax.tree.map(jnp.sum, params),
    "another tree": lambda params: params["a"],
    "numbers": lambda params: with_leaf(1.0),
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize(
    "use",
    [
        lambda score: js.prune(PARAMS, 0.5, score=score),
        lambda score: js.straight_through(PARAMS, 0.5, score=score),
        lambda score: js.prune_schedule(0.5, every=1, score=score).init(PARAMS),
        lambda score: update(
            js.prune_schedule(0.5, every=1, score=lambda p, g: score(p)), PARAMS
        ),
    ],
    ids=["prune", "straight_through", "init", "update"],
)
def test_a_score_of_another_kind_is_blamed_and_not_the_masks(use, score):
    with pytest.raises((TypeError, ValueError), match="scores"):
        use(score)


BATCHES = {
    "an array": (ROWS, r"got an array of shape \(3, 4\).* batches=\[x\]"),
    "a width": ([ROWS, ROWS[:, :2]], r"apply_fn fails on .*inputs: float32\[3, 2\]"),
    "a list": ([ROWS, [[1.0]]], r"batches\[1\] must hold arrays"),
    "no rows": ([ROWS, ROWS[:0]], "batch 1 is empty"),
}


@pytest.mark.parametrize(("batches", "message"), BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    "driver",
    [
        lambda batches: js.oneshot.layerwise(apply_fn, PARAMS, batches, sparsity=0.5),
        lambda batches: js.calibration.run(
            js.trace(apply_fn, PARAMS, ROWS), PARAMS, batches
        ),
    ],
    ids=["layerwise", "run"],
)
def test_a_batch_of_another_kind_is_named(driver, batches, message):
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        driver(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "sparsegpt"}, "solver must be a function, got 'sparsegpt'"),
        (
            {"solver": lambda w, g, s: w},
            "solver is called with 3 arguments and pattern",
        ),
        (
            {"solver": lambda w, g, s, pattern: w},
            "solver must return js.solvers.Solved",
        ),
        ({"share": "factor_gram"}, "share must be a function"),
        ({"weight": 1.0}, "weight must be a function"),
        ({"weight": lambda x, y: x}, "weight is called with 1 argument"),
    ],
)
def test_a_function_that_layerwise_cannot_call_is_named(options, message):
    with pytest.raises(TypeError, match=message):
        js.oneshot.layerwise(apply_fn, PARAMS, [ROWS], sparsity=0.5, **options)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"dot_general": "ab,bc"}, "'ab,bc' is no equation such as"),
        ({"dot_general": "ab->bc->ac"}, "is no equation such as"),
        ({"dot_generl": "ab,bc->ac"}, r"no primitive of this model.*\['dot_general'"),
    ],
)
def test_rules_that_cannot_be_read_or_match_nothing_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        js.trace(apply_fn, PARAMS, ROWS, rules=rules)


@pytest.mark.parametrize("other", [jnp.float32, jnp.bfloat16])
def test_float8_competes_with_other_types(other):
    w = np.arange(16.0).reshape(4, 4) / 4  # of which e4m3 holds each
    params = {"a": jnp.asarray(w, jnp.float8_e4m3fn), "b": jnp.asarray(w + 8, other)}
    pattern = js.Unstructured("global")
    masks = js.prune(params, 0.5, pattern=pattern).masks
    assert (int(masks["a"].sum()), int(masks["b"].sum())) == (1, 15)
    found = js.allocations.from_global_scores(js.scores.magnitude(params), 0.5)
    assert found == {"a": 15 / 16, "b": 1 / 16}


@pytest.mark.parametrize(
    ("sparsity", "kept"), [(np.nan, 16), (-1.0, 16), (1.5, 1), (0.5, 8)]
)
def test_a_traced_sparsity_is_cut_to_its_range_as_documented(sparsity, kept):
    masks = jax.jit(js.patterns.masks)(PARAMS, jnp.float32(sparsity))
    assert int(masks["a"]["kernel"].sum()) == kept


def test_scores_that_are_constants_of_a_jitted_function_are_not_looked_at():
    masks = jax.jit(lambda s: js.patterns.masks(PARAMS, s))(jnp.float32(0.5))
    assert int(masks["a"]["kernel"].sum()) == 8
    js.patterns.check_masks(masks, PARAMS)
    nan = with_leaf(np.full((4, 4), np.nan, np.float32))
    assert jnp.isnan(
        jax.jit(lambda p: js.scores.taylor(p, nan))(PARAMS)["a"]["kernel"]
    ).all()


def test_what_is_wrong_in_a_tree_is_named_by_its_path():
    refused = functools.partial(pytest.raises, TypeError)
    with refused(match=r"a/0: params must hold arrays; got 1.0 .*jnp.asarray\(list\)"):
        js.prune({"a": [1.0, 2.0]}, 0.5)
    with refused(match=r"a: params .* got 2 of type int. Write jnp.asarray\(2\)"):
        js.prune({"a": 2}, 0.5)
    with refused(match=r"a: params .* abstract .* no values"):
        js.prune({"a": jax.ShapeDtypeStruct((2, 2), jnp.float32)}, 0.5)
    with refused(match=r"a/w: a mask holds bools.* Python bool True. Write jnp.array"):
        js.patterns.apply({"a": {"w": np.ones(2)}}, {"a": {"w": True}})
    with refused(match=re.escape("write js.Block((4, 4))")):
        js.Block(4)
    with refused(match=re.escape("key=jax.random.key(7)")):
        js.scores.random(PARAMS, key=7)
    with pytest.raises(ValueError, match=r"got 1\. All weights cannot go"):
        js.prune(PARAMS, 1)


def test_checks_do_no_work_under_jit_and_nothing_is_traced_twice():
    traced = []

    def score(params):
        traced.append(1)
        return js.scores.magnitude(params)

    tx = js.prune_schedule(0.5, every=2, score=score).wrap(optax.sgd(0.1))
    step = jax.jit(tx.update)
    params = calls.params()
    state = jax.jit(tx.init)(params)
    before = len(traced)
    for _ in range(3):
        _, state = step(params, state, params)
    assert step._cache_size() == 1
    assert len(traced) - before <= 4  # the two looks of `enforce`, and their shapes
    # Of shapes alone: no equation of the program is a check's.
    both = jax.make_jaxpr(lambda p: _checks.check_like(p, grads=p))(params)
    assert both.eqns == []
    assert (
        jax.make_jaxpr(lambda p: _checks.check_all_numbers(grads=p))(params).eqns == []
    )
