"""Optimizer states are cut along, and training goes on as that of the masked model."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from zoo.models import array, loosely

import jaxsparse as js

X = array(16, 3)
Y = array(16, 2, seed=4)
DROP = {"a[1]": [1, 4, 5]}
PARAMS = {"a": np.asarray(array(3, 8)), "b": np.asarray(array(8, 2, seed=1))}


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


TRACE = js.trace(apply_fn, PARAMS, X)
CHAINS = {
    "adamw": optax.adamw(1e-2),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    "masked": optax.masked(optax.adam(1e-2), {"a": True, "b": False}),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "steps": optax.MultiSteps(optax.adam(1e-2), 2),
}


@pytest.mark.parametrize("name", CHAINS)
def test_training_goes_on_as_that_of_the_masked_model(name):
    tx = CHAINS[name]
    masks = js.narrowing.drop_masks(TRACE, DROP)
    params = js.patterns.apply(PARAMS, masks)
    small = js.narrowing.narrow(TRACE, params, DROP)

    @functools.partial(jax.jit, static_argnums=0)
    @loosely
    def step(apply, params, state):
        loss = lambda p: jnp.mean((apply(p, X) - Y) ** 2)
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(3):
        params, state = step(apply_fn, params, state)
        # tanh(0) = 0: gradients of masked channels vanish, up to decay of zeros.
    little = js.narrowing.narrow_like(TRACE, params, DROP)
    own = js.narrowing.narrow_like(TRACE, state, DROP)
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shapes(own) == shapes(jax.eval_shape(tx.init, little))
    for _ in range(2):
        params, state = step(apply_fn, params, state)
        little, own = step(small.apply_fn, little, own)
    cut = js.narrowing.narrow_like(TRACE, params, DROP)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), little, cut)


def test_masks_that_broadcast_and_states_of_pruning():
    schedule = js.prune_schedule(0.5, every=1, pattern=js.Channel(axis=1))
    tx = js.enforce(optax.chain(schedule, optax.adam(1e-2)))
    state = jax.jit(tx.init)(PARAMS)
    cut = js.narrowing.narrow_like(TRACE, state, DROP)
    shapes = [m.shape for m in jax.tree.leaves(js.masks_of(cut))]
    whole = [m.shape for m in jax.tree.leaves(js.masks_of(state))]
    smaller = {8: 5}
    assert shapes == [tuple(smaller.get(n, n) for n in s) for s in whole]
    assert shapes != whole


def test_train_states_and_nnx_optimizers():
    state = train_state.TrainState.create(
        apply_fn=apply_fn, params=PARAMS, tx=optax.adam(1e-2)
    )
    small = js.narrowing.narrow_like(TRACE, state, DROP)
    assert small.params["a"].shape == small.opt_state[0].nu["a"].shape == (3, 5)
    assert small.step == 0

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(3, 8, rngs=rngs)
            self.down = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.down(nn.relu(self.up(x)))

    model = Model(nnx.Rngs(0))
    graph, params = nnx.split(model)
    trace = js.trace(lambda p, x: nnx.merge(graph, p)(x), params, X)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    whole = nnx.state(optimizer)
    cut = js.narrowing.narrow_like(trace, whole, {"up/kernel[1]": [0]})
    sizes = [x.shape for x in jax.tree.leaves(cut) if x.ndim]
    assert set(sizes) == {(3, 7), (7,), (7, 2), (2,)}


def test_a_factored_moment_is_an_error_that_names_it():
    ones = lambda *shape: np.ones(shape, np.float32)
    params = {"a": ones(130, 256), "b": ones(256, 2)}
    trace = js.trace(apply_fn, params, ones(1, 130))
    state = jax.jit(optax.adafactor(1e-2).init)(params)
    with pytest.raises(ValueError, match=r"v_row.*place of the parameter a of shape"):
        js.narrowing.narrow_like(trace, state, {"a[1]": [0]})
