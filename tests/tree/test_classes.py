"""Equinox's modules: their classes say where inputs are and what is no kernel."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js


class Net(eqx.Module):
    words: eqx.nn.Embedding
    up: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    back: eqx.nn.ConvTranspose1d
    cell: eqx.nn.GRUCell
    stack: eqx.nn.Linear
    norm: eqx.nn.LayerNorm


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(make, jax.random.key(0))
    return jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)


def make(key):
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 8, key=key))
    return Net(
        words=eqx.nn.Embedding(9, 4, key=key),
        up=eqx.nn.Linear(4, 8, key=key),
        conv=eqx.nn.Conv2d(4, 6, 3, groups=2, key=key),
        back=eqx.nn.ConvTranspose1d(4, 6, 3, key=key),
        cell=eqx.nn.GRUCell(4, 8, key=key),
        stack=stack(jax.random.split(key, 3)),
        norm=eqx.nn.LayerNorm((2, 4)),
    )


def test_weights_are_outputs_first_behind_stacked_axes(params):
    assert js.tree.resolve_axes(params, None) == {
        "up/weight": js.Axes((1,), (0,)),
        "conv/weight": js.Axes((1, 2, 3), (0,)),
        "back/weight": js.Axes((1, 2), (0,)),
        "cell/weight_ih": js.Axes((1,), (0,)),
        "cell/weight_hh": js.Axes((1,), (0,)),
        "stack/weight": js.Axes((2,), (1,), (0,)),
    }


def test_what_is_stated_comes_first(params):
    stated = {"^up/weight": js.Axes((0,), (1,))}
    assert js.tree.resolve_axes(params, stated)["up/weight"] == js.Axes((0,), (1,))


def test_embeddings_and_norms_are_left_whatever_they_are_called(params):
    selected = dict(js.tree.leaves_with_paths(js.tree.select(params)))
    kernels = {*js.tree.resolve_axes(params, None)}
    assert {path for path, take in selected.items() if take} == kernels


def test_groups_of_four_lie_along_their_inputs_without_a_word():
    linear = eqx.nn.Linear(8, 4, key=jax.random.key(0))
    params = eqx.filter(linear, eqx.is_array)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = js.prune(params, pattern=js.NM(2, 4)).masks
    assert jnp.all(masks.weight.reshape(4, 2, 4).sum(-1) == 2)


def test_what_nobody_states_is_said():
    params = {"kernel": np.arange(32, dtype=np.float32).reshape(4, 8)}
    with pytest.warns(UserWarning, match=r"No axes are stated .* axes=trace.axes"):
        js.prune(params, pattern=js.NM(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        js.prune(params, 0.5)
        stated = js.prune(params, pattern=js.NM(2, 4), axes=js.Axes((1,), (0,)))
        trace = js.trace(lambda p, x: x @ p["kernel"].T, params, np.ones((3, 8), "f"))
        traced = js.prune(params, pattern=js.NM(2, 4), trace=trace)
    assert jnp.array_equal(stated.masks["kernel"], traced.masks["kernel"])
