"""The sequential pass: each kernel sees what the pruned kernels before it give.

For any feed-forward model that has a consequence that can be checked without knowing
how it is done: run the *result* over the same data, and the inputs of each kernel are
those that it was solved with. So the error that was reported is the one found then.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from zoo.networks import DenseNet, llama, llama_params

import jaxsparse as js
from jaxsparse.oneshot import _layerwise, _pass


def cheap(w, gram, sparsity, *, pattern):
    """A solver that compiles quickly: the best rescaling of what a mask leaves."""
    axes = js.Axes(input=(1,), output=(0,))
    score = jnp.abs(w) * jnp.sqrt(jnp.diagonal(gram))[None]
    mask = js.patterns.masks({"w": score}, sparsity, pattern=pattern, axes=axes)["w"]
    new = jnp.where(mask, w, 0)
    up = jnp.sum((w @ gram) * new, 1) / jnp.maximum(
        jnp.sum((new @ gram) * new, 1), 1e-9
    )
    new = (new * up[:, None]).astype(w.dtype)
    lost = new - w
    error, whole = jnp.sum((lost @ gram) * lost), jnp.sum((w @ gram) * w)
    info = js.solvers.SolveInfo(
        error, error / whole, jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.array(False)
    )
    return js.solvers.Solved(new, mask, info)


def normal(seed, *shape):
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(numbers.astype(np.float32))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=4, strides=2)(x))
        x = x.reshape(x.shape[0], -1, 16)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(x, x)
        return nn.Dense(5)(nn.LayerNorm()(x).mean(1))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(12)(nn.gelu(nn.Dense(20)(nn.LayerNorm()(x)))), None


class Stack(nn.Module):
    """Layers as one scan, rematerialised, between embedding and tied head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 12)
        axes = {"params": 0}
        layers = nn.scan(
            nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=3
        )
        x, _ = layers()(embed(tokens), None)
        return embed.attend(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A model that is its own pytree, as in Equinox."""

    layers: list
    out: jax.Array

    def __call__(self, x):
        for w, b in self.layers:
            x = jax.nn.silu(w @ x + b)
        return self.out @ x


def linen(model, x):
    """A model with random parameters; variances and scales are about one."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    leaves, treedef = jax.tree.flatten(shapes)
    draw = lambda i, s: (
        np.asarray(normal(i, *s.shape)) / np.sqrt(np.prod(s.shape[:-1]), dtype="f4")
        if len(s.shape) > 1
        else abs(1 + np.asarray(normal(i, *s.shape)) / 4)
    )
    return model.apply, jax.tree.unflatten(
        treedef, [jax.device_put(draw(i, s)) for i, s in enumerate(leaves)]
    )


def nnx_model():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(8, 16, rngs=rngs)
            self.b = nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x):
            return x + self.b(nnx.relu(self.a(x)))

    graph, state = nnx.split(Mlp(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state


def experts():
    params = {
        "in": normal(1, 3, 8, 16),
        "out": normal(2, 3, 16, 8),
        "r": normal(3, 8, 3),
    }

    def apply_fn(p, x):
        gate = jax.nn.softmax(x @ p["r"])
        h = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["in"]))
        return jnp.einsum("te,etd->td", gate, jnp.einsum("etf,efd->etd", h, p["out"]))

    return apply_fn, params


def small_llama():
    shapes = llama_params(layers=2, d=16, heads=4, kv=2, hidden=24, vocab=11)
    leaves, treedef = jax.tree.flatten(shapes)
    draw = lambda i, s: np.asarray(normal(i, *s.shape))
    new = [draw(i, s) * np.float32(0.3) + (s.ndim == 1) for i, s in enumerate(leaves)]
    return llama, jax.tree.unflatten(treedef, new)


TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 7, (4, 12)), jnp.int32)
ROWS = normal(5, 40, 8)
MODELS = {
    "linen": lambda: (*linen(Net(), x := normal(5, 4, 8, 8, 3)), x),
    "scanned": lambda: (*linen(Stack(), TOKENS), TOKENS),
    "densenet": lambda: (
        *linen(DenseNet((1, 1), 3), x := normal(5, 2, 32, 32, 3)),
        x,
    ),
    "nnx": lambda: (*nnx_model(), ROWS),
    "dataclass": lambda: (
        lambda m, x: jax.vmap(m)(x),
        Module(
            [(normal(i, 8, 8), normal(i + 9, 8)) for i in range(3)], normal(4, 2, 8)
        ),
        ROWS,
    ),
    "experts": lambda: (*experts(), ROWS),
    "llama": lambda: (*small_llama(), TOKENS),
}


# The others have kernels of each kind: in a tree, in a scan, one for each expert.
MORE = ("densenet", "nnx", "dataclass", "llama")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] * (name in MORE))
        for name in MODELS
    ],
)
def test_each_kernel_was_solved_with_what_the_pruned_model_gives_it(name):
    apply_fn, params, x = MODELS[name]()
    pruned = js.oneshot.layerwise(
        apply_fn,
        params,
        [x[: len(x) // 2], x[len(x) // 2 :]],
        sparsity=0.5,
        solver=cheap,
    )
    trace = js.trace(apply_fn, params, x)
    stats = js.calibration.run(trace, pruned.params, [x])
    before = dict(js.tree.leaves_with_paths(params))
    after = dict(js.tree.leaves_with_paths(pruned.params))
    masks = dict(js.tree.leaves_with_paths(pruned.masks))
    chosen = dict(js.tree.leaves_with_paths(js.tree.select(params)))
    assert set(pruned.info) == {p for p, taken in chosen.items() if taken}
    for path, info in pruned.info.items():
        view = trace.kernels[path].view
        change = np.asarray(after[path], np.float64) - np.asarray(before[path])
        change = js.tree.to_matrices(change, view)
        gram = np.asarray(stats.of(path).gram, np.float64)
        found = np.einsum("...oi,...ij,...oj->...", change, gram, change)
        np.testing.assert_allclose(info.error, found, rtol=2e-3, atol=1e-5)
        removed = ~js.tree.to_matrices(np.asarray(masks[path]), view)
        count = int(np.floor(0.5 * view.d_in * view.d_out + 0.5))
        assert np.all(np.sum(removed, (-1, -2)) == count)
        np.testing.assert_array_equal(np.asarray(after[path]) != 0, masks[path])
        np.testing.assert_allclose(info.rows, stats.of(path).count)
        masked_error = np.asarray(info.masked_error)
        assert np.all(np.asarray(info.relative_error) <= masked_error * (1 + 1e-5))
    for path, mask in masks.items():
        if path not in pruned.info:
            assert mask.shape == ()
            np.testing.assert_array_equal(after[path], before[path])


def test_stacked_layers_are_pruned_as_written_out_ones():
    w = {"in": normal(1, 4, 8, 16), "out": normal(2, 4, 16, 8)}
    layer = lambda x, w: (x + jnp.tanh(x @ w["in"]) @ w["out"], None)
    stacked = lambda p, x: jax.lax.scan(layer, x, p)[0]

    def written_out(p, x):
        for i in range(4):
            x, _ = layer(x, {k: v[i] for k, v in p.items()})
        return x

    prune = functools.partial(js.oneshot.layerwise, sparsity=0.5, solver=cheap)
    a, b = (prune(f, w, [ROWS]) for f in (stacked, written_out))
    jax.tree.map(np.testing.assert_array_equal, a.masks, b.masks)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a.params, b.params
    )
    assert a.info["in"].error.shape == (4,)


def test_tied_kernels_are_solved_with_the_inputs_of_all_places():
    w = {"w": normal(1, 8, 8), "next": normal(2, 8, 3)}

    def apply_fn(p, x):
        def cell(c, _):
            return jnp.tanh(c @ p["w"] + x), None

        return jax.lax.scan(cell, x, None, length=4)[0] @ p["next"]

    prune = functools.partial(js.oneshot.layerwise, sparsity=0.5, solver=cheap)
    pruned = prune(apply_fn, w, [ROWS])
    trace = js.trace(apply_fn, w, ROWS)
    lost = pruned.params["w"] - w["w"]
    dense = js.calibration.run(trace, w, [ROWS]).of("w")
    assert float(pruned.info["w"].rows) == 160
    np.testing.assert_allclose(
        pruned.info["w"].error, jnp.sum((lost.T @ dense.gram) * lost.T), rtol=1e-4
    )
    # What comes after it sees the pruned cell.
    seen = js.calibration.run(trace, pruned.params, [ROWS]).of("next").gram
    lost = (pruned.params["next"] - w["next"]).T
    np.testing.assert_allclose(
        pruned.info["next"].error, jnp.sum((lost @ seen) * lost), rtol=1e-4
    )
    written_out = lambda p, x: (
        functools.reduce(lambda c, _: jnp.tanh(c @ p["w"] + x), range(4), x) @ p["next"]
    )
    again = prune(written_out, w, [ROWS])
    jax.tree.map(np.testing.assert_array_equal, pruned.masks, again.masks)


def test_slices_of_one_parameter_are_solved_each_with_its_own_inputs():
    w = {"in": normal(1, 3, 8, 16), "out": normal(2, 3, 16, 8)}

    def apply_fn(p, x):  # experts in a loop: all read the same, each makes its own
        return sum(jnp.tanh(x @ p["in"][i]) @ p["out"][i] for i in range(3))

    pruned = js.oneshot.layerwise(apply_fn, w, [ROWS], sparsity=0.5, solver=cheap)

    def side_by_side(p, x):
        h = jnp.tanh(jnp.einsum("etd,edf->etf", x, p["in"]))
        return jnp.einsum("etf,efd->etd", h, p["out"]).sum(0)

    same = js.oneshot.layerwise(
        side_by_side, w, [jnp.stack([ROWS] * 3)], sparsity=0.5, solver=cheap
    )
    jax.tree.map(np.testing.assert_array_equal, pruned.masks, same.masks)
    for path in w:
        np.testing.assert_allclose(pruned.params[path], same.params[path], atol=1e-5)
        np.testing.assert_allclose(pruned.info[path].rows, 40)


def test_without_a_sequence_all_statistics_are_those_of_the_dense_model():
    apply_fn, params = experts()
    pruned = js.oneshot.layerwise(
        apply_fn, params, [ROWS], sparsity=0.5, solver=cheap, sequential=False
    )
    stats = js.calibration.run(js.trace(apply_fn, params, ROWS), params, [ROWS])
    lost = js.tree.to_matrices(pruned.params["out"] - params["out"], stats.view("out"))
    found = jnp.einsum("eoi,eij,eoj->e", lost, stats.of("out").gram, lost)
    np.testing.assert_allclose(pruned.info["out"].error, found, rtol=1e-4)


def test_equal_blocks_compile_once():
    def compiled(depth):
        params = {"layers": [{"a": normal(i, 8, 8)} for i in range(depth)]}

        def apply_fn(p, x):
            for layer in p["layers"]:
                x = x + jax.nn.gelu(x @ layer["a"])
            return x

        trace = js.trace(apply_fn, params, ROWS)
        walk = _pass.Pass(
            trace, trace.kernels, params, [(ROWS,)], gram=True, host=False
        )
        walk.all_statistics()
        assert len(walk.stages) == depth
        return len(walk._compiled)

    assert compiled(7) == compiled(3)


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    apply_fn, params, x = MODELS["scanned"]()
    run = functools.partial(
        js.oneshot.layerwise, apply_fn, params, [x], sparsity=0.6, solver=cheap
    )
    whole = run()
    saved, stages = _layerwise.save_state, []

    def killed(directory, state, trace):
        saved(directory, state, trace)
        stages.append(state.stage)
        if state.stage == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(_layerwise, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run(directory=tmp_path)
    again = run(directory=tmp_path)
    assert stages == [1, 2, 3, 4, 5, 6], "nothing was solved twice"
    for a, b in ((whole.params, again.params), (whole.masks, again.masks)):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    for path, info in whole.info.items():
        jax.tree.map(np.testing.assert_array_equal, info[:-1], again.info[path][:-1])

    # Once more: it is done already.
    def solved_again(*_, **__):
        raise AssertionError("it was done")

    monkeypatch.setattr(_layerwise, "solve_bundle", solved_again)
    jax.tree.map(
        np.testing.assert_array_equal, run(directory=tmp_path).params, whole.params
    )
    other = js.oneshot.layerwise
    with pytest.raises(ValueError, match="checkpoint of another run"):
        other(apply_fn, params, [x], sparsity=0.6, where="Dense_0", directory=tmp_path)


def test_patterns_batches_on_the_host_and_one_sparsity_for_each_kernel():
    apply_fn, params, x = MODELS["nnx"]()
    pruned = js.oneshot.layerwise(
        apply_fn, params, [x], solver=cheap, pattern=js.NM(2, 4), host=True
    )
    trace = js.trace(apply_fn, params, x)
    js.patterns.verify(pruned.masks, params, pattern=js.NM(2, 4), axes=trace.axes)
    wanted = {"a/kernel": 0.25, "b/kernel": 0.75}
    several = js.oneshot.layerwise(apply_fn, params, [x], sparsity=wanted, solver=cheap)
    found = {path: float(info.sparsity) for path, info in several.info.items()}
    assert found == wanted


def test_with_host_the_device_holds_the_activations_of_one_batch(monkeypatch):
    many, rows = 16, 512
    params = {"a": normal(1, 8, 16), "b": normal(2, 16, 24), "c": normal(3, 24, 4)}
    data = list(np.asarray(normal(4, many, rows, 8)))
    apply_fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
    widest = rows * 24 * 4  # bytes of one batch's largest activation
    # On CPU NumPy only looks at a device's array, which lives on in it. Elsewhere it is
    # a copy: here too, then.
    monkeypatch.setattr(_pass, "on_host", np.array)
    before = jax.live_arrays()
    known, held = set(map(id, before)), {"solver": [], "run": []}

    def look(where):
        new = (x for x in jax.live_arrays() if id(x) not in known)
        held[where].append(sum(x.nbytes for x in new))

    def solver(*args, **options):  # called when it is traced: once for each shape
        look("solver")
        return cheap(*args, **options)

    kept = _pass.Pass._run

    def run(*args):  # of one batch, to the next kernel
        found = kept(*args)
        look("run")
        return found

    monkeypatch.setattr(_pass.Pass, "_run", run)
    prune = functools.partial(
        js.oneshot.layerwise, apply_fn, params, data, sparsity=0.5, solver=solver
    )
    prune(host=True)
    assert len(held["solver"]) == 3
    assert len(held["run"]) >= 2 * many
    assert max(held["solver"]) < 2 * widest
    assert max(held["run"]) < 4 * widest
    held["run"].clear()
    prune(host=False)  # the same samples see what is kept there
    assert max(held["run"]) > many * widest


def test_samples_may_count_more_or_not_at_all():
    apply_fn, params, x = MODELS["nnx"]()
    run = functools.partial(
        js.oneshot.layerwise, apply_fn, params, sparsity=0.5, solver=cheap
    )
    first = run([x[:20]])
    weighted = run([x], weight=lambda x: jnp.where(jnp.arange(len(x)) < 20, 1.0, 0.0))
    for a, b in zip(
        *map(jax.tree.leaves, (first.params, weighted.params)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert float(weighted.info["a/kernel"].rows) == 20


def test_sparsegpt_is_the_default_and_shares_a_factor():
    params = {"q": normal(1, 8, 16), "k": normal(2, 8, 16), "out": normal(3, 16, 4)}
    apply_fn = lambda p, x: jax.nn.relu(x @ p["q"] + jnp.sin(x @ p["k"])) @ p["out"]
    x = normal(4, 64, 8)
    pruned = js.oneshot.layerwise(apply_fn, params, [x], sparsity=0.5)
    solve = lambda w, x: js.solvers.sparsegpt(w.T, x.T @ x / len(x), 0.5)
    q, k = solve(params["q"], x), solve(params["k"], x)
    h = jax.nn.relu(x @ q.w.T + jnp.sin(x @ k.w.T))
    out = solve(params["out"], h)
    for path, solved in (("q", q), ("k", k), ("out", out)):
        np.testing.assert_array_equal(pruned.masks[path], solved.mask.T)
        np.testing.assert_allclose(pruned.params[path], solved.w.T, atol=1e-4)


def test_shardings_are_kept():
    mesh = Mesh(np.array(jax.devices()), ("model",))
    spread = NamedSharding(mesh, P(None, "model"))
    params = {"a": normal(1, 8, 16), "b": normal(2, 16, 8)}
    apply_fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    run = functools.partial(
        js.oneshot.layerwise, apply_fn, batches=[ROWS], sparsity=0.5, solver=cheap
    )
    one = run(params)
    many = run(jax.tree.map(lambda w: jax.device_put(w, spread), params))
    for path in params:
        assert many.params[path].sharding.is_equivalent_to(spread, 2)
        np.testing.assert_array_equal(one.masks[path], many.masks[path])
        np.testing.assert_allclose(one.params[path], many.params[path], atol=1e-5)


def test_bad_input_gets_a_sentence():
    params = {"a": normal(1, 8, 16), "b": normal(2, 16, 8)}
    apply_fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    run = functools.partial(js.oneshot.layerwise, apply_fn, params)
    with pytest.raises(ValueError, match="there are none"):
        run([], sparsity=0.5)
    with pytest.raises(ValueError, match="needs a sparsity"):
        run([ROWS])
    with pytest.raises(ValueError, match="sparsity of a"):
        run([ROWS], sparsity=1.5)
    with pytest.raises(ValueError, match="selects none"):
        run([ROWS], sparsity=0.5, where=lambda path, leaf: path == "zz")
    with pytest.raises(ValueError, match=r"a: NM.*groups of 5.*divide its 8"):
        run([ROWS], pattern=js.NM(2, 5))
    solver = functools.partial(js.solvers.sparsegpt, damping=0.0)
    with pytest.raises(ValueError, match=r"a: its gram .* 3 rows of 8 .*rel_damping"):
        run([ROWS[:3]], sparsity=0.5, solver=solver)
