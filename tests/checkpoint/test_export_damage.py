"""Exports whose bits are flipped, or that other programs and versions wrote."""

import json
import struct

import damage
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxsparse as js

RNG = np.random.default_rng(0)
PARAMS = {
    "b": {"kernel": RNG.standard_normal((8, 12)), "half": np.ones(4, jnp.bfloat16)},
    "mask": RNG.random(40) < 0.5,
}
NAMES = ["b/half", "b/kernel", "mask"]
DROP = js.coupling.Drop({"b/kernel[1]": np.array([0, 2])}, {"b/kernel[1]": 14})


def same(read):
    expected = {"b/half": PARAMS["b"]["half"], "b/kernel": PARAMS["b"]["kernel"]}
    expected["mask"] = PARAMS["mask"]
    assert list(read.params) == NAMES
    for name, x in read.params.items():
        assert (x.dtype, x.shape) == (expected[name].dtype, expected[name].shape)
        assert x.tobytes() == expected[name].tobytes()
    indices = {name: i.tolist() for name, i in read.drop.indices.items()}
    return indices == {"b/kernel[1]": [0, 2]} and read.drop.sizes == DROP.sizes


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    "count", [10, pytest.param(100, marks=pytest.mark.exhaustive)], ids=str
)
def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path, ending, count):
    file = tmp_path / f"m{ending}"
    js.checkpoint.export(file, PARAMS, drop=DROP)
    load, found = js.checkpoint.load_export, 0
    for _, bit in damage.places([file], count):
        got = []
        with damage.flipped(file, bit):
            said = damage.error_of(lambda got=got: got.append(load(file)))
        if said is None:
            assert same(got[0]), bit
        else:
            found += 1
            assert str(file) in said, bit
    assert found > count / 2  # a .npz has dates and the like
    assert same(js.checkpoint.load_export(file))


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_every_bit_of_an_array_is_looked_at(tmp_path, ending, name):
    file = tmp_path / f"m{ending}"
    js.checkpoint.export(file, PARAMS, drop=DROP)
    x = js.checkpoint.load_export(file).params[name]
    begin = file.read_bytes().index(x.tobytes())
    for bit in RNG.integers(8 * begin, 8 * (begin + x.nbytes), 20):
        message = rf"m\{ending}: {name} cannot be read as it was written: .*(CRC|crc)"
        with (
            damage.flipped(file, int(bit)),
            pytest.raises(ValueError, match=message),
        ):
            js.checkpoint.load_export(file)


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_a_file_that_is_cut(tmp_path, ending):
    file = tmp_path / f"m{ending}"
    js.checkpoint.export(file, PARAMS)
    whole = file.read_bytes()
    for length in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"m\{ending}: .*is damaged"):
            js.checkpoint.load_export(file)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        js.checkpoint.load_export(file)


def test_another_array_under_the_same_name(tmp_path):
    file = tmp_path / "m.npz"
    js.checkpoint.export(file, {"a": np.ones(3)})
    with np.load(file) as read:
        entries = dict(read)
    np.savez(file, **entries | {"params/a": np.zeros(3)})
    with pytest.raises(ValueError, match=r"a cannot be read .*its CRC-32 is"):
        js.checkpoint.load_export(file)
    np.savez(file, **entries | {"params/a": np.ones(4)})
    with pytest.raises(ValueError, match=r"a cannot .*float64\[4\], what was written"):
        js.checkpoint.load_export(file)
    note = json.loads(str(entries["note"])) | {"types": {"a": "float32"}}
    np.savez(file, **entries | {"note": np.array(json.dumps(note))})
    with pytest.raises(ValueError, match=r"its text cannot be read .*CRC-32"):
        js.checkpoint.load_export(file)


def test_files_of_the_version_before_are_read(tmp_path):
    half = np.array([1, 2], jnp.bfloat16)
    types = {"types": {"b": "float32", "a": "bfloat16", "c": "int64"}}
    drop = {"drop": {"indices": {"b[0]": [1]}, "sizes": {"b[0]": 4}}}
    text = json.dumps(types | drop)
    ones, narrowed = np.ones((3, 2), np.float32), np.array([5, 7], np.int32)
    arrays: dict = {"params/b": ones, "params/a": half.view("u2"), "params/c": narrowed}
    np.savez(tmp_path / "m.npz", note=np.array(text), **arrays)
    save_file({"b": ones, "c": narrowed}, tmp_path / "s.safetensors")
    data = (tmp_path / "s.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, end = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    header["a"] = {"dtype": "BF16", "shape": [2], "data_offsets": [end, end + 4]}
    header["__metadata__"] = {"jaxsparse": text}
    new = json.dumps(header).encode()
    body = data[8 + length :] + half.tobytes()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + body)
    for ending in (".npz", ".safetensors"):
        read = js.checkpoint.load_export(tmp_path / f"m{ending}")
        assert list(read.params) == ["b", "a", "c"]
        np.testing.assert_array_equal(read.params["b"], ones)
        np.testing.assert_array_equal(read.params["a"], half)
        assert read.params["a"].dtype == half.dtype
        assert read.params["c"].tolist() == [5, 7]
        assert read.drop.sizes == {"b[0]": 4}


def test_a_file_of_another_program(tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: not a file of js\.ch"):
        js.checkpoint.load_export(tmp_path / "other.safetensors")
    with open(tmp_path / "one.npz", "wb") as file:
        np.save(file, np.ones(2))
    with pytest.raises(ValueError, match=r"one\.npz: the file cannot be read"):
        js.checkpoint.load_export(tmp_path / "one.npz")
