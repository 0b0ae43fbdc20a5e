"""Which arrays share a program, and that they get the masks they would get alone."""

import jax
import jax.numpy as jnp
import numpy as np
from reference import selection

import jaxsparse as js
from jaxsparse.patterns import _rows

SHAPES = [(256, 260), (259, 257), (300, 260), (280, 270)]  # too large for one matrix


def kernels(*shapes):
    rng = np.random.default_rng(0)
    few = lambda shape: np.round(4 * rng.standard_normal(shape)).astype(np.float32)
    return {f"l{i}": {"kernel": jnp.asarray(few(s))} for i, s in enumerate(shapes)}


def test_one_program_searches_larger_arrays_in_turn():
    params = kernels(*SHAPES)
    params["l0"]["kernel"] *= 0  # all tied
    sparsity = {"l0": 0.5, "l1": 0.9, "l2": 0.999, "l3": 0.5}
    found = js.patterns.masks(jax.tree.map(jnp.abs, params), sparsity)
    for name, s in sparsity.items():
        scores = np.abs(params[name]["kernel"])
        expected = selection.mask(scores, s, js.Unstructured())
        np.testing.assert_array_equal(found[name]["kernel"], expected)


def test_arrays_of_different_shapes_share_a_program_without_jit_alone():
    arrays = jax.tree.leaves(kernels(*SHAPES))
    assert _rows.together(arrays, arrays) == [[0, 1, 2, 3]]
    shared = []
    jax.jit(lambda xs: shared.extend(_rows.together(xs, xs)))(arrays)
    assert all(len(group) < len(SHAPES) for group in shared)


def test_arrays_of_one_shape_have_a_program_by_themselves():
    arrays = jax.tree.leaves(kernels(*[(256, 260)] * 3))
    assert _rows.together(arrays, arrays) == []
    arrays = jax.tree.leaves(kernels(*[(8, 9)] * 3))
    assert _rows.together(arrays, arrays) == [[0, 1, 2]]
