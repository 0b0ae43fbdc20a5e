"""Packed kernels lie where the kernels did, split along layers and outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse import formats

FORMATS = {
    "bitmap": (formats.Bitmap, js.Unstructured()),
    "csr": (formats.Csr16, js.Unstructured()),
    "2:4": (js.NM(2, 4), js.NM(2, 4)),
    "balanced": (js.Balanced((1, 4)), js.Balanced((1, 4))),
    "tiles": (js.Block((2, 2)), js.Block((2, 2))),
}
KERNELS = {
    "outputs": ((16, 32), js.Axes((0,), (1,)), P(None, "x")),
    "layers": ((8, 16, 8), js.Axes((1,), (2,), (0,)), P("x")),
    "heads": ((16, 8, 4), js.Axes((0,), (1, 2)), P(None, "x")),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if few else pytest.mark.exhaustive)
        for name in FORMATS
        for kind in (AxisType.Auto, AxisType.Explicit)
        for few in [(kind == AxisType.Explicit) == (name in ("bitmap", "tiles"))]
    ],
    ids=str,
)
def test_packed_kernels_lie_as_kernels_do(name, kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    format, pattern = FORMATS[name]
    rng = np.random.default_rng(0)
    params = {
        k: jax.device_put(
            rng.standard_normal(shape).astype(np.float32), NamedSharding(mesh, spec)
        )
        for k, (shape, _, spec) in KERNELS.items()
    }
    axes = {k: a for k, (_, a, _) in KERNELS.items()}
    masks = js.patterns.masks(params, 0.5, pattern=pattern, axes=axes, where=".")
    packed = formats.pack(params, masks, format=format, axes=axes)
    whole = formats.unpack(packed)
    for k, (shape, _, _) in KERNELS.items():
        values = packed[k].values
        assert values.addressable_shards[0].data.nbytes * 8 == values.nbytes
        assert whole[k].sharding.is_equivalent_to(params[k].sharding, len(shape))
        expected = np.where(np.asarray(masks[k]), np.asarray(params[k]), 0)
        np.testing.assert_array_equal(whole[k], expected)


def test_a_kernel_split_along_its_inputs_is_packed_on_all_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    w = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("x")))
    mask = {"w": jnp.arange(64).reshape(16, 4) % 3 == 0}
    axes = js.Axes((0,), (1,))
    packed = formats.pack({"w": w}, mask, format=formats.Csr16, axes=axes)
    assert packed["w"].values.sharding.is_fully_replicated
    np.testing.assert_array_equal(formats.unpack(packed)["w"], mask["w"])
