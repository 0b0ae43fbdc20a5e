"""What rounding may change: next to nothing of a mask that many iterations choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

LAYERS, D_OUT, D_IN = 24, 32, 64


def layers():
    """Kernels and gram matrices of inputs whose scales fall off, as those of models."""
    kernels, grams = [], []
    for seed in range(LAYERS):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=((512, 40)[seed % 2], D_IN))
        mix = rng.normal(size=(D_IN, D_IN)) / np.arange(1.0, D_IN + 1)[:, None]
        grams.append((x @ mix).T @ (x @ mix) / len(x))
        kernels.append(rng.normal(size=(D_OUT, D_IN)))
    return np.float32(kernels), np.float32(grams)


@pytest.mark.parametrize(
    "solve",
    [js.solvers.admm, pytest.param(js.solvers.alps, marks=pytest.mark.exhaustive)],
)
def test_masks_are_those_of_another_rounding(solve):
    """Of 49,152 weights no more than one in 8,000 is another: a few ties."""
    w, grams = layers()
    noise = np.random.default_rng(9).normal(size=grams.shape)
    noise = 1 + 1e-7 * (noise + noise.swapaxes(1, 2)) / 2
    given = {
        "as it is": grams,
        "scaled": grams * np.float32(1 + 1.2e-7),
        "noisy": (grams * noise).astype(np.float32),
    }
    run = jax.jit(jax.vmap(lambda w, gram: solve(w, gram, 0.5).mask))
    masks = {name: np.asarray(run(w, x)) for name, x in given.items()}
    with jax.enable_x64(True):
        exact = run(jnp.asarray(w, jnp.float64), jnp.asarray(grams, jnp.float64))
    for other in (masks["scaled"], masks["noisy"], np.asarray(exact)):
        assert np.mean(other != masks["as it is"]) <= 1 / 8_000
