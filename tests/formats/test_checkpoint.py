"""Packed parameters are saved and restored like any others, in fewer bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse as js
from jaxsparse import formats


def packed_model(dtype):
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.standard_normal((128, 128)), dtype),
        "b": jnp.asarray(rng.standard_normal((128, 128)), dtype),
        "bias": jnp.ones(128, dtype),
    }
    axes = js.Axes((0,), (1,))
    masks = js.patterns.masks(params, 0.9, axes=axes)
    format = {"a": formats.Bitmap, "b": formats.Csr16}
    return formats.pack(params, masks, format=format, axes=axes)


def test_a_packed_model_and_its_optimizer_come_back(tmp_path):
    packed = packed_model("bfloat16")
    tx = optax.adam(1e-3)
    state = tx.init(formats.values(packed))
    js.checkpoint.save(tmp_path, step=3, params=packed, opt_state=state)
    shapes = jax.eval_shape(lambda: packed)
    back = js.checkpoint.restore(tmp_path, params=shapes, opt_state=state)
    assert isinstance(back.params["a"], formats.Bitmap)
    assert back.params["a"].view == packed["a"].view
    jax.tree.map(np.testing.assert_array_equal, back.params, packed)
    jax.tree.map(np.testing.assert_array_equal, back.opt_state, state)


def test_moments_are_as_small_as_what_is_kept():
    packed = packed_model("float32")
    state = optax.adam(1e-3).init(formats.values(packed))
    moments = sum(x.nbytes for x in jax.tree.leaves(state))
    assert moments < 0.11 * 2 * 4 * (2 * 128 * 128 + 128) + 8 * 128


def test_the_table_of_bytes():
    params = {"up": jnp.ones((64, 64)), "down": jnp.ones((64, 8))}
    axes = js.Axes((0,), (1,))
    tiles = js.prune({"up": params["up"]}, 0.75, pattern=js.Block((16, 16)), axes=axes)
    masks = {"up": tiles.masks["up"], "down": jnp.ones((64, 8), bool)}
    sizes = formats.sizes(params, masks, axes=axes)
    assert next(iter(sizes["up"])) == "dense"
    assert sizes["up"]["dense"] == 4 * 64 * 64
    table = js.report.format_table(sizes)
    lines = table.splitlines()
    assert lines[1].split()[0] == "down"
    assert lines[2].startswith("up")
    assert "Block" in lines[2]
    packed = formats.pack(params, masks, axes=axes)
    taken = sum(x.nbytes for x in jax.tree.leaves(packed["up"]))
    rounds = sizes["up"].pop("Int8Tiles")  # never by itself, however small
    assert taken == min(sizes["up"].values()) > rounds
