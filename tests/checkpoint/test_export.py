"""Plain files: bit for bit, whole or not at all, with what was dropped."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

PARAMS = {
    "b": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)},
    "a": [jnp.arange(3), jnp.array(True)],
}
DROP = js.coupling.Drop(
    {"b/kernel[1]": np.array([[0, 2], [1, 3]]), "c[0]": np.array([4])},
    {"b/kernel[1]": 8, "c[0]": 5},
)


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_round_trip(tmp_path, ending):
    path = tmp_path / f"model{ending}"
    js.checkpoint.export(path, PARAMS, drop=DROP)
    js.checkpoint.export(path, PARAMS, drop=DROP)  # over the first
    assert list(tmp_path.iterdir()) == [path]
    read = js.checkpoint.load_export(path)
    back = jax.tree.unflatten(jax.tree.structure(PARAMS), list(read.params.values()))
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(PARAMS), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert read.drop is not None
    assert read.drop.sizes == DROP.sizes
    jax.tree.map(np.testing.assert_array_equal, read.drop.indices, DROP.indices)
    js.checkpoint.export(path, PARAMS)
    assert js.checkpoint.load_export(path).drop is None


def test_a_file_stays_whole_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    js.checkpoint.export(path, PARAMS)
    before = path.read_bytes()

    def broken(file, **arrays):
        with open(file, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="disk full"):
        js.checkpoint.export(path, {"a": jnp.zeros(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_narrowed_model_in_another_process(tmp_path):
    """The model's code, the file and nothing else."""
    apply_fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
    x = jnp.ones((4, 3))
    trace = js.trace(apply_fn, params, x)
    drop = js.coupling.Drop({"a[1]": np.array([0, 5])}, {"a[1]": 8})
    small = js.narrowing.narrow(trace, params, drop)
    js.checkpoint.export(tmp_path / "m.npz", small.params, drop=drop)

    abstract = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    again = js.trace(apply_fn, abstract, x)
    read = js.checkpoint.load_export(tmp_path / "m.npz")
    run = js.narrowing.narrow(again, abstract, read.drop).apply_fn
    loaded = jax.tree.unflatten(again.treedef, list(read.params.values()))
    np.testing.assert_array_equal(run(loaded, x), small.apply_fn(small.params, x))


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_no_other_package_is_needed(tmp_path, monkeypatch, ending):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    js.checkpoint.export(tmp_path / f"m{ending}", PARAMS)
    assert len(js.checkpoint.load_export(tmp_path / f"m{ending}").params) == 4


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"ending with \.npz or \.safetensors"):
        js.checkpoint.export(tmp_path / "m.pt", PARAMS)
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    with pytest.raises(ValueError, match=r"other\.npz: not a file of"):
        js.checkpoint.load_export(tmp_path / "other.npz")


def test_a_drop_is_saved_like_any_tree(tmp_path):
    params = {"w": jnp.ones(3), "drop": DROP}
    js.checkpoint.save(tmp_path / "run", step=1, params=params)
    back = js.checkpoint.restore(tmp_path / "run", params=params).params["drop"]
    assert back.sizes == DROP.sizes
    jax.tree.map(np.testing.assert_array_equal, back.indices, DROP.indices)
