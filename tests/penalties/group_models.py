"""Small models with groups of every kind, and what their slices are, told slowly."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js

PRODUCERS = ("output", "batch", "other")
ALL = ("input", *PRODUCERS)
SHAPES = {
    "mlp": {"a": (5, 8), "a_bias": (8,), "b": (8, 6), "b_bias": (6,), "c": (6, 3)},
    "attention": {
        "in": (5, 6), "q": (6, 2, 4), "k": (6, 2, 4), "v": (6, 2, 4), "v_bias": (2, 4),
        "o": (2, 4, 6), "out": (6, 3),
    },
    "conv": {
        "a": (3, 3, 3, 8), "a_bias": (8,), "scale": (8,), "b": (3, 3, 4, 8),
        "b_bias": (8,), "c": (8, 3),
    },
}  # fmt: skip


def mlp(p, x):
    h = jnp.tanh(x @ p["a"] + p["a_bias"][None])
    h = jnp.tanh(h @ p["b"] + p["b_bias"][None])
    return h @ p["c"]


def attention(p, x):
    h = x @ p["in"]
    q = jnp.einsum("bte,ehd->bthd", h, p["q"])
    k = jnp.einsum("bte,ehd->bthd", h, p["k"])
    v = jnp.einsum("bte,ehd->bthd", h, p["v"]) + p["v_bias"][None, None]
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
    mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
    return (h + jnp.einsum("bthd,hde->bte", mixed, p["o"])) @ p["out"]


def conv(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    run = lambda x, w, g: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=g
    )
    h = run(x, p["a"], 1) + p["a_bias"][None, None, None]
    h = jnp.tanh(h * p["scale"][None, None, None])
    h = jnp.tanh(run(h, p["b"], 2) + p["b_bias"][None, None, None])
    return jnp.mean(h, axis=(1, 2)) @ p["c"]


MODELS = {"mlp": mlp, "attention": attention, "conv": conv}
INPUTS = {"mlp": (16, 5), "attention": (4, 3, 5), "conv": (2, 4, 4, 3)}


def make(name, *, dtype="float32", seed=0, scale=1.0):
    """Parameters, an example input and the prunable groups of a model."""
    params, x, groups = made(name, dtype, seed, scale)
    return dict(params), x, dict(groups)


@functools.cache
def made(name, dtype, seed, scale):
    rng = np.random.default_rng(seed)
    draw = lambda shape, scale=1.0: jax.device_put(
        (scale * rng.standard_normal(shape)).astype(jnp.dtype(dtype))
    )
    params = {path: draw(shape, scale) for path, shape in SHAPES[name].items()}
    x = draw(INPUTS[name])
    return params, x, js.coupling.groups(js.trace(MODELS[name], params, x)).prunable


def with_values(params, f):
    """The same leaves with `f(path, values)` of their NumPy values, in their type."""
    return {
        p: jax.device_put(np.asarray(f(p, np.array(w))).astype(w.dtype))
        for p, w in params.items()
    }


def indices(group):
    """All (copy, index) of a group."""
    return itertools.product(np.ndindex(*group.copies), range(group.size))


def entries(group, copy, index, shapes, *, roles=PRODUCERS):
    """Bools by path: the slices of one index of one copy."""
    found = {}
    for member in group.members:
        if member.role not in roles:
            continue
        mask = np.ones(shapes[member.path], bool)
        along = [(member.axis, member.index == index)]
        along += [
            (axis, at == c) for (axis, at), c in zip(member.copies, copy, strict=True)
        ]
        for axis, here in along:
            mask &= here.reshape([-1 if a == axis else 1 for a in range(mask.ndim)])
        found[member.path] = found.get(member.path, np.zeros_like(mask)) | mask
    return found


def slices(groups, tree, *, roles=PRODUCERS):
    """By (group, copy, index) its entries in a tree, one float64 vector."""
    arrays = {p: np.asarray(w).astype(np.float64) for p, w in tree.items()}
    shapes = {p: w.shape for p, w in arrays.items()}
    return {
        (name, copy, index): np.concatenate([
            arrays[p][mask]
            for p, mask in entries(group, copy, index, shapes, roles=roles).items()
        ])
        for name, group in groups.items()
        for copy, index in indices(group)
    }


def scaled(groups, tree, factor, *, roles=PRODUCERS):
    """A float64 tree whose slices are multiplied by `factor[group, copy, index]`."""
    arrays = {p: np.asarray(w).astype(np.float64) for p, w in tree.items()}
    shapes = {p: w.shape for p, w in arrays.items()}
    for name, group in groups.items():
        for copy, index in indices(group):
            found = entries(group, copy, index, shapes, roles=roles)
            for p, mask in found.items():
                arrays[p] = np.where(
                    mask, arrays[p] * factor[name, copy, index], arrays[p]
                )
    return arrays


def assert_bits_equal(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


def assert_sharded_alike(make, name):
    """One step with shardings that are part of the types gives the same updates."""
    params, _, groups = make_batched(name)
    specs = {"a": P(None, None, None, "x"), "a_bias": P("x"), "c": P("x")}
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    step = lambda p: make(groups).update(p, make(groups).init(p), p)[0]
    expected = jax.jit(step)(params)
    with jax.set_mesh(mesh):
        put = {
            p: jax.device_put(np.asarray(w), NamedSharding(mesh, specs.get(p, P())))
            for p, w in params.items()
        }
        got = jax.jit(step)(put)
    for p, u in expected.items():
        np.testing.assert_allclose(np.asarray(got[p]), np.asarray(u), atol=1e-6)
        assert got[p].sharding.is_equivalent_to(put[p].sharding, u.ndim)


def make_batched(name):
    params, x, groups = make(name)
    return params, x, {n: g for n, g in groups.items() if g.copies}
