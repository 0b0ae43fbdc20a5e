"""Weights below the normal numbers are weights: XLA on CPU reads them as zeros."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse._zeros import nonzero

KINDS = [
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e4m3b11fnuz", "float8_e3m4", "float8_e4m3", "float8_e8m0fnu"),
    *("float4_e2m1fn", "int8", "int4", "uint32", "bool"),
]
TINY = np.float32(1e-40)
PARAMS = {"w": jax.device_put(np.array([[3, TINY, 2, -TINY]], np.float32))}
KEEP = {"w": np.array([[True, False, True, False]])}


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def samples(dtype):
    """Zeros of both signs, the least numbers of both signs, and others."""
    if dtype.kind == "c":
        least = np.finfo(dtype).smallest_subnormal
        parts = [(0, 0), (-0.0, 0.0), (0, least), (-least, -0.0), (1, 0), (np.nan, 0)]
        return np.array([complex(*p) for p in parts], dtype), [0, 0, 1, 1, 1, 1]
    if dtype.kind in "biu" or "int" in dtype.name:
        return np.array([0, 1, 0, 1]).astype(dtype), [0, 1, 0, 1]
    if dtype.name == "float8_e8m0fnu":  # its bits 0 are 2**-127
        return np.array([0, 1], np.uint8).view(dtype), [1, 1]
    least = np.array(ml_dtypes.finfo(dtype).smallest_subnormal, dtype)
    zero = np.zeros((), dtype)
    # -0.0 is a NaN where there is one zero.
    x = np.stack([zero, np.asarray(-zero), least, np.asarray(-least), zero + 1])
    nan = np.array([np.nan]).astype(dtype)
    counts = [0, 0, 1, 1, 1]
    if np.isnan(nan.astype(np.float32)).all():
        x, counts = np.concatenate([x.astype(dtype), nan]), [*counts, 1]
    return x.astype(dtype), counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_zero_by_its_bits(kind):
    x, expected = samples(dtype_of(kind))
    assert nonzero(x).tolist() == [bool(n) for n in expected]
    assert nonzero(x[-1]).tolist() is bool(expected[-1])
    with jax.enable_x64(True):
        put = jax.device_put(x)
        assert put.dtype == x.dtype
        assert jax.jit(nonzero)(put).tolist() == [bool(n) for n in expected]


def test_a_random_key_is_no_zero():
    assert nonzero(jax.random.key(0)).tolist() is True


def test_tables_count_them():
    table = js.report.table(PARAMS, KEEP)
    assert (table.total.kept, table.total.leaked) == (2, 2)
    assert js.report.table(PARAMS).total.kept == 4
    wide = {"w": np.array([[3, 1e-320, 0.0, -0.0]])}
    assert js.report.table(wide).total.kept == 2


def test_they_leak():
    state = js.keep_sparse(KEEP).init(PARAMS)
    with pytest.raises(ValueError, match=r"2 pruned weights are not zero \(w: 2\)"):
        js.assert_sparse(state, PARAMS)
    wide = {"w": np.array([[3, 1e-320, 2, 0.0]])}
    with pytest.raises(ValueError, match=r"1 pruned weights are not zero \(w: 1\)"):
        js.assert_sparse(state, wide)
    prune = js.prune_schedule(0.5, every=1)
    with pytest.raises(ValueError, match=r"w: 2 weights are not zero under the adopt"):
        prune.adopt(optax.sgd(0.1).init(PARAMS), PARAMS, masks=KEEP)
    js.assert_sparse(state, js.patterns.apply(PARAMS, KEEP))


def test_a_step_counts_and_removes_them():
    prune = js.prune_schedule(0.5, every=js.schedules.at(100), zeros="train")
    state = prune.init(PARAMS)._replace(
        masks=jax.tree.map(jnp.asarray, KEEP), step=jnp.int32(1), updated=jnp.bool(1)
    )
    _, state = prune.update(PARAMS, state, PARAMS)
    assert int(state.leaked) == 2
    tx = prune.wrap(optax.sgd(0.1))
    prune_state, *rest = tx.init(PARAMS)
    masks = jax.tree.map(jnp.asarray, KEEP)
    updates, _ = tx.update(PARAMS, (prune_state._replace(masks=masks), *rest), PARAMS)
    moved = optax.apply_updates(PARAMS, updates)
    assert np.asarray(moved["w"]).view(np.uint32)[0, [1, 3]].tolist() == [0, 0]


def test_what_holds_zeros_lets_them_live():
    prune = js.prune_schedule(0.5, every=js.schedules.at(100))
    w = np.array([[3, TINY, 0, -0.0, 1, -TINY]], np.float32)
    with pytest.warns(UserWarning, match="w: 2 exact zeros"):
        state = prune.init({"w": jax.device_put(w)})
    assert state.masks["w"].tolist() == [[True, True, False, False, True, True]]


def test_a_channel_of_them_is_not_empty():
    apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    params = {
        "up": jax.device_put(np.array([[1, 0, TINY]], np.float32)),
        "down": jax.device_put(np.ones((3, 1), np.float32)),
    }
    x = jax.ShapeDtypeStruct((2, 1), np.float32)
    groups = js.coupling.groups(js.trace(apply_fn, params, x))
    drop = js.channels.zero_indices(params, groups.prunable)
    assert drop.indices["up[1]"].tolist() == [1]
