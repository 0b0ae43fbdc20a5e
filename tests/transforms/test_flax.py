"""TrainState and nnx.Optimizer, unchanged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxsparse as js

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def prune(**options):
    return js.prune_schedule(
        js.schedules.polynomial(final=0.75, begin=2, end=12),
        every=js.schedules.every(2, begin=2, end=12),
        **options,
    )


def data():
    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    return x, np.sum(x[:, :4], axis=-1, keepdims=True)


def test_train_state_trains_sparse():
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(1)])
    x, y = data()
    start = jax.jit(model.init)(jax.random.key(1), x)
    state = TrainState.create(
        apply_fn=model.apply,
        params=start,
        tx=js.enforce(optax.chain(prune(where="kernel$"), optax.adam(1e-2))),
    )

    @jax.jit
    def step(state):
        loss = lambda p: jnp.mean((state.apply_fn(p, x) - y) ** 2)
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(60):
        state, value = step(state)
        losses.append(float(value))
    masks = js.masks_of(state.opt_state)
    kernel = np.asarray(state.params["params"]["layers_0"]["kernel"])
    assert (
        np.sum(kernel == 0)
        == np.sum(~np.asarray(masks["params"]["layers_0"]["kernel"]))
        == 384
    )
    assert losses[-1] < losses[0]
    js.assert_sparse(state.opt_state, state.params)
    dense = TrainState.create(apply_fn=model.apply, params=start, tx=optax.adam(1e-2))
    before = step._cache_size()
    for _ in range(3):
        dense, _ = step(dense)
    # Not once more than for a dense optimizer (whose first step is a Python int).
    assert before == step._cache_size() - before


@pytest.mark.parametrize("where", [None, r"kernel$"])
def test_nnx_optimizer_trains_sparse(where):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(16, 32, rngs=rngs)
            self.second = nnx.Linear(32, 1, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    x, y = data()
    model = Model(nnx.Rngs(0))
    tx = prune(where=where).wrap(optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(x) - y) ** 2)
        grads = nnx.grad(loss)(model)
        optimizer.update(model, grads)

    for _ in range(40):
        step(model, optimizer)
    kernel = np.asarray(model.first.kernel[...])
    assert np.sum(kernel == 0) == 384
    masks = js.masks_of(optimizer.opt_state)
    np.testing.assert_array_equal(np.asarray(masks["first"]["kernel"]), kernel != 0)
    js.assert_sparse(optimizer.opt_state, nnx.state(model, nnx.Param))


def test_prune_takes_an_nnx_state():
    model = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
    pruned = js.prune(nnx.state(model, nnx.Param), 0.5)
    nnx.update(model, pruned.params)
    assert np.sum(np.asarray(model.kernel[...]) == 0) == 256
