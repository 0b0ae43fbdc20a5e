"""Models without some of their branches equal those whose branches give zeros."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from zoo.models import ZOO, array

import jaxsparse as js

# The parameters that a branch ends with: it gives zeros when they are zeros.
LAST = {
    "residual": r"BatchNorm_2/",
    "rope_halves": r"/(o|down)$",
    "vit": r"(out|Encoder_./Dense_0)/",
    "scan_remat": r"Encoder_0/(.*out|Dense_0)/",
    "moe": r"down",
    "nnx": r"attention/out",
}


def model(name):
    apply_fn, params, inputs = ZOO[name]()
    params = jax.tree.map(np.asarray, params)  # those are cut without a compilation
    return js.trace(apply_fn, params, *inputs), params, inputs


def with_zeros(x, *at):
    x = x.copy()
    x[at] = 0
    return x


def silenced(name, params, gone):
    """The same parameters, with zeros at the ends of some blocks."""
    paths = [path for block in gone for path in block.paths]

    def one(path, x):
        for of in paths:
            base, _, turn = of.rstrip("]").partition("[")
            if base == path and re.search(LAST[name], path):
                x = with_zeros(x, int(turn)) if turn else np.zeros_like(x)
        return x

    return js.tree.map_with_path(one, params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", LAST)
def test_equals_the_model_whose_branches_give_zeros(name):
    trace, params, inputs = model(name)
    found = js.depth.residual_blocks(trace)
    names = list(found)[1::3] or list(found)
    small = js.depth.remove_blocks(trace, params, names)
    zeroed = silenced(name, params, [found[n] for n in names])
    run = jax.jit(trace.apply_fn)
    expected, whole = jax.device_get([run(p, *inputs) for p in (zeroed, params)])
    assert np.max(np.abs(expected - whole)) > 1e-3
    got = jax.jit(small.apply_fn)(small.params, *inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)

    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    parameters = sum(found[n].parameters for n in names)
    assert size(small.params) == size(params) - parameters


def checkpointed(params, x):
    """A scan of two branches a turn, both within a checkpoint."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, p):
        x = x + jnp.tanh(x @ p["a"]) @ p["b"]
        return x + jnp.sin(x @ p["c"])

    x = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params)[0]
    return x * 2


def small_stack():
    params = {k: np.asarray(array(4, 3, 3, seed=i)) for i, k in enumerate("abc")}
    x = array(2, 3, seed=9)
    return js.trace(checkpointed, params, x), params, x


@pytest.mark.usefixtures("x64")
def test_derivatives_in_a_scan_with_checkpoints():
    trace, params, x = small_stack()
    assert list(js.depth.residual_blocks(trace))[:3] == ["a+b[0]", "c[0]", "a+b[1]"]
    # One branch of the second turn, and all of the last.
    small = js.depth.remove_blocks(trace, params, ["a+b[1]", "a+b[3]", "c[3]"])
    rows = {"a": [0, 2], "b": [0, 2], "c": [0, 1, 2]}
    assert small.sizes == {(k, 0): len(v) for k, v in rows.items()}
    b, c = with_zeros(params["b"], [1, 3]), with_zeros(params["c"], 3)
    zeroed = {**params, "b": b, "c": c}
    loss = lambda f: lambda p, x: jnp.sum(jnp.cos(f(p, x)))
    got = jax.jit(jax.grad(loss(small.apply_fn), (0, 1)))(small.params, x)
    expected = jax.jit(jax.grad(loss(checkpointed), (0, 1)))(zeroed, x)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-11)
    for k, kept in rows.items():
        of_kept = np.asarray(expected[0][k])[kept]
        np.testing.assert_allclose(got[0][k], of_kept, rtol=1e-11, err_msg=k)


@pytest.mark.usefixtures("x64")
def test_checkpoints_stay_and_nothing_else_is_computed():
    trace, params, x = small_stack()
    names = [
        name
        for name in js.depth.residual_blocks(trace)
        if name not in {"a+b[1]", "c[3]"}
    ]
    small = js.depth.remove_blocks(trace, params, names)
    program = jax.make_jaxpr(small.apply_fn)(small.params, x)
    again = [e for e in program.jaxpr.eqns if "remat" in e.primitive.name]
    counts = [str(e.params["jaxpr"]).count("dot_general") for e in again]
    assert counts == [2, 1]
    # No loop hides equal turns from the compiler any more.
    assert all(e.params["prevent_cse"] for e in again)
    outside = {e.primitive.name for e in program.jaxpr.eqns if e not in again}
    assert outside <= {"split", "squeeze", "mul"}


@pytest.mark.usefixtures("x64")
def test_vmap_and_inputs_of_other_shapes():
    trace, params, _ = small_stack()
    small = js.depth.remove_blocks(trace, params, ["c[1]"])
    zeroed = {**params, "c": with_zeros(params["c"], 1)}
    x = array(3, 5, 3, seed=5)  # traced with two rows
    run = lambda f: jax.vmap(f, (None, 0))
    got, expected = jax.jit(
        lambda p, q: (run(small.apply_fn)(p, x), run(checkpointed)(q, x))
    )(small.params, zeroed)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    halves = jax.tree.map(lambda w: w.astype(np.float32), small.params)
    half = np.asarray(x[0], np.float32)
    assert jax.eval_shape(small.apply_fn, halves, half).dtype == jnp.float32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_results_are_sharded_as_the_models(kind):
    def apply_fn(p, x):
        for w in p["w"]:  # a select of a constant, which knows of no sharding
            x = x + jnp.where(x > 0, jnp.tanh(x @ w), 0.5)
        return x

    params, x = {"w": np.asarray(array(3, 6, 6))}, array(8, 6, seed=1)
    trace = js.trace(apply_fn, params, x)
    name = list(js.depth.residual_blocks(trace))[1]
    small, gates = js.depth.remove_blocks(trace, params, [name]), {name: 0.5}
    want = small.apply_fn(small.params, x), js.depth.gated(trace)(params, gates, x)
    axis = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis,))
    with jax.sharding.set_mesh(mesh):
        place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
        spread = place(x, PartitionSpec("data"))
        got = (
            small.apply_fn(place(small.params, PartitionSpec()), spread),
            js.depth.gated(trace)(place(params, PartitionSpec()), gates, spread),
        )
    for a, b in zip(got, want, strict=True):
        assert a.sharding.spec[0] == "data"
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_abstract_parameters_and_those_of_the_host():
    trace, params, x = small_stack()
    names = list(js.depth.residual_blocks(trace))[:3]
    small = js.depth.remove_blocks(trace, params, names)
    on_device = js.depth.remove_blocks(trace, jax.tree.map(jnp.asarray, params), names)
    shapes = jax.eval_shape(lambda: params)
    abstract = js.depth.remove_blocks(trace, shapes, names)
    for k in "abc":
        assert isinstance(small.params[k], np.ndarray)
        assert isinstance(on_device.params[k], jax.Array)
        np.testing.assert_array_equal(small.params[k], on_device.params[k])
        assert isinstance(abstract.params[k], jax.ShapeDtypeStruct)
        assert abstract.params[k].shape == small.params[k].shape
    out = jax.eval_shape(abstract.apply_fn, abstract.params, x)
    assert out.shape == trace.out_shape.shape


def loops(params, x):
    def inner(x, w):
        return x + jnp.tanh(x @ w), None

    outer = lambda x, ws: jax.lax.scan(inner, x, ws)
    x, _ = jax.lax.scan(outer, x, params["w"])
    stack = jnp.moveaxis(params["v"], 1, 0).astype(x.dtype)
    return jax.lax.scan(inner, x, stack, reverse=True)[0]


def loop_weights():
    params = {"w": array(2, 3, 4, 4), "v": array(4, 3, 4, seed=1)}
    return jax.tree.map(np.asarray, params)


def assert_same(small, zeroed, x):
    both = jax.jit(lambda p, q: (small.apply_fn(p, x), loops(q, x)))
    got, want = both(small.params, zeroed)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_loops_within_loops_and_stacks_along_another_axis():
    params, x = loop_weights(), array(2, 4, seed=2)
    trace = js.trace(loops, params, x)
    small = js.depth.remove_blocks(
        trace, params, ["w[0,1]", "w[1,1]", "w[1,2]", "v[0]"]
    )
    assert small.sizes == {("w", 1): 2, ("v", 1): 2}  # w[0,2] is still read
    w = with_zeros(with_zeros(params["w"], slice(None), 1), 1, 2)
    zeroed = {"w": w, "v": with_zeros(params["v"], slice(None), 0)}
    assert_same(small, zeroed, x)


@pytest.mark.usefixtures("x64")
def test_scans_that_lose_nothing_stay_scans():
    params, x = loop_weights(), array(2, 4, seed=2)
    trace = js.trace(loops, params, x)
    small = js.depth.remove_blocks(trace, params, ["v[1]"])
    program = jax.make_jaxpr(small.apply_fn)(small.params, x)
    assert [e.primitive.name for e in program.jaxpr.eqns].count("scan") == 1
    assert_same(small, {**params, "v": with_zeros(params["v"], slice(None), 1)}, x)


@pytest.mark.usefixtures("x64")
def test_functions_with_derivatives_of_their_own_keep_them():
    def apply_fn(p, x):
        for w in p:
            x = x + nn.relu(x @ w)
        return nn.relu(x)

    rng, x = np.random.default_rng(0), np.zeros((1, 3))
    params = [rng.normal(size=(3, 3)) for _ in range(2)]
    small = js.depth.remove_blocks(js.trace(apply_fn, params, x), params, ["1"])
    grad = jax.jit(jax.grad(lambda x: small.apply_fn(small.params, x).sum()))(x)
    # That of a plain maximum at 0 would be 1/2 in place of 0.
    np.testing.assert_array_equal(grad, np.zeros((1, 3)))


@pytest.mark.usefixtures("x64")
def test_sharing_equals_a_model_with_the_leaders_kernels():
    leader = 2  # it comes later
    trace, params, inputs = model("scan")
    (attention,) = {
        n.split("[")[0] for n in js.depth.residual_blocks(trace) if "Multi" in n
    }
    followers = {f"{attention}[1]": f"{attention}[{leader}]"}
    shared = js.depth.share_blocks(trace, params, followers)

    def one(path, x):
        kernel = "Multi" in path and "kernel" in path
        return x[[0, leader, *range(2, len(x))]] if kernel else x

    copied = js.tree.map_with_path(one, params)
    got = jax.jit(shared.apply_fn)(shared.params, *inputs)
    expected = jax.jit(trace.apply_fn)(copied, *inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    kernels = [path for path in trace.paths if "Multi" in path and "kernel" in path]
    assert shared.sizes == {(path, 0): 3 for path in kernels}


@pytest.mark.usefixtures("x64")
def test_sharing_between_parameters_of_other_names():
    trace, params, inputs = model("rope_halves")
    name = "layers/{}/gate_up+down".format
    ours, theirs = params["layers"][1], params["layers"][0]
    names = {"down": theirs["down"], "gate_up": theirs["gate_up"]}
    expected = {**params, "layers": [theirs, {**ours, **names}]}
    followers = {name(1): name(0)}
    run = jax.jit(trace.apply_fn)
    for own, keeps in ((None, {}), (False, {"norm2": theirs["norm2"]}), ("norm", {})):
        shared = js.depth.share_blocks(trace, params, followers, own=own)
        expected["layers"][1] |= keeps
        want = run({**expected}, *inputs)
        got = jax.jit(shared.apply_fn)(shared.params, *inputs)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
        expected["layers"][1] |= {"norm2": ours["norm2"]}
        gone = {path.rsplit("/", 1)[1] for path, _ in shared.sizes}
        assert gone == {"gate_up", "down", *keeps}


@pytest.mark.usefixtures("x64")
def test_sharing_that_does_not_fit():
    def apply_fn(p, x):
        x = x + nn.relu(x @ p["a"]["up"]) @ p["a"]["down"]
        x = x + nn.relu(x @ p["b"]["up"]) @ p["b"]["down"]
        return x + x @ p["c"]["w"]

    shapes = {"a": {"up": (3, 4), "down": (4, 3)}, "b": {"up": (3, 5), "down": (5, 3)}}
    shapes["c"] = {"w": (3, 3)}
    params = jax.tree.map(np.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    trace = js.trace(apply_fn, params, array(2, 3))
    with pytest.raises(ValueError, match=r"b can not .* of a: b/up has shape \(3, 5\)"):
        js.depth.share_blocks(trace, params, {"b": "a"})
    with pytest.raises(ValueError, match=r"c can not .* of a: it has 1 of"):
        js.depth.share_blocks(trace, params, {"c": "a"})
    with pytest.raises(ValueError, match="b shall follow a, which itself follows c"):
        js.depth.share_blocks(trace, params, {"b": "a", "a": "c"})


@pytest.mark.usefixtures("x64")
def test_errors():
    trace, params, inputs = model("rope_halves")
    with pytest.raises(ValueError, match=r"not a block.*Similar: layers/1/q\+kv\+o"):
        js.depth.remove_blocks(trace, params, ["layers/1/q+k+o"])
    with pytest.raises(TypeError, match="collection of names"):
        js.depth.remove_blocks(trace, params, "layers/1/q+kv+o")
    with pytest.raises(ValueError, match="traced with shape"):
        js.depth.remove_blocks(
            trace, {**params, "norm": np.ones(3)}, ["layers/1/q+kv+o"]
        )
    small = js.depth.remove_blocks(trace, params, ["layers/1/q+kv+o"])
    with pytest.raises(ValueError, match=r"layers/1/.*smaller model has the shape"):
        small.apply_fn(params, *inputs)
    with pytest.raises(ValueError, match="no residual branches"):
        js.depth.remove_blocks(*model("mlp")[:2], ["x"])
