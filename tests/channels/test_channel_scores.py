import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels.test_score import built, by_member, compiled, entries, hand_made, same
from zoo.models import ZOO

import jaxsparse as js


def distances(w, mask, others):
    mine = w[mask]
    return sum(np.linalg.norm(mine - w[other]) for other in others)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        *("grouped", "attention_separate"),
        pytest.param("residual", marks=pytest.mark.exhaustive),
        pytest.param("moe", marks=pytest.mark.exhaustive),
    ],
)
def test_fpgm_is_the_sum_of_the_distances_to_all_filters_of_the_copy(name):
    groups, params, _ = built(name)
    leaves = {p: np.asarray(x) for p, x in js.tree.leaves_with_paths(params)}
    wanted = {}
    for group in groups.prunable.values():
        members = [m for m in group.members if m.role == "output"]
        total = np.zeros((*group.copies, group.size))
        for m in members:
            w = leaves[m.path]
            for copy in np.ndindex(*group.copies):
                masks = [entries(group, m, w.shape, copy, i) for i in range(group.size)]
                for i, mask in enumerate(masks):
                    total[(*copy, i)] += distances(w, mask, masks)
        if members:
            wanted[group.name] = total
    assert wanted
    (got,) = compiled(lambda p: [js.channels.fpgm(groups, p)], params)
    same(got, wanted, rtol=1e-7)


def test_filters_of_opposite_sign_are_far_apart_and_equal_ones_are_not():
    groups = hand_made(("w", 1, range(4), (), "output"), size=4)
    w = np.array([[1, -1, 1, 1], [2, -2, 2, 2]], np.float32)
    got = js.channels.fpgm(groups, {"w": w})["g"]
    np.testing.assert_allclose(got, np.array([1, 3, 1, 1]) * 20**0.5, 1e-3)


def test_filters_with_fewer_places_are_filled_up_with_zeros():
    groups = hand_made(("w", 0, [0, 1, -1, 0], (), "output"), size=2)
    w = np.array([[1, 2], [3, 4], [99, 99], [5, 6]], np.float32)
    expected = np.linalg.norm([2, 2, 5, 6])
    got = jax.jit(lambda w: js.channels.fpgm(groups, {"w": w})["g"])(w)
    np.testing.assert_allclose(got, [expected, expected], 1e-6)


def test_fpgm_needs_no_memory_for_all_differences():
    groups = hand_made(("w", 1, range(256), (), "output"), size=256)
    w = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    compiled = jax.jit(lambda w: js.channels.fpgm(groups, {"w": w})).lower(w).compile()
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 8 * 1024 * 256 * 4  # all differences are 256 times the kernel


@pytest.mark.usefixtures("x64")
def test_bn_scale_is_the_magnitude_of_the_scales():
    groups, params, _ = built("residual")
    scales = lambda path, _: path.endswith("scale")
    rows = by_member(groups, params, lambda x, m: abs(x[m]).sum(), where=scales)
    total, most = compiled(
        lambda p: [
            js.channels.bn_scale(groups, p),
            js.channels.bn_scale(groups, p, reduce="max"),
        ],
        params,
    )
    same(total, {n: x.sum(0) for n, x in rows.items()}, rtol=1e-12)
    same(most, {n: x.max(0) for n, x in rows.items()}, rtol=1e-12)
    with pytest.raises(ValueError, match=r"'gamma\$' matches none"):
        js.channels.bn_scale(groups, params, where=r"gamma$")


def loss_of(name):
    with jax.enable_x64(True):
        apply_fn, _, inputs = ZOO[name]()
    loss_fn = lambda params, x: jnp.sum(jnp.sin(apply_fn(params, x)))
    return loss_fn, inputs[0]


def scaled(params, group, copy, i, by):
    """The parameters with one index's slice multiplied, in those that read it."""
    roles = {m.role for m in group.members}
    role = "input" if "input" in roles else "output"

    def one(path, w):
        for m in group.members:
            if m.path == path and m.role == role:
                w = np.where(entries(group, m, w.shape, copy, i), by * w, w)
        return w

    return js.tree.map_with_path(one, jax.tree.map(np.asarray, params))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["mlp", "attention_flax"])
def test_gates_are_the_mean_magnitude_of_each_example_s_difference_quotient(name):
    groups, params, _ = built(name)
    loss_fn, batch = loss_of(name)
    each = jax.jit(lambda p: jax.vmap(lambda x: loss_fn(p, x[None]))(batch))
    h, wanted, of_mean = 1e-4, {}, {}
    for group in groups.prunable.values():
        rows = np.zeros((len(batch), *group.copies, group.size))
        for copy in np.ndindex(*group.copies):
            for i in range(group.size):
                up, down = (scaled(params, group, copy, i, 1 + d) for d in (h, -h))
                change = np.asarray(each(up)) - np.asarray(each(down))
                rows[(slice(None), *copy, i)] = change / (2 * h)
        wanted[group.name] = np.mean(abs(rows), axis=0)
        of_mean[group.name] = abs(np.mean(rows, axis=0))
    gates = functools.partial(js.channels.gate_scores, groups, loss_fn)
    got, chunked = compiled(lambda *x: [gates(*x), gates(*x, chunk=2)], params, batch)
    same(got, wanted, rtol=1e-5, atol=1e-6)
    # The magnitude of the mean is something else here.
    assert any(np.max(abs(of_mean[n] - wanted[n])) > 0.01 for n in wanted)
    same(chunked, got, rtol=1e-12)


def small():
    params = {
        "up": np.eye(2, dtype=np.float32),
        "down": np.array([[1], [2]], np.float32),
    }
    apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    x = np.array([[1, 5], [-3, 4], [2, 0.1]], np.float32)
    trace = js.trace(apply_fn, params, x)
    return apply_fn, params, x, trace, js.coupling.groups(trace)


def test_gates_under_jit_and_of_sixteen_bit_parameters():
    apply_fn, params, x, _, groups = small()
    loss_fn = lambda params, x: jnp.sum(apply_fn(params, x))
    expected = np.mean(abs(np.tanh(np.asarray(x))) * [1, 2], axis=0)
    jitted = jax.jit(functools.partial(js.channels.gate_scores, groups, loss_fn))
    np.testing.assert_allclose(jitted(params, x)["up[1]"], expected, 1e-6)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    got = js.channels.gate_scores(groups, loss_fn, half, x.astype(jnp.bfloat16))[
        "up[1]"
    ]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, 0.02)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_gates_of_a_batch_that_is_spread_over_devices(kind):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"up": draw(4, 6), "down": draw(6, 4)}
    apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    x = draw(16, 4)
    groups = js.coupling.groups(js.trace(apply_fn, params, x))
    loss_fn = lambda p, x: jnp.sum(jnp.sin(apply_fn(p, x)))
    wanted = js.channels.gate_scores(groups, loss_fn, params, x)["up[1]"]
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=types)
    put = lambda x, *spec: jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    spread = {
        "up": put(params["up"], None, None),
        "down": put(params["down"], None, "y"),
    }
    got = js.channels.gate_scores(groups, loss_fn, spread, put(x, "x", None))["up[1]"]
    np.testing.assert_allclose(got, wanted, 1e-5)
    got = js.channels.fpgm(groups, spread)["up[1]"]
    wanted = jax.jit(lambda p: js.channels.fpgm(groups, p)["up[1]"])(params)
    np.testing.assert_allclose(got, wanted, 1e-5)


@functools.cache
def statistics(name):
    with jax.enable_x64(True):
        apply_fn, params, inputs = ZOO[name]()
        trace = js.trace(apply_fn, params, *inputs)
        return js.calibration.run(trace, params, [inputs], gram=False)


def test_flap_is_what_the_output_loses_when_a_channel_is_its_mean():
    _, params, x, trace, groups = small()
    stats = js.calibration.run(trace, params, [x], gram=False)
    hidden = np.tanh(np.asarray(x, np.float64))
    down = np.asarray(params["down"], np.float64)
    expected = []
    for j in range(2):
        without = hidden.copy()
        without[:, j] = hidden[:, j].mean()
        expected.append(np.mean(np.sum(((hidden - without) @ down) ** 2, axis=1)))
    got = js.channels.flap_scores(groups, params, stats)
    np.testing.assert_allclose(got["up[1]"], expected, 1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        *("grouped", "attention_flax"),
        pytest.param("scan", marks=pytest.mark.exhaustive),
    ],
)
def test_flap_adds_up_the_inputs_that_have_the_index_in_each_copy(name):
    groups, params, _ = built(name)
    stats = statistics(name)
    wanted = {}
    for group in groups.prunable.values():
        members = [m for m in group.members if m.role == "input"]
        if not members:
            continue
        total = wanted[group.name] = np.zeros((*group.copies, group.size))
        for m in members:
            w = np.asarray(dict(js.tree.leaves_with_paths(params))[m.path])
            view, variance = stats.view(m.path), np.asarray(stats.of(m.path).variance)
            # What never changed counts next to nothing, by its weights.
            least = 1e-20 * variance.max(-1, keepdims=True)
            variance = np.where(variance > 0, variance, least)
            for copy in np.ndindex(*group.copies):
                for i in range(group.size):
                    mask = entries(group, m, w.shape, copy, i)
                    squares = js.tree.to_matrices(np.where(mask, w**2, 0), view)
                    total[(*copy, i)] += np.sum(squares * variance[..., None, :])
    assert wanted
    (got,) = compiled(lambda p: [js.channels.flap_scores(groups, p, stats)], params)
    same(got, wanted, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        *("grouped", "scan"),
        pytest.param("residual", marks=pytest.mark.exhaustive),
        pytest.param("attention_flax", marks=pytest.mark.exhaustive),
    ],
)
def test_compensation_adds_the_means_of_what_goes_to_the_biases(name):
    groups, params, _ = built(name)
    stats = statistics(name)
    rng = np.random.default_rng(0)
    indices = {
        n: np.argsort(rng.random((*g.copies, g.size)), -1)[..., : g.size // 2]
        for n, g in groups.prunable.items()
    }
    leaves = {p: np.asarray(x) for p, x in js.tree.leaves_with_paths(params)}
    gone = {}
    for n, chosen in indices.items():
        for m in groups[n].members:
            for copy in np.ndindex(*groups[n].copies) if m.role == "input" else ():
                for i in chosen[copy]:
                    mask = entries(groups[n], m, leaves[m.path].shape, copy, i)
                    gone[m.path] = gone.get(m.path, False) | mask
    wanted = dict(leaves)
    for path, mask in gone.items():
        view, mean = stats.view(path), np.asarray(stats.of(path).mean)
        lost = js.tree.to_matrices(np.where(mask, leaves[path], 0), view)
        added = np.sum(lost * mean[..., None, :], axis=-1)
        bias = path.replace("kernel", "bias")
        wanted[bias] = leaves[bias] + added.reshape(leaves[bias].shape)
        assert np.any(added)
    drop = js.coupling.Drop(indices, {})
    got = jax.jit(lambda p: js.channels.flap_compensation(groups, p, stats, drop))(
        params
    )
    assert len(gone) > 1
    for path, x in js.tree.leaves_with_paths(got):
        np.testing.assert_allclose(x, wanted[path], rtol=1e-10, err_msg=path)


@pytest.mark.usefixtures("x64")
def test_with_it_the_mean_of_the_outputs_stays():
    rng = np.random.default_rng(0)
    params = {
        "up": rng.normal(size=(4, 3, 5)),
        "out": {"w": rng.normal(size=(3, 5, 2)), "b": np.ones(2)},
    }

    def apply_fn(p, x):
        hidden = jax.nn.gelu(jnp.einsum("nd,dhk->nhk", x, p["up"]))
        return jnp.einsum("nhk,hko->no", hidden, p["out"]["w"]) + p["out"]["b"][None]

    x = rng.normal(size=(50, 4))
    trace = js.trace(apply_fn, params, x)
    groups = js.coupling.groups(trace)
    stats = js.calibration.run(trace, params, [x[:20], x[20:]], gram=False)
    drop = {"up[2]": [[0, 1], [2, 4], [1, 3]], "up[1]": [1]}
    found = js.channels.flap_compensation(
        groups, params, stats, drop, bias=lambda path: path.replace("/w", "/b")
    )
    keep = np.ones((3, 5), bool)
    keep[1] = keep[0, [0, 1]] = keep[2, [1, 3]] = False
    narrow = found | {"up": np.where(keep, params["up"], 0.0)}
    run = jax.jit(apply_fn)
    dense, pruned = np.asarray(run(params, x)), np.asarray(run(narrow, x))
    assert np.max(abs(dense - pruned)) > 0.1
    np.testing.assert_allclose(pruned.mean(0), dense.mean(0), 1e-12)
    by_name = js.channels.flap_compensation(
        groups, params, stats, drop, bias={"out/w": "out/b"}
    )
    np.testing.assert_array_equal(by_name["out"]["b"], found["out"]["b"])


def test_errors_name_the_kernel():
    _, params, x, trace, groups = small()
    stats = js.calibration.run(trace, params, [x], gram=False)
    compensate = functools.partial(js.channels.flap_compensation, groups, params, stats)
    with pytest.raises(ValueError, match=r"down: .* of \['up\[1\]'\] .* no 'bias'"):
        compensate({"up[1]": [0]})
    assert compensate({"up[1]": [0]}, missing="skip") == params
    with pytest.raises(ValueError, match=r"down: 'up' of shape .* is not the bias of"):
        compensate({"up[1]": [0]}, bias={"down": "up"})
    with pytest.raises(ValueError, match=r"up\[2\]: drop names it.*nearest: \['up\[1"):
        compensate({"up[2]": [0]})
    with pytest.raises(
        ValueError, match=r"up\[1\]: has the indices 0 to 1, got 0 to 2"
    ):
        compensate({"up[1]": [0, 2]})
    with pytest.raises(ValueError, match="missing must be one of"):
        compensate({}, missing="zero")
    some = js.calibration.run(trace, params, [x], gram=False, where="up")
    with pytest.raises(ValueError, match="down: selected by `where`, but there are no"):
        js.channels.flap_scores(groups, params, some)
    with_bias = params | {"bias": np.ones(1, np.float32)}
    with pytest.raises(
        ValueError, match=r"down: .* of \['up\[1\]'\] that go, and its inp"
    ):
        js.channels.flap_compensation(groups, with_bias, some, {"up[1]": [0]})
    frozen = {n: g for n, g in groups.items() if not g.prunable}
    with pytest.raises(ValueError, match="none of the 1 is prunable"):
        js.channels.gate_scores(frozen, lambda p, x: 0.0, params, x)
