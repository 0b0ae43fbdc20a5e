"""Selection within `shard_map`: shards of the masks that one device chooses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsparse as js

STACKED = js.Axes(input=(1,), output=(2,), batch=(0,))
SPECS = {"first": P("x"), "last": P(None, ("x", "y")), "stacked": P("y", None, "x")}
WHOLE = dict.fromkeys(SPECS, P())
GLOBAL = js.Unstructured("global")
exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


@functools.cache
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


@functools.cache
def scores():
    """Some numbers of all kinds, some with many ties, some so small that none wins."""
    rng = np.random.default_rng(0)
    return {
        "first": rng.standard_normal((16, 8)).astype(np.float32),
        "last": rng.integers(0, 4, (8, 16)).astype(np.float32),
        "stacked": rng.integers(1, 3, (4, 8, 8)).astype(np.float32) / 64,
    }


def select(tree, sparsity, *, pattern, axis_name=None):
    sparsity = None if isinstance(pattern, js.NM) else sparsity
    options = {"pattern": pattern, "axes": {"stacked": STACKED}}
    return js.patterns.masks(tree, sparsity, **options, axis_name=axis_name)


def in_shards(pattern, axis_name, *, specs=SPECS, check_vma=True):
    """The jitted function of the whole scores; masks are split as their scores are."""
    whole = functools.partial(select, pattern=pattern)
    shapes = jax.eval_shape(whole, scores(), np.float32(0.5))
    split = lambda spec, m: P(
        *(
            part if n > 1 else None
            for part, n in zip((*spec, *[None] * m.ndim), m.shape, strict=False)
        )
    )
    outs = {k: split(specs[k], shapes[k]) for k in specs}
    shard = functools.partial(select, pattern=pattern, axis_name=axis_name)
    options = {"in_specs": (specs, P()), "out_specs": outs, "check_vma": check_vma}
    return jax.jit(jax.shard_map(shard, mesh=mesh(), **options))


@pytest.mark.parametrize(
    ("pattern", "check_vma"),
    [
        (GLOBAL, True),
        (js.Unstructured("output"), False),
        (js.Channel(axis=-2, scope="global"), True),
        (js.NM(2, 4), True),
        exhaustive(GLOBAL, False),
        exhaustive(js.Unstructured(), True),
        exhaustive(js.Unstructured("output"), True),
        exhaustive(js.Channel(), False),
        exhaustive(js.Channel(reduce="max", scope="global"), True),
        exhaustive(js.Block((1, 1), scope="global"), False),
        exhaustive(js.Block((2, 1)), True),
        exhaustive(js.Balanced((2, 1)), True),
    ],
)
def test_masks_of_shards_are_those_of_one_device(pattern, check_vma):
    tiles = isinstance(pattern, js.Block | js.Balanced | js.NM)  # lie on one device
    specs = SPECS | ({"last": P(None, "x")} if tiles else {})
    shards = in_shards(pattern, specs, specs=specs, check_vma=check_vma)
    one = jax.jit(functools.partial(select, pattern=pattern))
    for sparsity in (0.7, 0.97):  # at the second no `stacked` is among the best
        sparsity = np.float32(sparsity)
        expected = one(scores(), sparsity)
        got = shards(scores(), sparsity)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_name_is_for_what_is_split_along_its_first_axis():
    specs = WHOLE | {"first": P("x"), "last": P("x")}
    got = in_shards(GLOBAL, "x", specs=specs)(scores(), np.float32(0.7))
    expected = select(scores(), 0.7, pattern=GLOBAL)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_whole_models_need_no_name_where_types_say_so():
    got = in_shards(GLOBAL, None, specs=WHOLE)(scores(), np.float32(0.7))
    expected = select(scores(), 0.7, pattern=GLOBAL)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_outside_of_shard_map_a_name_has_no_effect():
    got = select(scores(), 0.7, pattern=GLOBAL, axis_name="x")
    expected = select(scores(), 0.7, pattern=GLOBAL)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_each_device_may_have_a_model_of_its_own():
    specs = dict.fromkeys(SPECS, P("x"))
    for check_vma in (True, False):
        own = in_shards(GLOBAL, (), specs=specs, check_vma=check_vma)
        masks = own(scores(), np.float32(0.5))
        for i in range(4):
            part = lambda x, i=i: np.split(np.asarray(x), 4)[i]
            expected = select(jax.tree.map(part, scores()), 0.5, pattern=GLOBAL)
            jax.tree.map(
                np.testing.assert_array_equal, jax.tree.map(part, masks), expected
            )


@pytest.mark.parametrize(
    "pattern", [GLOBAL, js.Unstructured(), js.Channel(), js.Block((1, 1))], ids=repr
)
def test_shards_of_which_nothing_is_said_are_an_error(pattern):
    message = "first: .*scores differ along the mesh axes .'x'.*axis_name="
    with pytest.raises(ValueError, match=message):
        in_shards(pattern, None)(scores(), np.float32(0.5))
    with pytest.raises(ValueError, match=r"first: .*check_vma=False.*axis_name=\(\)"):
        in_shards(pattern, None, check_vma=False)(scores(), np.float32(0.5))


def test_what_is_said_of_shards_has_to_fit():
    wrong = {
        r"axis_name: \['z'\] are no axes of the mesh": "z",
        r"first: .*\['z'\] are no axes of the mesh": SPECS | {"first": P("z")},
        "has more axes than shape": SPECS | {"first": P(None, None, "x")},
        "axis_name must have exactly the structure": {"first": P("x")},
    }
    for message, axis_name in wrong.items():
        with pytest.raises(ValueError, match=message):
            in_shards(GLOBAL, axis_name)(scores(), np.float32(0.5))
    axes = {"stacked": js.Axes(input=(0, 2), output=(1,))}
    nm = {"pattern": js.NM(2, 4), "axes": axes, "where": "stacked"}
    f = lambda s: js.patterns.masks(s, **nm, axis_name=SPECS)
    with pytest.raises(ValueError, match=r"stacked: a shard of shape \(2, 8, 2\) ends"):
        jax.shard_map(f, mesh=mesh(), in_specs=(SPECS,), out_specs=SPECS)(scores())


def test_a_schedule_in_shards_trains_what_one_device_trains():
    params = {k: scores()[k] for k in ("first", "last")}
    specs = {"first": P("x"), "last": P()}
    grads = jax.tree.map(lambda w: w[::-1].copy(), params)

    def trained(axis_name):
        schedule = js.prune_schedule(
            js.schedules.polynomial(final=0.8, begin=0, end=3),
            every=1,
            score=js.scores.taylor,
            pattern=GLOBAL,
            axis_name=axis_name,
            zeros="train",
        )
        tx = schedule.wrap(optax.sgd(0.125, momentum=0.5))

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.jit(tx.init)(params)
        if axis_name is not None:
            like = lambda x: specs["first"] if jnp.shape(x) == (16, 8) else P()
            states = jax.tree.map(like, state)
            step = jax.shard_map(
                step,
                mesh=mesh(),
                in_specs=(specs, states, specs),
                out_specs=(specs, states),
            )
        step, now = jax.jit(step), params
        for _ in range(4):
            now, state = step(now, state, grads)
        return now, js.masks_of(state)

    (params_of_shards, masks_of_shards), (one, masks) = trained("x"), trained(None)
    jax.tree.map(np.testing.assert_array_equal, masks_of_shards, masks)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, params_of_shards, one)


@pytest.mark.parametrize("pattern", [GLOBAL, js.Channel(scope="global")], ids=str)
def test_what_is_gone_is_gone_in_all_shards(pattern):
    """Also a channel of which a shard has lost its part alone: it is not gone."""
    rng = np.random.default_rng(1)
    before = {k: rng.random(x.shape) > 0.2 for k, x in scores().items()}
    before["last"][:, :3] = before["first"][:4] = False
    axes = {"stacked": STACKED}
    choose = functools.partial(js.patterns.masks, pattern=pattern, axes=axes)
    shard = lambda tree, s, masks: choose(tree, s, masks=masks, axis_name=SPECS)
    many = jax.jit(
        jax.shard_map(shard, mesh=mesh(), in_specs=(SPECS, P(), SPECS), out_specs=SPECS)
    )
    half = np.float32(0.5)
    one = jax.jit(lambda tree, s, masks: choose(tree, s, masks=masks))
    for got, expected in zip(
        jax.tree.leaves(many(scores(), half, before)),
        jax.tree.leaves(one(scores(), half, before)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)
