"""What first mistakes get: the wrong tree, the wrong place, the wrong order.

Each was a raw error of JAX before, or passed without a word.
"""

import re
import warnings
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxsparse as js

PARAMS = {"a": {"kernel": np.arange(16.0, dtype=np.float32).reshape(4, 4) + 1}}
MASKS = {"a": {"kernel": np.eye(4, dtype=bool)}}
X = np.ones((3, 4), np.float32)
ROOT = {"kernel": PARAMS["a"]["kernel"]}


def apply_fn(params, x):
    return x @ params["a"]["kernel"]


def train_state():
    """As it is after a jitted step: all of it but functions are arrays."""
    made = TrainState.create(apply_fn=apply_fn, params=PARAMS, tx=optax.sgd(0.1, 0.9))
    return made.replace(step=np.int32(1))


def optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    return nnx.Optimizer(model, optax.sgd(0.1, 0.9), wrt=nnx.Param)


PRUNED = js.oneshot.Pruned(PARAMS, MASKS)


class Own(NamedTuple):
    """A tree of someone's own with such a name in it."""

    params: dict
    head: np.ndarray


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        (train_state, "TrainState holds the state of an optimizer.*state.params"),
        (optimizer, "Optimizer holds the state of an optimizer.*nnx.state"),
        (lambda: PRUNED, r"Pruned holds parameters and masks.*\.params"),
    ],
    ids=["TrainState", "nnx.Optimizer", "Pruned"],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda tree: js.prune(tree, 0.5),
        js.scores.magnitude,
        js.report.table,
        lambda tree: js.allocations.erk(tree, 0.5),
        lambda tree: js.prune_schedule(0.5, every=1).init(tree),
        lambda tree: js.trace(lambda tree, x: x, tree, X),
    ],
    ids=["prune", "magnitude", "table", "erk", "init", "trace"],
)
def test_moments_and_masks_are_not_taken_for_parameters(whole, part, use):
    with pytest.raises(TypeError, match=f"params: {part}"):
        use(whole())


def test_a_tree_of_ones_own_may_have_a_part_named_params():
    masks = js.prune(Own(PARAMS, ROOT["kernel"]), 0.5, where="kernel").masks
    assert int(masks.params["a"]["kernel"].sum()) == 8


@pytest.mark.parametrize(
    "use",
    [
        lambda masks: js.patterns.apply(PARAMS, masks),
        js.keep_sparse,
        lambda masks: js.report.table(PARAMS, masks),
        lambda masks: js.prune(PARAMS, 0.9, masks=masks),
    ],
    ids=["apply", "keep_sparse", "table", "prune"],
)
def test_masks_are_told_from_what_holds_them(use):
    with pytest.raises(TypeError, match=r"masks: Pruned holds .* Pass one .*\.masks"):
        use(PRUNED)


def test_a_donated_parameter_is_named():
    gone = jnp.ones((4, 4))
    gone.delete()
    for use in (js.scores.magnitude, lambda p: js.prune(p, 0.5)):
        with pytest.raises(ValueError, match=r"a/kernel: .* deleted.*donate_argnums"):
            use({"a": {"kernel": gone}})


def test_no_parameters_at_all():
    with pytest.raises(TypeError, match="params: expected a tree of arrays"):
        js.prune({}, 0.5)


def test_a_function_is_no_tree_of_gradients():
    with pytest.raises(TypeError, match="grads must be a tree of arrays, got the func"):
        js.scores.taylor(PARAMS, apply_fn)


def test_an_exported_file_comes_first():
    with pytest.raises(TypeError, match=re.escape("order is export(path, params)")):
        js.checkpoint.export(PARAMS, "model.npz")


TRANSFORMS = {
    "enforce": lambda: js.prune_schedule(0.5, every=1).wrap(optax.sgd(0.1)),
    "literal": lambda: js.prune_schedule(0.5, every=1),
    "keep_sparse": lambda: js.keep_sparse(MASKS),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_update_of_state_and_parameters_in_the_wrong_order(name):
    tx = TRANSFORMS[name]()
    with pytest.raises(TypeError, match=re.escape("tx.update(updates, state, params)")):
        tx.update(PARAMS, PARAMS, tx.init(PARAMS))


def test_a_state_of_other_parameters_is_named_in_the_update():
    tx = TRANSFORMS["enforce"]()
    state = tx.init({"params": PARAMS})
    with pytest.raises(ValueError, match="not in params 'params/a/kernel'"):
        tx.update(PARAMS, state, PARAMS)


def test_a_leaf_that_is_no_array_is_named_before_the_optimizer_fails_on_it():
    tx = TRANSFORMS["enforce"]()
    with pytest.raises(TypeError, match="activation: params must hold arrays"):
        tx.init({**PARAMS, "activation": jax.nn.relu})


class Variable:
    """Converts to an array, as a variable of Keras, and is none."""

    shape, dtype = (2, 2), np.dtype(np.float32)

    def __jax_array__(self):
        return jnp.ones(self.shape)


def test_a_variable_is_not_an_array_and_the_error_says_how_to_get_one():
    with pytest.raises(TypeError, match=r"0: params must hold .*v\.value for v in"):
        js.prune([Variable()], 0.5)


def init_and_assert(params):
    js.assert_sparse(TRANSFORMS["enforce"]().init(params), params)


def greedy(params):
    trace = js.trace(apply_fn, PARAMS, X)
    stats = js.calibration.run(trace, PARAMS, [X])
    groups = js.coupling.groups(trace)
    return js.channels.obs_greedy(groups, params, stats, 0.5)


UNDER_JIT = {
    "obs_greedy": greedy,
    "layerwise": lambda p: js.oneshot.layerwise(apply_fn, p, [X], sparsity=0.5),
    "assert_sparse": init_and_assert,
    "sparsity_of": lambda p: js.patterns.sparsity_of(js.prune(p, 0.5).masks, p),
    "owl": lambda p: js.allocations.owl(p, 0.5),
    "dsa": lambda p: js.allocations.dsa(p, 0.5),
    "from_global_scores": lambda p: js.allocations.from_global_scores(p, 0.5),
}


@pytest.mark.parametrize("name", UNDER_JIT)
def test_what_reads_values_says_so_under_jit(name):
    with pytest.raises(TypeError, match=r"is traced, and .* outside of jit"):
        jax.eval_shape(UNDER_JIT[name], PARAMS)


def test_a_batch_under_jit_is_named_too():
    run = lambda x: js.oneshot.layerwise(apply_fn, PARAMS, [x], sparsity=0.5)
    with pytest.raises(TypeError, match="batches is traced"):
        jax.eval_shape(run, X)


def test_a_gram_that_a_jitted_function_closes_over_is_looked_at_no_more_than_a_tracer():
    gram = np.eye(4, dtype=np.float32)
    solve = lambda w: js.solvers.sparsegpt(w, gram, 0.5).mask
    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert jax.eval_shape(solve, shape).shape == (4, 4)


def test_channels_of_a_layer_with_outputs_first_are_not_its_inputs_without_a_word():
    linear = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    stated = {"kernel": js.Axes(input=(1,), output=(0,))}
    with pytest.warns(
        UserWarning, match=r"weight: .*output channels.*Channel\(axis=0\)"
    ):
        masks = js.prune(linear, 0.5, pattern=js.Channel()).masks
    assert masks.weight.shape == (1, 4)
    with pytest.warns(UserWarning, match=r"kernel: the last axis, of which"):
        js.prune(ROOT, 0.5, pattern=js.Channel(), axes=stated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert js.prune(linear, 0.5, pattern=js.Channel(0)).masks.weight.shape == (3, 1)
        js.prune(linear, 0.5, pattern=js.Channel(1))
        js.prune(ROOT, 0.5, pattern=js.Channel())


class Unbound(Exception):
    """As libraries of modules have their own."""


def test_an_error_of_another_library_keeps_its_kind_and_says_the_shapes():
    def unbound(params, x):
        raise Unbound("The module has no parameters yet.")

    with pytest.raises(Unbound, match="no parameters yet") as failed:
        js.trace(unbound, ROOT, X)
    said = "apply_fn fails on params: float32[4, 4]; inputs: float32[3, 4]."
    assert said in failed.value.__notes__
