"""A large checkpoint is read by parts, and comes back as if it were read at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse import _bits, _parts
from jaxsparse.checkpoint import _files, _orbax, _reading

PARAMS = {
    "a": jnp.arange(24.0).reshape(4, 6),
    "b": {"kernel": jnp.ones((3, 5), jnp.bfloat16), "none": jnp.zeros((0, 2))},
    "c": np.arange(7),
    "key": jax.random.key(3),
    "n": 3,
}
MASKS = jax.tree.map(lambda _: jnp.asarray(True), PARAMS) | {"a": PARAMS["a"] > 5}
ADAM = optax.adam(1e-3).init({"a": PARAMS["a"]})


def bits(x):
    if jnp.issubdtype(getattr(x, "dtype", int), jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


@pytest.fixture
def directory(tmp_path):
    js.checkpoint.save(
        tmp_path, step=1, params=PARAMS, opt_state=ADAM, masks=MASKS, extra={"a": 1}
    )
    return tmp_path


@pytest.mark.parametrize("least", [1, 50, 100])
def test_parts_are_the_whole(directory, monkeypatch, least):
    restore = lambda: js.checkpoint.restore(directory, params=PARAMS, opt_state=ADAM)
    parts, read = [], _reading._read_part
    counted = lambda *a, **k: parts.append(a) or read(*a, **k)
    monkeypatch.setattr(_reading, "_read_part", counted)
    whole = restore()
    assert len(parts) == 1
    monkeypatch.setattr(_reading, "_LEAST", least)
    monkeypatch.setattr(_parts, "_PARTS", 10**6)
    found = restore()
    assert len(parts) > 2
    assert jax.tree.structure(found) == jax.tree.structure(whole)
    for x, y, z in zip(
        *map(jax.tree.leaves, (found, whole, (1, PARAMS, ADAM, MASKS))), strict=False
    ):
        assert bits(x) == bits(y) == bits(z)
        assert type(x) is type(y)


def test_what_is_damaged_in_a_later_part_is_named(directory, monkeypatch):
    monkeypatch.setattr(_reading, "_LEAST", 1)
    monkeypatch.setattr(_parts, "_PARTS", 10**6)
    checked = _reading.checksums_of

    def flipped(arrays):
        found = checked(arrays)
        return {
            item: {n: crc ^ (n == "b/kernel") for n, crc in named.items()}
            for item, named in found.items()
        }

    monkeypatch.setattr(_reading, "checksums_of", flipped)
    with pytest.raises(ValueError, match="params b/kernel is not what was saved"):
        js.checkpoint.restore(directory, params=PARAMS)


def test_masks_as_bits_are_written_as_bools_are(tmp_path):
    masks = {"a": np.arange(30).reshape(5, 6) % 3 > 0, "b": np.ones((2, 0), bool)}
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), masks)
    packed = jax.tree.map(_bits.Packed.of, masks)
    stamps = []
    for name, tree in (("bools", masks), ("bits", packed)):
        path = js.checkpoint.save(tmp_path / name, step=1, params=params, masks=tree)
        stamps.append(_files.read_stamp(path))
        found = js.checkpoint.restore(tmp_path / name, params=params).masks
        jax.tree.map(np.testing.assert_array_equal, found, masks)
    assert stamps[0]["leaves"] == stamps[1]["leaves"]
    assert stamps[0]["checksums"] == stamps[1]["checksums"]


def test_an_array_larger_than_what_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(_orbax, "_WRITTEN_BYTES", 1)
    params = {"small": jnp.ones(3), "large": jnp.arange(40.0)}
    js.checkpoint.save(tmp_path, step=1, params=params)
    found = js.checkpoint.restore(tmp_path, params=params).params
    jax.tree.map(np.testing.assert_array_equal, found, params)
