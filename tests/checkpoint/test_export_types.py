"""Every type in both formats: the same value and type, or an error with its path."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import jaxsparse as js

ENDINGS = [".npz", ".safetensors"]
NUMPY = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),
    *("uint64", "float16", "float32", "float64", "complex64", ">f4", ">i8"),
]
# Found, not listed: a new version brings new ones.
NARROW = [
    name
    for name in dir(ml_dtypes)
    if isinstance(getattr(ml_dtypes, name), type)
    and issubclass(getattr(ml_dtypes, name), np.generic)
]
EXTREMES = {
    "int64": [2**40 + 5, 7, -(2**63)],
    ">i8": [2**40 + 5, 7, -(2**63)],
    "uint64": [2**64 - 1, 0, 1],
    "float64": [1e300, -0.0, 5e-324],
    "float16": [6e-8, 65504, -0.0],
    "bool": [True, False, True],
}


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def values(name):
    x = np.array(
        EXTREMES.get(name, [1, 0, 1]), dtype=object if name == "uint64" else None
    )
    x = x.astype(dtype_of(name))
    two = np.stack([x, x[::-1]])
    return {
        "row": x,
        "turned": two.T,  # not in C order
        "every other": two[:, ::2],
        "scalar": x[0].reshape(()),
        "empty": two[:0],
    }


def assert_same(read, written):
    assert list(read) == list(written)
    for path, x in read.items():
        assert type(x) is np.ndarray, path
        assert x.dtype == written[path].dtype, path
        assert x.shape == written[path].shape, path
        assert x.tobytes() == written[path].tobytes(), path


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", [*NUMPY, *NARROW])
def test_a_type_comes_back(tmp_path, name, ending):
    tree = dict(sorted(values(name).items()))
    js.checkpoint.export(tmp_path / f"m{ending}", tree)
    assert_same(js.checkpoint.load_export(tmp_path / f"m{ending}").params, tree)


def test_the_table_has_the_types_of_the_field():
    assert {"bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"} <= set(NARROW)
    assert {"int2", "float4_e2m1fn", "float8_e8m0fnu"} <= set(NARROW)


@pytest.mark.parametrize("name", ["complex128", "longdouble"])
def test_types_wider_than_safetensors(tmp_path, name):
    tree = {"a": {"b": np.array([1, 2], name)}}
    js.checkpoint.export(tmp_path / "m.npz", tree)
    read = js.checkpoint.load_export(tmp_path / "m.npz").params
    assert_same(read, {"a/b": tree["a"]["b"]})
    with pytest.raises(TypeError, match=r"a/b: a \.safetensors file has no .*\.npz"):
        js.checkpoint.export(tmp_path / "m.safetensors", tree)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (np.array(["x"]), TypeError, r"a/b: only numbers and bools .* got <U1"),
        ("text", TypeError, r"a/b: only numbers and bools .*\(str\)"),
        (np.array([None]), TypeError, r"a/b: only numbers .* got object"),
        (2**70, TypeError, r"a/b: only numbers .* got object \(int\)"),
        (np.array(["2020"], "M8[D]"), TypeError, r"a/b: only numbers .*datetime64"),
        (np.zeros(2, [("x", "f4")]), TypeError, r"a/b: only numbers"),
        (jax.random.key(0), TypeError, r"a/b: a typed random key.*key_data"),
        (jax.ShapeDtypeStruct((2,), "f4"), TypeError, r"a/b: got .* no value"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_number_is_an_error(tmp_path, ending, leaf, error, message):
    with pytest.raises(error, match=message):
        js.checkpoint.export(tmp_path / f"m{ending}", {"a": {"b": leaf}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_leaves_of_jax_and_python_numbers(tmp_path, ending):
    tree = {
        "half": jnp.asarray(np.arange(3), jnp.bfloat16),
        "narrow": jnp.asarray(np.arange(3), jnp.float8_e5m2),
        "number": 3,
        "real": 0.1,
        "scalar": np.float64(1e300),
    }
    js.checkpoint.export(tmp_path / f"m{ending}", tree)
    expected = {name: np.asarray(x) for name, x in tree.items()}
    assert_same(js.checkpoint.load_export(tmp_path / f"m{ending}").params, expected)


@pytest.mark.parametrize("ending", ENDINGS)
def test_loading_does_not_depend_on_x64(tmp_path, ending):
    tree = {"i": np.array([2**40 + 5, 7]), "x": np.array([1e300])}
    js.checkpoint.export(tmp_path / f"m{ending}", tree)
    with jax.enable_x64(True):
        assert_same(js.checkpoint.load_export(tmp_path / f"m{ending}").params, tree)
    assert_same(js.checkpoint.load_export(tmp_path / f"m{ending}").params, tree)


@pytest.mark.parametrize("ending", ENDINGS)
def test_odd_names_and_no_parameters(tmp_path, ending):
    file = tmp_path / f"m{ending}"
    names = ["x", "x.npy", "note", "../up", "\u00fc \"'\n", "note_crc32", "dtype"]
    tree = {name: np.full(2, i) for i, name in enumerate(sorted(names))}
    js.checkpoint.export(file, tree)
    assert_same(js.checkpoint.load_export(file).params, tree)
    js.checkpoint.export(file, {})
    assert js.checkpoint.load_export(file).params == {}


def test_a_name_that_safetensors_keeps_for_itself(tmp_path):
    with pytest.raises(ValueError, match=r"__metadata__: .* Rename the parameter"):
        js.checkpoint.export(tmp_path / "m.safetensors", {"__metadata__": np.ones(2)})


def test_the_package_reads_what_is_written(tmp_path):
    file = tmp_path / "m.safetensors"
    known = ["bool", "int8", "uint16", "int32", "uint64", "int64", "float16"]
    tree = {name: values(name)["turned"] for name in [*known, "float64", "complex64"]}
    tree |= {"int4": values("int4")["row"], "scalar": np.float32(3), "e": np.ones((0,))}
    js.checkpoint.export(file, tree)
    with safe_open(file, framework="numpy") as opened:
        assert set(opened.keys()) == set(tree)
        for name, x in tree.items():
            found = opened.get_tensor(name)
            expected = x.view(np.uint8) if name == "int4" else x
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
    for name, code in [("bfloat16", "BF16"), ("float8_e4m3fn", "F8_E4M3")]:
        js.checkpoint.export(file, {"x": values(name)["row"]})
        assert header_of(file)["x"]["dtype"] == code
        with safe_open(file, framework="numpy") as opened:
            assert opened.get_slice("x").get_shape() == [3]


def header_of(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    return json.loads(data[8 : 8 + length])
