"""Groups of many kinds of models: sizes, members, flags, copies, reasons."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo.models import ZOO, array, loosely
from zoo.networks import DenseNet, MobileNet, ResNet, ViT, llama, llama_params

import jaxsparse as js

IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


@functools.cache
def traced(name):
    with jax.enable_x64(True):
        apply_fn, params, inputs = ZOO[name]()
        return js.trace(apply_fn, params, *inputs)


def kinds(name, **options):
    """How many prunable groups there are of each size and number of copies."""
    found = js.coupling.groups(traced(name), **options).prunable.values()
    return collections.Counter((g.size, g.copies) for g in found)


# Sizes and copies of all that may be pruned, by hand from how the models are written.
EXPECTED = {
    "mlp": {(16, ()): 1, (12, ()): 1},
    "residual": {(8, ()): 1, (12, ()): 1, (6, ()): 2},
    # Ten channels: four zeros before those of the shortcut, and two after them.
    "padded": {(4, ()): 2, (2, ()): 1, (6, ()): 1},
    # The second depthwise convolution has two outputs for each channel.
    "depthwise": {(6, ()): 1, (2, (6,)): 1, (8, ()): 1},
    # 16 channels normalised in 4 and convolved in 8 groups: 4 x 2 x 2, and 3 outputs.
    "grouped": {(4, ()): 1, (2, (4,)): 1, (2, (4, 2)): 1, (3, (4, 2)): 1},
    "dense_concat": {(6, ()): 1, (4, ()): 2},
    "squeeze_excite": {(8, ()): 1, (4, ()): 1, (3, ()): 2},
    "attention_separate": {(12, ()): 1, (4, ()): 1, (2, (4,)): 2, (20, ()): 1},
    "attention_flax": {(12, ()): 1, (4, ()): 1, (2, (4,)): 2, (20, ()): 1},
    "attention_heads_first": {(12, ()): 1, (4, ()): 1, (2, (4,)): 2, (20, ()): 1},
    # One kernel's axis holds all of q, k, v: their widths are one group of 3 x 4 x 2.
    "attention_three_first": {(12, ()): 1, (4, ()): 1, (2, (4,)): 1, (20, ()): 1},
    "attention_gqa": {(12, ()): 1, (2, ()): 1, (4, (2,)): 1, (2, (2,)): 2, (20, ()): 1},
    "moe": {(8, ()): 1, (10, (4,)): 1},
    "lora": {(8, ()): 1, (4, ()): 1, (12, ()): 1},
    "lstm": {(8, ()): 1, (6, ()): 1},
    "gru": {(8, ()): 1, (6, ()): 1},
    "scan": {(12, ()): 1, (16, (4,)): 1, (3, (4,)): 1, (4, (4, 3)): 2},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sizes_and_copies(name):
    assert kinds(name) == EXPECTED[name]


CASES = {
    "resnet18": (ResNet(), 12, 11_689_512, 3_055_880),
    "resnet50": (ResNet((3, 4, 6, 3), True), 37, 25_557_032, 6_917_640),
    "mobilenet": (MobileNet(), 25, 3_504_872, 1_221_768),
    "densenet": (DenseNet(), 120, 7_978_856, 2_274_728),
}


def of_linen(model, inputs):
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    rest = {k: v for k, v in variables.items() if k != "params"}
    rest = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), rest)
    apply_fn = lambda params, x: model.apply({"params": params, **rest}, x)
    return js.trace(apply_fn, variables["params"], inputs), variables["params"]


def weights(params):
    return sum(int(np.prod(w.shape)) for w in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "mobilenet"),
        pytest.param("resnet50", marks=pytest.mark.exhaustive),
        pytest.param("densenet", marks=pytest.mark.exhaustive),
    ],
)
def test_half_of_every_group_leaves_what_torch_pruning_leaves(name):
    model, count, whole, half = CASES[name]
    trace, params = of_linen(model, IMAGE)
    found = js.coupling.groups(trace).prunable
    assert (len(found), weights(params)) == (count, whole)
    drop = {name: range(g.size // 2) for name, g in found.items()}
    small = js.narrowing.narrow(trace, params, drop)
    assert weights(small.params) == half
    assert jax.eval_shape(small.apply_fn, small.params, IMAGE).shape == (1, 1000)


def test_of_a_vision_transformer_heads_and_widths():
    trace, params = of_linen(ViT(), IMAGE)
    assert weights(params) == 86_567_656
    found = js.coupling.groups(trace).prunable
    sizes = collections.Counter((g.size, g.copies) for g in found.values())
    assert sizes == {(12, ()): 12, (64, (12,)): 24, (768, ()): 1, (3072, ()): 12}
    drop = {n: range(g.size // 2) for n, g in found.items() if g.size != 64}
    assert weights(js.narrowing.narrow(trace, params, drop).params) == 22_050_664


def test_a_deep_language_model():
    tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    trace = js.trace(loosely(llama), llama_params(layers=4), tokens)
    sizes = collections.Counter(
        (g.size, g.copies) for g in js.coupling.groups(trace).prunable.values()
    )
    # In each layer heads of keys, their queries, the width of values, hidden units;
    # what queries and keys have in common has rotary positions.
    expected = {(8, ()): 4, (4, (8,)): 4, (128, (8,)): 4, (14336, ()): 4, (4096, ()): 1}
    assert sizes == expected


def test_members_say_where_the_indices_are():
    found = js.coupling.groups(traced("attention_split"))
    heads = next(g for g in found.prunable.values() if g.size == 4)
    kernel = [m for m in heads.members if m.path == "Dense_1/kernel"]
    # Heads occur in q, in k and in v: each has them in a third of the axis.
    assert [(m.axis, m.role) for m in kernel] == [(1, "output")] * 3
    for part, m in enumerate(kernel):
        inside = np.repeat(np.arange(4), 2)
        expected = np.full(24, -1)
        expected[8 * part : 8 * (part + 1)] = inside
        np.testing.assert_array_equal(m.index, expected)
    out = [m for m in heads.members if m.path == "Dense_2/kernel"]
    assert [(m.axis, m.role) for m in out] == [(0, "input")]


def test_copies_say_where_the_batching_group_is():
    found = js.coupling.groups(traced("scan"))
    width = next(g for g in found.prunable.values() if g.copies == (4, 3))
    layers, heads = (found[name] for name in width.batched_by)
    assert (layers.size, layers.flags, heads.copies) == (4, {"layer"}, (4,))
    for m in width.members:
        (layer_axis, layer), (head_axis, head) = m.copies
        assert layer_axis == 0
        np.testing.assert_array_equal(layer, range(4))
        np.testing.assert_array_equal(head, range(3))
        assert head_axis == (1 if m.path.endswith("bias") else m.axis - 1 or 1)


def test_isomorphic_groups_have_equal_keys():
    found = js.coupling.groups(traced("residual")).prunable
    by_key = collections.defaultdict(list)
    for name, group in found.items():
        by_key[group.key].append(name)
    assert ["Conv_1/kernel[3]", "Conv_3/kernel[3]"] in by_key.values()


def ones(*shape):
    return np.ones(shape, np.float32)


def test_reasons_name_the_line_of_the_model():
    def apply_fn(params, x):
        y = x @ params["a"]
        y = jnp.flip(y, -1)  # the line
        return jax.nn.softmax(y @ params["b"]) @ params["c"]

    params = {"a": ones(3, 4), "b": ones(4, 5), "c": ones(5, 2)}
    found = js.coupling.groups(js.trace(apply_fn, params, ones(2, 3)))
    (reason,) = found["a[1]"].reasons
    assert (reason.flag, reason.detail) == ("frozen", "rev")
    assert "test_groups.py" in reason.source
    assert "apply_fn" in reason.source
    acting = found["b[1]"]
    assert acting.flags == {"zeros"}
    assert not acting.zero_invariant
    assert "reduce_max" in str(acting.reasons[0])
    text = str(found)
    assert "frozen: rev at" in text
    assert "test_groups.py" in text
    assert "output: it is an axis of the model's result" in text


def test_what_has_no_rule_is_frozen():
    def apply_fn(params, x):
        y = x @ params["a"]
        return jnp.linalg.qr(y)[0] @ params["b"]

    params = {"a": ones(3, 4), "b": ones(4, 2)}
    found = js.coupling.groups(js.trace(apply_fn, params, ones(5, 3)))
    assert not found.prunable
    assert found["a[1]"].reasons[0].flag == "frozen"


def test_what_the_function_does_not_read_stays():
    """A decoder that an encoder's function ignores is not known to be cut rightly."""
    params = {"a": ones(3, 4), "b": ones(4, 2), "other": ones(4, 4)}
    run = jax.jit(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])
    trace = js.trace(run, params, ones(5, 3))
    found = js.coupling.groups(trace)
    assert list(found.prunable) == ["a[1]"]
    assert [g.flags for n, g in found.items() if "other" in n] == [{"unread"}] * 2
    with pytest.raises(ValueError, match=r"unread: the traced function reads none"):
        js.narrowing.narrow(trace, params, {"other[0]": [1]})


def test_a_foreign_kernel_has_its_sizes():
    """A rule says how axes are coupled, but not how to run at other sizes."""
    times = jax.pure_callback
    shape = lambda x, w: jax.ShapeDtypeStruct((len(x), w.shape[1]), x.dtype)
    matmul = lambda x, w: times(lambda x, w: x @ w, shape(x, w), x, w)
    apply_fn = lambda p, x: jax.nn.relu(matmul(x, p["a"])) @ p["b"]
    params = {"a": ones(3, 4), "b": ones(4, 2)}
    rules = {"pure_callback": "ij,jk->ik"}
    trace = js.trace(apply_fn, params, ones(5, 3), rules=rules)
    group = js.coupling.groups(trace)["a[1]"]
    assert group.flags == {"fixed"}
    assert "pure_callback at" in str(group.reasons[0])
    assert js.coupling.groups(trace, allow={"fixed"})["a[1]"].prunable
    masks = js.narrowing.drop_masks(trace, {"a[1]": [0]})
    assert masks["b"].tolist() == [[False], [True], [True], [True]]
    with pytest.raises(ValueError, match=r"a\[1\].*\n  fixed: pure_callback"):
        js.narrowing.narrow(trace, params, {"a[1]": [0]}, allow={"fixed"})


# A number of means and variances: which of them masked channels leave as they are.
INVARIANT = {
    "mean": (lambda y: y - y.mean(-1, keepdims=True), True),
    "fast variance": (
        lambda y: (
            y
            * jnp.sqrt((y * y).mean(-1, keepdims=True) - y.mean(-1, keepdims=True) ** 2)
        ),
        True,
    ),
    "two-pass variance": (lambda y: y / y.std(-1, keepdims=True), True),
    "softmax": (jax.nn.softmax, False),
    "maximum": (lambda y: y * (-abs(y)).max(-1, keepdims=True), False),
    "norm": (lambda y: y / jnp.linalg.norm(y, axis=-1, keepdims=True), True),
    "sigmoid": (jax.nn.sigmoid, True),
    "sigmoid's mean": (lambda y: y * jax.nn.sigmoid(y).mean(-1, keepdims=True), True),
    "swish's mean": (lambda y: y * jax.nn.swish(y).mean(-1, keepdims=True), True),
    "relu6's mean": (lambda y: y * jax.nn.relu6(y).mean(-1, keepdims=True), True),
    "hard swish": (lambda y: y * jax.nn.hard_swish(y).mean(-1, keepdims=True), True),
    "elu": (lambda y: y * jax.nn.elu(y).mean(-1, keepdims=True), True),
    "where": (lambda y: y * jnp.where(y > 0, y, 0).sum(-1, keepdims=True), True),
    "where one": (lambda y: y * jnp.where(y > 0, y, 1).sum(-1, keepdims=True), True),
    "gram": (lambda y: y @ (y.T @ y), True),
    "gram of shifted": (lambda y: (y + 1) @ ((y + 1).T @ y), False),
}


@pytest.mark.parametrize("name", INVARIANT)
def test_zero_invariance_is_what_masking_and_cutting_agree_on(name):
    act, invariant = INVARIANT[name]
    draw = lambda seed, *shape: np.random.default_rng(seed).normal(size=shape)
    params = {"a": draw(2, 3, 6), "b": draw(3, 6, 2)}
    params = {name: w.astype(np.float32) for name, w in params.items()}
    apply_fn = loosely(lambda p, x: act(x @ p["a"]) @ p["b"])
    x = draw(0, 5, 3).astype(np.float32)
    trace = js.trace(apply_fn, params, x)
    group = js.coupling.groups(trace)["a[1]"]
    cut = lambda keep: {"a": params["a"][:, keep], "b": params["b"][keep]}
    masks = js.narrowing.drop_masks(trace, {"a[1]": [1, 4]})
    masked = jax.tree.map(lambda w, m: np.where(m, w, 0), params, masks)
    small = js.narrowing.narrow(
        trace, params, {"a[1]": [1, 4]}, allow=() if invariant else ("zeros",)
    )
    for one, other in zip(
        jax.tree.leaves(small.params),
        jax.tree.leaves(cut(np.array([0, 2, 3, 5]))),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    both = jax.jit(lambda p, q: (small.apply_fn(p, x), apply_fn(q, x)))
    got, want = both(small.params, masked)
    assert group.zero_invariant == invariant
    close = np.allclose(got, want, rtol=1e-5, atol=1e-5)
    assert close == invariant


def test_an_unknown_flag():
    trace = traced("mlp")
    with pytest.raises(ValueError, match=r"allow=\['frozen'\]"):
        js.coupling.groups(trace, allow=("frozen",))


def test_a_recurrence_written_out_over_many_steps():
    def apply_fn(p, x):
        h = x @ p["in"]
        for _ in range(1100):  # more than Python's stack holds
            h = jax.lax.tanh(jax.lax.dot(h, p["w"]))
        return h @ p["out"]

    params = {"in": array(5, 6), "w": array(6, 6, seed=1), "out": array(6, 2, seed=2)}
    trace = js.trace(apply_fn, params, np.zeros((2, 5), np.float32))
    assert js.coupling.groups(trace)["in[1]"].prunable
