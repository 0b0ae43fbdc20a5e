"""What is refused, and with which words."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

save, restore = js.checkpoint.save, js.checkpoint.restore


@pytest.fixture
def params():
    return {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            {"dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.zeros(4)}},
            r"/1 is a checkpoint of another model: its params differ from the template"
            r"\. dense/kernel: got float32\[3, 4\], expected float32\[3, 5\]\.",
        ),
        (
            {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4, jnp.bfloat16)}},
            r"dense/bias: got float32\[4\], expected bfloat16\[4\]",
        ),
        (
            {"dense": {"kernel": jnp.ones((3, 4))}},
            r"not in the template: dense/bias\.",
        ),
        (
            {
                "dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)},
                "head": [jnp.ones(1)] * 6,
            },
            r"missing in the checkpoint: head/0, head/1, head/2, head/3 and 2 more",
        ),
        (
            {"dense": {"kernel": 3, "bias": jnp.zeros(4)}},
            r"dense/kernel: got float32\[3, 4\], expected a Python int",
        ),
        (jnp.ones(3), r"missing in the checkpoint: value; not in the template: dense"),
    ],
    ids=["shape", "dtype", "surplus", "missing", "kind", "bare"],
)
def test_another_model(tmp_path, params, template, message):
    save(tmp_path, step=1, params=params)
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, params=template)


def test_python_values_and_arrays_are_not_the_same(tmp_path):
    save(tmp_path, step=1, params={"x": 3})
    with pytest.raises(ValueError, match=r"x: got a Python int, expected float32\[\]"):
        restore(tmp_path, params={"x": jnp.zeros(())})
    with pytest.raises(ValueError, match=r"x: got a Python int, expected a Python str"):
        restore(tmp_path, params={"x": "text"})
    save(tmp_path, step=2, params={"x": jax.random.key(0)})
    with pytest.raises(ValueError, match=r"x: got key<fry>\[\], expected key<rbg>\[\]"):
        restore(tmp_path, params={"x": jax.random.key(0, impl="rbg")})


def test_dense_and_sparse(tmp_path, params):
    adam = optax.adam(1e-3)
    prune = js.prune_schedule(0.5, every=1)
    sparse = prune.wrap(adam)
    save(tmp_path, step=1, params=params, opt_state=adam.init(params))
    with pytest.raises(ValueError, match=r"dense run.*prune_schedule\.adopt\(restored"):
        restore(tmp_path, params=params, opt_state=sparse.init(params))
    save(tmp_path, step=2, params=params, opt_state=sparse.init(params))
    with pytest.raises(ValueError, match=r"sparse run, with masks.*js\.enforce"):
        restore(tmp_path, params=params, opt_state=adam.init(params))
    other = prune.wrap(optax.sgd(1e-3, momentum=0.9)).init(params)
    with pytest.raises(ValueError, match=r"its opt_state differ.*1/0/trace/dense"):
        restore(tmp_path, params=params, opt_state=other)
    save(tmp_path, step=3, params=params)
    with pytest.raises(ValueError, match=r"/3 holds no opt_state: it was saved with"):
        restore(tmp_path, params=params, opt_state=adam.init(params))


def test_masks_that_do_not_fit(tmp_path, params):
    masks = {"dense": {"kernel": jnp.ones((3, 4), bool)}}
    with pytest.raises(ValueError, match=r"masks must have .*missing 'dense/bias'"):
        save(tmp_path, step=1, params=params, masks=masks)
    masks["dense"]["bias"] = jnp.ones(3, bool)
    with pytest.raises(ValueError, match=r"dense/bias: a mask of shape \(3,\) does"):
        save(tmp_path, step=1, params=params, masks=masks)
    masks["dense"]["bias"] = jnp.ones(4)
    with pytest.raises(TypeError, match=r"dense/bias: a mask holds bools"):
        save(tmp_path, step=1, params=params, masks=masks)
    assert js.checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (1 + 2j, r"params x: a checkpoint holds .*got \(1\+2j\) of type complex"),
        (object(), r"params x: .* of type object"),
        (np.array(["a"]), r"params x: an array of <U1 cannot be saved"),
        (np.array([None]), r"params x: an array of object cannot be saved"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), r"params x: got Shape.* no value"),
    ],
    ids=["complex", "object", "text", "objects", "abstract"],
)
def test_leaves_that_cannot_be_saved(tmp_path, leaf, message):
    with pytest.raises(TypeError, match=message):
        save(tmp_path, step=1, params={"x": leaf})


def test_save_under_jit(tmp_path):
    with pytest.raises(TypeError, match=r"params x: .*Call save outside of jit"):
        jax.jit(lambda x: save(tmp_path, step=1, params={"x": x}))(jnp.ones(2))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"at": {"seed": np.int64(3)}}, r"extra/at/seed: .* got int64\. Convert it"),
        ({"at": [0, (1, 2)]}, r"extra/at/1: .* got tuple"),
        ({"at": {1: 2}}, r"extra/at: the keys must be text, got 1\."),
        ([1], r"extra: expected a dictionary, got list"),
    ],
)
def test_extra_that_json_would_change(tmp_path, params, extra, message):
    with pytest.raises(TypeError, match=message):
        save(tmp_path, step=1, params=params, extra=extra)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, r"step must be at least 0, got -1"),
        ({"step": 1.0}, TypeError, r"step must be an integer, got 1\.0"),
        ({"step": True}, TypeError, r"step must be an integer, got True"),
        ({"step": 1, "keep": 0}, ValueError, r"keep must be at least 1, got 0"),
    ],
)
def test_numbers(tmp_path, params, arguments, error, message):
    with pytest.raises(error, match=message):
        save(tmp_path, params=params, **arguments)


def change_stamp(path, **changes):
    file = path / "stamp" / "metadata"
    stamp = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(stamp))


def test_versions(tmp_path, params):
    path = save(tmp_path, step=1, params=params)
    change_stamp(path, format=2, jaxsparse="9.9")
    message = r"format version 2, written by jaxsparse 9\.9; .* Upgrade jaxsparse"
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, params=params)
    change_stamp(path, format=None)
    with pytest.raises(ValueError, match=r"not a checkpoint of jaxsparse: no format"):
        restore(tmp_path, params=params)
