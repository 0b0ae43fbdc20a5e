"""Residual branches of many kinds of models: names, sizes, and what is none."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo.models import ZOO
from zoo.networks import ResNet, llama, llama_params

import jaxsparse as js

blocks = js.depth.residual_blocks


@functools.cache
def traced(name):
    with jax.enable_x64(True):
        apply_fn, params, inputs = ZOO[name]()
        return js.trace(apply_fn, params, *inputs)


def sizes(trace, **options):
    return {b.name: b.parameters for b in blocks(trace, **options).values()}


ATTENTION = 12 * 12 * 4 + 12 * 4 + 2 * 12  # q, k, v, out, biases, a norm
HIDDEN = 2 * 12 * 16 + 16 + 12 + 2 * 12
LLAMA = {"q+kv+o": 12 * 16 + 12 * 16 + 16 * 12 + 12, "gate_up+down": 12 * 30 + 12}

EXPECTED = {
    "residual": {"Conv_1+Conv_2": 9 * 8 * 6 + 6 + 2 * 6 + 9 * 6 * 8 + 8 + 2 * 8},
    "rope_halves": {f"layers/{i}/{k}": n for i in (0, 1) for k, n in LLAMA.items()},
    "vit": {
        f"Encoder_{i}/{k}": n
        for i in (0, 1)
        for k, n in (
            ("MultiHeadDotProductAttention_0", ATTENTION),
            ("Dense_1+Dense_0", HIDDEN),
        )
    },
    "scan": {
        f"ScanEncoder_0/{k}[{i}]": n
        for i in range(4)
        for k, n in (
            ("MultiHeadDotProductAttention_0", ATTENTION),
            ("Dense_1+Dense_0", HIDDEN),
        )
    },
    "moe": {"router+gate+up+down": 8 * 4 + 3 * 4 * 8 * 10},
    "nnx": {"attention": 4 * 12 * 12 + 4 * 12},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_names_and_parameters(name):
    found = sizes(traced(name))
    assert found == EXPECTED[name]
    assert list(found) == list(EXPECTED[name])


@pytest.mark.parametrize(
    "name",
    ["mlp", "depthwise", "squeeze_excite", "dense_concat", "lora", "lstm", "gru"],
)
def test_models_without_branches_say_what_is_looked_for(name):
    with pytest.raises(ValueError, match=r"no residual branches.* x \+ y of two"):
        blocks(traced(name))


def test_a_block_says_where_and_what_it_is():
    block = blocks(traced("scan"))["ScanEncoder_0/Dense_1+Dense_0[2]"]
    assert "models.py" in block.source
    assert "ScanEncoder_0/LayerNorm_1/scale[2]" in block.paths
    assert [a.turns for a in block.additions] == [(2,)]
    assert hash(block) is not None


def of_linen(model):
    inputs = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    rest = {k: v for k, v in variables.items() if k != "params"}
    rest = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), rest)
    apply_fn = lambda params, x: model.apply({"params": params, **rest}, x)
    return js.trace(apply_fn, variables["params"], inputs)


def test_stages_that_change_the_shape_keep_their_first_block():
    # Three of the eight blocks of ResNet-18 have a convolution in their shortcut.
    trace = of_linen(ResNet())
    stages = [(i // 2, 64 * 2 ** (i // 2)) for i in (0, 1, 3, 5, 7)]
    expected = [2 * 9 * width**2 + 4 * width for _, width in stages]
    assert list(sizes(trace).values()) == expected
    assert list(sizes(trace)) == [f"Residual_{i}" for i in (0, 1, 3, 5, 7)]


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize(
    "layers",
    [6, pytest.param(32, marks=pytest.mark.exhaustive)],  # more of the same
)
def test_a_model_of_many_layers(layers):
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    found = blocks(js.trace(llama, llama_params(layers), tokens))
    last = layers - 1
    assert list(found)[2 * last :] == [
        f"layers/{last}/wq+wk+wv+wo",
        f"layers/{last}/w1+w3+w2",
    ]
    d, kv, hidden = 4096, 1024, 14336
    attention, feed_forward = 2 * d * (d + kv) + d, 3 * d * hidden + d
    assert [b.parameters for b in found.values()] == layers * [attention, feed_forward]


D = 6


def weights(*names, **shapes):
    shapes = {**dict.fromkeys(names, (D, D)), **shapes}
    return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}


def found_in(apply_fn, params, x=None):
    x = jax.ShapeDtypeStruct((2, 3, D), jnp.float32) if x is None else x
    return blocks(js.trace(apply_fn, params, x))


def test_branches_side_by_side_are_two():
    def apply_fn(p, x):
        return x + nn.relu(x @ p["attn"]) + nn.relu(x @ p["mlp"])

    assert list(found_in(apply_fn, weights("attn", "mlp"))) == ["attn", "mlp"]


def test_branches_that_are_summed_first_are_one():
    def apply_fn(p, x):
        return (nn.relu(x @ p["attn"]) + nn.relu(x @ p["mlp"])) + x

    assert list(found_in(apply_fn, weights("attn", "mlp"))) == ["attn+mlp"]


@pytest.mark.parametrize("scaled", [False, True])
def test_norms_after_the_sum_and_scaled_streams(scaled):
    def apply_fn(p, x):
        for name in ("a", "b"):
            y = nn.tanh(x @ p[name])
            x = (0.7 * x if scaled else x) + y
            x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x

    assert list(found_in(apply_fn, weights("a", "b"))) == ["a", "b"]


def test_a_stream_in_float32_and_branches_in_bfloat16():
    def apply_fn(p, x):
        for name in ("a", "b"):
            y = x.astype(jnp.bfloat16) @ p[name].astype(jnp.bfloat16)
            x = (x.astype(jnp.bfloat16) + y).astype(jnp.float32)
        return x

    assert list(found_in(apply_fn, weights("a", "b"))) == ["a", "b"]


def test_activations_after_a_sum_are_no_branches():
    def apply_fn(p, x):
        x = x + x @ p["a"]
        x = x + 0.04 * x**3  # depends on what was before the sum by a contraction
        return 0.5 * x + 0.5 * jnp.tanh(x)

    assert list(found_in(apply_fn, weights("a"))) == ["a"]


def test_low_rank_additions_are_none():
    def apply_fn(p, x):
        y = x @ p["w"] + (x @ p["a"]) @ p["b"]
        return x + jnp.tanh(y)

    shapes = {"a": (D, 2), "b": (2, D)}
    assert list(found_in(apply_fn, weights("w", **shapes))) == ["w+a+b"]


def test_branches_within_branches():
    def apply_fn(p, x):
        y = x @ p["attn"]["w"]
        return x + (y + nn.relu(y @ p["adapter"]["down"]) @ p["adapter"]["up"])

    adapter = weights(down=(D, 2), up=(2, D))
    found = found_in(apply_fn, {"attn": weights("w"), "adapter": adapter})
    inner, outer = found.values()
    assert inner.name == "adapter"
    assert inner.paths == ("adapter/down", "adapter/up")
    assert set(outer.paths) == {"attn/w", *inner.paths}


def test_tied_blocks_have_no_parameters_of_their_own():
    def apply_fn(p, x):
        for _ in range(2):
            x = x + jnp.tanh(x @ p["w"])
        return x

    found = found_in(apply_fn, weights("w"))
    assert list(found) == ["w", "w#2"]
    assert [b.parameters for b in found.values()] == [0, 0]


def test_loops_within_loops_and_stacks_along_another_axis():
    def inner(x, w):
        return x + jnp.tanh(x @ w), None

    def outer(x, ws):
        return jax.lax.scan(inner, x, ws)

    def apply_fn(p, x):
        x, _ = jax.lax.scan(outer, x, p["w"])
        stack = jnp.moveaxis(p["v"], 1, 0).astype(jnp.float32)
        return jax.lax.scan(inner, x, stack, reverse=True)[0]

    found = found_in(apply_fn, weights(w=(2, 3, D, D), v=(D, 2, D)))
    assert list(found) == [
        *(f"w[{i},{j}]" for i in range(2) for j in range(3)),
        "v[1]",
        "v[0]",
    ]
    assert {b.parameters for b in found.values()} == {D * D}
    assert found["w[1,2]"].paths == ("w[1,2]",)


def test_loops_over_time_stay_loops():
    def step(h, x):
        h = jnp.tanh(h @ PLACE["w"] + x)
        return h + jnp.tanh(h @ PLACE["w"]), h

    PLACE = {}

    def apply_fn(p, x):
        PLACE["w"] = p["w"]
        y = x @ p["in"]
        _, ys = jax.lax.scan(step, y[:, 0], jnp.moveaxis(y, 1, 0))
        return x + jnp.moveaxis(ys, 0, 1)

    assert list(found_in(apply_fn, weights("in", "w"))) == ["in+w"]


def test_joined_blocks():
    whole = blocks(traced("rope_halves"), join=lambda b: b.name.split("/")[1])
    assert {b.name: b.parameters for b in whole.values()} == {
        "layers/0": sum(LLAMA.values()),
        "layers/1": sum(LLAMA.values()),
    }
    assert [len(b.additions) for b in whole.values()] == [2, 2]
    turns = blocks(traced("scan"), join=lambda b: b.additions[0].turns[0] // 2)
    assert list(turns) == ["ScanEncoder_0[0..1]", "ScanEncoder_0[2..3]"]
    plain = blocks(traced("scan"), join=lambda b: None)
    assert plain == blocks(traced("scan"))


def test_other_axes_of_a_sum_must_agree():
    def apply_fn(p, x):
        pooled = (x @ p["w"]).mean(1, keepdims=True)
        return x + jnp.broadcast_to(pooled, x.shape)

    found = found_in(apply_fn, weights("w"))
    assert np.array_equal([b.parameters for b in found.values()], [D * D])
