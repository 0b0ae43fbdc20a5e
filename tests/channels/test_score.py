import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.conftest import compilations as compilations
from zoo.models import ZOO

import jaxsparse as js

MODELS = ["mlp", "residual", "grouped", "attention_separate", "attention_flax", "moe"]
ALL = lambda path, leaf: True


@functools.cache
def built(name):
    """A model with its groups, and random numbers for scores of its weights."""
    with jax.enable_x64(True):
        apply_fn, params, inputs = ZOO[name]()
        trace = js.trace(apply_fn, params, *inputs)
        rng = np.random.default_rng(7)
        scores = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), params)
        return js.coupling.groups(trace), params, scores


def entries(group, member, shape, copy, i):
    """Which entries of a parameter are those of one index, place by place."""
    found = np.zeros(shape, bool)
    for place in np.ndindex(*shape):
        here = member.index[place[member.axis]] == i
        for (axis, index), c in zip(member.copies, copy, strict=True):
            here = here and index[place[axis]] == c
        found[place] = here
    return found


def by_member(groups, tree, measure, *, roles=None, where=ALL):
    """For each group what a measure says of each index, one row for each member."""
    leaves = {p: np.asarray(x, np.float64) for p, x in js.tree.leaves_with_paths(tree)}
    found = {}
    for name, group in groups.items():
        members = [
            m
            for m in group.members
            if (roles is None or m.role in roles) and where(m.path, leaves[m.path])
        ]
        if not group.prunable or not members:
            continue
        found[name] = np.zeros((len(members), *group.copies, group.size))
        for row, m in zip(found[name], members, strict=True):
            x = leaves[m.path]
            for copy in np.ndindex(*group.copies):
                for i in range(group.size):
                    mask = entries(group, m, x.shape, copy, i)
                    row[(*copy, i)] = measure(x, mask)
    return found


def lost(x, mask):
    """What the whole array has less with the index's slice set to zero."""
    return x.sum() - np.where(mask, 0, x).sum()


def same(got, wanted, **tolerance):
    assert list(got) == list(wanted)
    for name in wanted:
        assert got[name].shape == wanted[name].shape
        np.testing.assert_allclose(got[name], wanted[name], err_msg=name, **tolerance)


def compiled(function, *args):
    """The dicts that it gives, by one program in place of hundreds.

    They keep their order, which JAX would sort.
    """
    orders = []

    def values(*args):
        found = function(*args)
        orders.extend(map(list, found))
        return [list(scores.values()) for scores in found]

    found = jax.device_get(jax.jit(values)(*args))
    return [dict(zip(*pair, strict=True)) for pair in zip(orders, found, strict=True)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        *("grouped", "attention_flax"),
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in ("mlp", "residual", "attention_separate", "moe")
        ),
    ],
)
def test_scores_are_what_zeroing_the_slices_takes_away(name):
    groups, _, scores = built(name)
    rows = by_member(groups, scores, lost)
    assert rows
    # What is made of the sums of the members knows nothing of the model.
    all_three = name in {"residual", "grouped"}
    reductions = ("sum", "mean", "max", "prod") if all_three else ("sum",)
    one = functools.partial(js.channels.channel_scores, groups, where=ALL)
    found = compiled(lambda x: [one(x, reduce=r) for r in reductions], scores)
    for reduce, got in zip(reductions, found, strict=True):
        wanted = {n: getattr(np, reduce)(x, axis=0) for n, x in rows.items()}
        same(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name", ["scan", pytest.param("residual", marks=pytest.mark.exhaustive)]
)
def test_by_default_kernels_count_and_where_chooses_others(name):
    groups, _, scores = built(name)
    default = by_member(groups, scores, lost, where=js.tree.default_where)
    kernels, got = compiled(
        lambda x: [
            js.channels.channel_scores(groups, x),
            js.channels.channel_scores(groups, x, where=r"scale$"),
        ],
        scores,
    )
    wanted = {n: x.sum(0) for n, x in default.items()}
    same(kernels, wanted, rtol=1e-10, atol=1e-10)
    scale = by_member(groups, scores, lost, where=lambda p, _: p.endswith("scale"))
    same(got, {n: x.sum(0) for n, x in scale.items()}, rtol=1e-10)
    assert len(scale) < len(default) or name == "residual"


def hand_made(*members, size, copies=()):
    found = tuple(
        js.coupling.Member(path, axis, np.asarray(index, np.int32), at, role)
        for path, axis, index, at, role in members
    )
    none = frozenset()
    batched = tuple(f"b{i}" for i in range(len(copies)))
    return {
        "g": js.coupling.Group("g", size, found, batched, copies, none, (), none, None)
    }


def test_what_has_no_index_has_no_part_and_members_may_share_a_parameter():
    groups = hand_made(
        ("w", 1, [2, -1, 0, 1, 0], (), "output"),
        ("w", 0, [0, 1, 2], (), "input"),
        ("v", 0, [-1, -1, 1, 1], (), "input"),
        size=3,
    )
    w = np.arange(15, dtype=np.float32).reshape(3, 5)
    v = np.array([100, 100, 1, 2], np.float32)
    columns = np.array([w[:, 2].sum() + w[:, 4].sum(), w[:, 3].sum(), w[:, 0].sum()])
    rows = w.sum(1)
    one = functools.partial(js.channels.channel_scores, groups, where=ALL)
    total, mean, most, times, first, apart = compiled(
        lambda x, negative: [
            one(x),
            one(x, reduce="mean"),
            one(negative, reduce="max"),
            one(x, reduce="prod"),
            one(x, reduce="first"),
            one({"v": x["v"], "w": x["w"] - 5}, absolute=True),
        ],
        {"v": v, "w": w},
        {"v": -v, "w": -w},
    )
    np.testing.assert_allclose(total["g"], columns + rows + [0, 3, 0])
    # Only the members that have an index are averaged, and compared.
    np.testing.assert_allclose(mean["g"], (columns + rows + [0, 3, 0]) / [2, 3, 2])
    wanted = np.maximum(-columns, -rows) * [1, 0, 1] - [0, 3, 0]
    np.testing.assert_allclose(most["g"], wanted)
    np.testing.assert_allclose(times["g"], columns * rows * [1, 3, 1])
    np.testing.assert_allclose(first["g"], columns)
    wanted = abs(columns - [30, 15, 15]) + abs(rows - 25) + [0, 3, 0]
    np.testing.assert_allclose(apart["g"], wanted)


def test_copies_may_come_in_any_order():
    heads = np.repeat([1, 0], 3)  # the second head first, its indices backwards
    groups = hand_made(
        ("w", 1, [2, 1, 0, 0, 1, 2], ((1, heads),), "output"), size=3, copies=(2,)
    )
    w = np.arange(12, dtype=np.float32).reshape(2, 6)
    got = jax.jit(lambda w: js.channels.channel_scores(groups, {"w": w})["g"])(w)
    np.testing.assert_array_equal(got, [[12, 14, 16], [10, 8, 6]])
    # The index along one axis, the head along a later one.
    groups = hand_made(
        ("w", 0, [0, 1, 2], ((1, np.arange(2)),), "output"), size=3, copies=(2,)
    )
    w = np.arange(6, dtype=np.float32).reshape(3, 2)
    got = jax.jit(lambda w: js.channels.channel_scores(groups, {"w": w})["g"])(w)
    np.testing.assert_array_equal(got, w.T)


def ones(*shape):
    return np.ones(shape, np.float32)


def mlp_groups():
    params = {"up": ones(4, 256), "down": ones(256, 3)}
    apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    return js.coupling.groups(js.trace(apply_fn, params, ones(2, 4))), params


def normal(seed, tree):
    rng = np.random.default_rng(seed)
    draw = lambda w: jax.device_put(rng.normal(size=w.shape).astype(np.float32))
    return jax.tree.map(draw, tree)


def test_sixteen_bit_scores_are_added_up_in_float32():
    params = {"up": ones(4, 4), "down": ones(4, 512)}
    apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    groups = js.coupling.groups(js.trace(apply_fn, params, ones(2, 4)))
    scores = jax.tree.map(lambda w: np.full(w.shape, 1.0078125, jnp.bfloat16), params)
    got = jax.jit(lambda x: js.channels.channel_scores(groups, x))(scores)["up[1]"]
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.full(4, 516 * 1.0078125))


def test_jitted_it_is_the_same_and_does_not_compile_again(compilations):
    groups, params = mlp_groups()
    scores, others = normal(0, params), normal(1, params)
    jitted = jax.jit(lambda scores: js.channels.channel_scores(groups, scores))
    np.testing.assert_allclose(
        jitted(scores)["up[1]"],
        js.channels.channel_scores(groups, scores)["up[1]"],
        1e-5,
    )
    with compilations() as found:
        jitted(others)
    assert found.names == []


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_scores_are_added_up_where_they_lie(kind):
    groups, params = mlp_groups()
    scores = normal(1, params)
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=types)
    put = lambda x, *spec: jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    spread = {"up": put(scores["up"], "x", "y"), "down": put(scores["down"], "x", None)}
    one = jax.jit(lambda scores: js.channels.channel_scores(groups, scores))
    wanted = one(scores)["up[1]"]
    exactly = np.testing.assert_array_equal
    exactly(js.channels.channel_scores(groups, spread)["up[1]"], wanted)
    compiled = one.lower(spread).compile().as_text()
    exactly(one(spread)["up[1]"], wanted)
    # Only the sums move: what is gathered is no matrix.
    gathered = [x for x in compiled.splitlines() if " all-gather(" in x]
    assert not any("[4,256]" in x or "[256,3]" in x for x in gathered)


def test_scores_of_heads_are_the_same_on_one_device_and_on_many():
    """Several places of a sharded axis make one index."""
    members = [("w", 1, np.repeat(range(8), 16), (), "output")]
    groups = hand_made(*members, size=8)
    w = np.random.default_rng(2).normal(size=(64, 128)).astype(np.float32) ** 3
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    one = jax.jit(lambda scores: js.channels.channel_scores(groups, scores)["g"])
    for spec in ((None, "x"), ("x", None)):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        got = one({"w": jax.device_put(w, sharding)})
        np.testing.assert_array_equal(got, one({"w": w}))
    np.testing.assert_allclose(
        one({"w": w}), np.asarray(w, np.float64).sum(0).reshape(8, 16).sum(1), 1e-4
    )


def test_errors_say_what_is_expected():
    groups, params = mlp_groups()
    with pytest.raises(ValueError, match=r"reduce='gate': expected .*'first'"):
        js.channels.channel_scores(groups, params, reduce="gate")
    with pytest.raises(ValueError, match=r"down: group 'up\[1\]' lies in it.*no such"):
        js.channels.channel_scores(groups, {"up": params["up"]})
    with pytest.raises(ValueError, match=r"down: .*sizes \(256,\) along .* \(0,\)"):
        js.channels.channel_scores(groups, params | {"down": ones(255, 3)})
    with pytest.raises(ValueError, match="matches none of the 2 parameters"):
        js.channels.channel_scores(groups, params, where="kernel")
    integers = params | {"down": np.ones((256, 3), np.int32)}
    with pytest.raises(TypeError, match="down: scores must be real floating-point"):
        js.channels.channel_scores(groups, integers, where="down")
    frozen = {name: g for name, g in groups.items() if not g.prunable}
    with pytest.raises(ValueError, match="none of the 2 is prunable"):
        js.channels.channel_scores(frozen, params)
    bias = {"up": params["up"], "down": params["down"], "bias": ones(3)}
    with pytest.raises(ValueError, match=r"none of the 1 prunable ones has a member"):
        js.channels.channel_scores(groups, bias, where="bias")


def test_both_axes_of_a_square_parameter_count():
    combos = list(itertools.product(range(3), repeat=2))
    w = np.array([3**a + 10 * b for a, b in combos], np.float32).reshape(3, 3)
    groups = hand_made(
        ("w", 0, range(3), (), "input"), ("w", 1, range(3), (), "output"), size=3
    )
    got = jax.jit(lambda w: js.channels.channel_scores(groups, {"w": w})["g"])(w)
    np.testing.assert_allclose(got, w.sum(0) + w.sum(1))
