"""Which parameters take part by default is decided by use where there is a trace."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxsparse as js


def ones(**shapes):
    return {name: jax.device_put(np.ones(s, np.float32)) for name, s in shapes.items()}


def taken(apply_fn, params, *inputs):
    trace = js.trace(apply_fn, params, *inputs)
    selected = js.tree.select(params, trace.where)
    return {path for path, take in js.tree.leaves_with_paths(selected) if take}


IDS = np.arange(6).reshape(2, 3)


def test_tied_embeddings_of_any_name_are_left():
    params = ones(stuff=(9, 4), up=(4, 4))

    def tied(p, ids):
        return p["stuff"][ids] @ p["up"] @ p["stuff"].T

    assert taken(tied, params, IDS) == {"up"}


def test_what_is_added_is_left():
    params = ones(first=(1, 1, 4), places=(1, 4, 4), up=(4, 4))

    def vit(p, x):
        first = jnp.broadcast_to(p["first"], (len(x), 1, 4))
        return (jnp.concatenate([first, x], 1) + p["places"]) @ p["up"]

    assert taken(vit, params, np.ones((2, 3, 4), np.float32)) == {"up"}


def test_a_kernel_is_taken_whatever_its_module_is_called():
    params = {name: ones(kernel=(4, 4)) for name in ("embedding", "norm", "shared")}

    def mlp(p, x):
        for name in ("embedding", "norm", "shared"):
            x = x @ p[name]["kernel"]
        return x

    x = np.ones((2, 4), np.float32)
    assert taken(mlp, params, x) == {f"{name}/kernel" for name in params}


def test_one_hot_lookups_and_lora_factors_are_left():
    params = ones(embedding=(9, 4), w=(4, 4), lora_a=(4, 2), lora_b=(2, 4))

    def lora(p, ids):
        x = jax.nn.one_hot(ids, 9) @ p["embedding"]
        return x @ p["w"] + x @ p["lora_a"] @ p["lora_b"]

    assert taken(lora, params, IDS) == {"w"}


def test_layerwise_and_calibration_go_by_it():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jax.device_put(rng.standard_normal(shape, np.float32))
    params = {"stuff": draw(9, 4), "embedding": {"kernel": draw(4, 4)}}

    def tied(p, ids):
        return p["stuff"][ids] @ p["embedding"]["kernel"] @ p["stuff"].T

    pruned = js.oneshot.layerwise(tied, params, [IDS], sparsity=0.5)
    assert list(pruned.info) == ["embedding/kernel"]
    assert jnp.array_equal(pruned.params["stuff"], params["stuff"])
    trace = js.trace(tied, params, IDS)
    stats = js.calibration.run(trace, params, [IDS])
    assert [path for path, *_ in stats.kernels] == ["embedding/kernel"]
