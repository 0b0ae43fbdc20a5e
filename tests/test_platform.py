"""What is tuned for CPU is lowered for CPU alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import _platform
from jaxsparse.linalg import chunks
from jaxsparse.linalg.factor import matmul
from jaxsparse.linalg.gram import factor_gram
from jaxsparse.patterns import masks

MATRIX = jax.ShapeDtypeStruct((600, 600), jnp.float32)


def lowered(f, *shapes, platform):
    """The text of a program that need not be compiled, so that no device is needed."""
    traced = jax.jit(f).trace(*shapes)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def count_some(x):
    return masks({"w": x}, 0.5)["w"]


def add_in_parts(x):
    add = lambda start, size, total: total + jnp.sum(chunks.cut(x, start, size))
    return chunks.in_parts(len(x), 200, add, jnp.zeros(()))


def factor(gram):
    return factor_gram(gram, damping=0.1).root


@pytest.mark.parametrize(
    ("f", "tuned"),
    [
        (count_some, "dynamic_slice"),  # a row of what is counted
        (add_in_parts, "optimization_barrier %c"),  # which hides how many turns
        (factor, "stablehlo.scatter"),  # which puts a slab in its place
    ],
    ids=["counting", "parts", "slabs"],
)
def test_accelerators_get_the_plain_call(f, tuned):
    text = {p: lowered(f, MATRIX, platform=p) for p in ("cpu", "tpu")}
    assert tuned in text["cpu"]
    assert tuned not in text["tpu"]


def test_the_slabs_of_a_factor_are_the_factor():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 900))
    gram = jnp.asarray(x @ x.T / 900, jnp.float32)
    root = factor(gram)
    want = gram + 0.1 * jnp.eye(600)
    np.testing.assert_allclose(matmul(root, root.T), want, atol=2e-5)


def test_sizes_are_those_of_the_device_that_jax_would_take():
    assert _platform.size(cpu=1, other=2) == (
        1 if jax.default_backend() == "cpu" else 2
    )
    for device in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(device):
            assert _platform.size(cpu=1, other=2) == 1
    with jax.default_device("tpu"):
        assert _platform.size(cpu=1, other=2) == 2
