"""Arrays on many devices: saved from any sharding, restored onto any other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse import _bits

save, restore = js.checkpoint.save, js.checkpoint.restore


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return mesh_of(request.param)


SPECS = [P(), P("x"), P(None, "y"), P("y", "x"), P(("x", "y")), P("x", None)]


def make(sharding, shape=(16, 48)):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    arrays = {"w": values, "mask": values > 0}
    return arrays, jax.tree.map(lambda x: jax.device_put(x, sharding), arrays)


def shapes(tree, sharding):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def check(got, values, sharding):
    for name, value in values.items():
        np.testing.assert_array_equal(np.asarray(got[name]), value)
        assert got[name].sharding.is_equivalent_to(sharding, value.ndim), name
        assert got[name].committed


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        *((AxisType.Auto, spec) for spec in SPECS),
        (AxisType.Explicit, P("y", "x")),
        # The kind of the axes has no part in what is written.
        *(
            pytest.param(AxisType.Explicit, spec, marks=pytest.mark.exhaustive)
            for spec in SPECS
            if spec != P("y", "x")
        ),
    ],
    ids=str,
)
def test_any_sharding_to_any_other(tmp_path, kind, spec):
    mesh = mesh_of(kind)
    values, params = make(NamedSharding(mesh, spec))
    save(tmp_path, step=1, params=params)
    for other in SPECS:
        sharding = NamedSharding(mesh, other)
        got = restore(tmp_path, params=shapes(params, sharding)).params
        check(got, values, sharding)


def test_eight_devices_to_one_and_one_to_eight(tmp_path):
    eight = NamedSharding(jax.make_mesh((8,), ("d",)), P("d"))
    one = SingleDeviceSharding(jax.devices()[3])
    for step, (source, target) in enumerate([(eight, one), (one, eight)]):
        values, params = make(source)
        save(tmp_path, step=step, params=params)
        check(restore(tmp_path, params=shapes(params, target)).params, values, target)
        check(restore(tmp_path, params=make(target)[1]).params, values, target)
    # Without a sharding: the default device, free to go anywhere.
    got = restore(tmp_path, params=shapes(params, None)).params
    assert {x.committed for x in got.values()} == {False}
    np.testing.assert_array_equal(got["mask"], values["mask"])


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((4, 3), P("x")), ((4, 2), P("x", "y")), ((12, 5), P("x")), ((8,), P(("x", "y")))],
    ids=str,
)
def test_masks_whose_shards_hold_no_whole_bytes(tmp_path, mesh, shape, spec):
    sharding = NamedSharding(mesh, spec)
    values, params = make(sharding, shape)
    save(tmp_path, step=1, params=params)
    check(restore(tmp_path, params=params).params, values, sharding)


def test_bits_are_packed_where_they_are(mesh):
    mask = make(NamedSharding(mesh, P("x", "y")), (64, 32))[1]["mask"]
    axis = _bits.choose_axis(mask)
    bits = _bits.pack(mask, axis)
    assert bits.nbytes == mask.size / 8
    assert bits.sharding == mask.sharding
    assert bits.addressable_shards[0].data.size == mask.size / 8 / 8


def test_inside_a_mesh(tmp_path, mesh):
    sharding = NamedSharding(mesh, P("x", "y"))
    with jax.set_mesh(mesh):
        values, params = make(sharding)
        masks = {"w": params["mask"], "mask": jnp.asarray(np.array(True))}
        save(tmp_path, step=1, params=params, masks=masks)
        got = restore(tmp_path, params=params)
        check(got.params, values, sharding)
        check(got.masks, {"w": values["mask"]}, sharding)


def test_masks_lie_as_their_parameters(tmp_path, mesh):
    sharding = NamedSharding(mesh, P("x", "y"))
    _, arrays = make(sharding)
    params = {"w": arrays["w"], "channels": arrays["w"], "free": arrays["w"]}
    masks = {
        "w": arrays["mask"],
        "channels": jnp.asarray(np.arange(48)[None] % 3 == 0),
        "free": jnp.array(True),
    }
    save(tmp_path, step=1, params=params, masks=masks)
    got = restore(tmp_path, params=params).masks
    for name, spec in {"w": P("x", "y"), "channels": P(None, "y"), "free": P()}.items():
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(masks[name]))
        expected = NamedSharding(mesh, spec)
        assert got[name].sharding.is_equivalent_to(expected, got[name].ndim), name


def test_a_sharded_optimizer_state(tmp_path, mesh):
    sharding = NamedSharding(mesh, P("x", "y"))
    params = {"w": make(sharding)[1]["w"], "b": jnp.asarray(np.zeros(3, "f4"))}
    tx = js.prune_schedule(0.5, every=1, where="w").wrap(optax.adam(1e-3))
    state = tx.init(params)
    keys = jax.random.split(jax.random.key(0), 8)
    keys = jax.device_put(keys, NamedSharding(mesh, P("x")))
    save(tmp_path, step=1, params=params, opt_state=(state, keys))
    got = restore(tmp_path, params=params, opt_state=(state, keys))
    for x, y in zip(
        jax.tree.leaves(got.opt_state), jax.tree.leaves((state, keys)), strict=True
    ):
        assert x.sharding.is_equivalent_to(y.sharding, y.ndim)
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert got.opt_state[0][0].masks["w"].sharding.is_equivalent_to(sharding, 2)


def test_weak_types_on_many_devices(tmp_path, mesh):
    sharding = NamedSharding(mesh, P("x"))
    params = {"w": jax.device_put(jnp.full((8, 2), 0.5), sharding)}
    assert params["w"].weak_type
    save(tmp_path, step=1, params=params)
    got = restore(tmp_path, params=params).params["w"]
    assert got.weak_type
    assert got.sharding.is_equivalent_to(sharding, 2)
    assert np.asarray(got).tolist() == [[0.5, 0.5]] * 8


def test_templates_of_eval_shape_over_an_explicit_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, P("x"))
    values, params = make(sharding)
    save(tmp_path, step=1, params=params)
    template = jax.eval_shape(lambda x: x, params)  # its mesh is abstract
    with pytest.raises(ValueError, match=r"params mask: .* abstract mesh.*set_mesh"):
        restore(tmp_path, params=template)
    with jax.set_mesh(mesh):
        check(restore(tmp_path, params=template).params, values, sharding)
