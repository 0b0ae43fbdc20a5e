"""One training loop, for models that are functions, and what it remembers."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse as js

Tree = Any


class History:
    """What a plot shows of a training: steps, sparsities and losses."""

    def __init__(self, every: int):
        self.every = every
        self.found = {"step": [], "sparsity": [], "loss": []}

    def note(self, step: int, loss: jax.Array, kernels: Tree) -> None:
        """Remembers every so many steps the loss and the fraction of zeros."""
        if step % self.every == 0:
            self.found["step"].append(step)
            self.found["sparsity"].append(float(_zeros(kernels)))
            self.found["loss"].append(float(loss))


@jax.jit
def _zeros(kernels: Tree) -> jax.Array:
    kernels = [w for w in jax.tree.leaves(kernels) if w.ndim > 1]
    return sum(jnp.sum(w == 0) for w in kernels) / sum(w.size for w in kernels)


def batches(
    x: np.ndarray, y: np.ndarray, *, size: int = 64, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random rows, without end."""
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(0, len(x), size)
        yield x[rows], y[rows]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over a batch."""
    labels = jnp.asarray(labels, jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Trained(NamedTuple):
    """What a training leaves."""

    params: Tree
    state: Tree
    opt_state: optax.OptState


def trainer(
    loss_fn: Callable[[Tree, Tree, Any], tuple[jax.Array, Tree]],
    tx: optax.GradientTransformation,
) -> Callable[..., Trained]:
    """The usual loop, compiled once: it knows nothing of pruning.

    It is Python's, not `lax.scan`: on CPU, XLA's convolutions are far slower in a scan.

    Args:
      loss_fn: of parameters, state and batch: the loss, and the new state (running
        statistics, or None).
      tx: the optimizer.

    Returns:
      A function that trains.
    """

    @jax.jit
    def train_step(params, state, opt_state, batch):
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, state), grads = value_and_grad(params, state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, loss

    def train(
        params: Tree,
        data: Iterator,
        steps: int,
        *,
        state: Tree = None,
        opt_state: optax.OptState | None = None,
        name: str = "train",
        history: History | None = None,
    ) -> Trained:
        opt_state = jax.jit(tx.init)(params) if opt_state is None else opt_state
        bar = js.report.progress(range(steps), description=name)
        for step in bar:
            found = train_step(params, state, opt_state, next(data))
            params, state, opt_state, loss = found
            if history is not None:
                history.note(step, loss, params)
        return Trained(params, state, opt_state)

    return train
