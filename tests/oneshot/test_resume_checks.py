"""A run is gone on with by the same call alone: else its result is another's."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.oneshot import _fingerprint, _layerwise

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
PARAMS = {"a": draw(8, 16), "b": draw(16, 4), "bias": draw(16)}
BATCHES = [draw(12, 8), draw(12, 8)]


def apply_fn(p, x):
    return jnp.tanh(x @ p["a"] + p["bias"][None]) @ p["b"]


def other_fn(p, x):
    return jax.nn.relu(x @ p["a"] + p["bias"][None]) @ p["b"]


def half_fn(p, x):
    return jnp.tanh(0.5 * (x @ p["a"] + p["bias"][None])) @ p["b"]


def solver(w, gram, sparsity, *, pattern, scale=1.0):
    """Compiles quickly: what magnitude leaves."""
    axes = js.Axes(input=(1,), output=(0,))
    mask = js.patterns.masks({"w": abs(w)}, sparsity, pattern=pattern, axes=axes)["w"]
    zero = jnp.zeros(())
    info = js.solvers.SolveInfo(
        zero, zero, zero, zero.astype(jnp.int32), jnp.array(False)
    )
    return js.solvers.Solved(jnp.where(mask, scale * w, 0).astype(w.dtype), mask, info)


def made(scale):
    return lambda w, gram, sparsity, *, pattern: solver(
        w, gram, sparsity, pattern=pattern, scale=scale
    )


HALF = functools.partial(solver, scale=0.5)
SETTINGS = {"sparsity": 0.5, "solver": HALF, "where": "[ab]$", "show": False}


def run(directory, fn=apply_fn, params=PARAMS, batches=BATCHES, **changes):
    settings = SETTINGS | changes
    return js.oneshot.layerwise(fn, params, batches, directory=directory, **settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A directory with a run that is done, and its result."""
    directory = tmp_path_factory.mktemp("run")
    return directory, run(directory)


def changed(tree, path, f):
    return tree | {path: f(tree[path])}


def one_bit(x):
    bits = x.view(np.uint32).copy()
    bits.flat[3] ^= 1
    return bits.view(np.float32)


CHANGES = {
    "weights": (
        {"params": changed(PARAMS, "b", one_bit)},
        r"parameter b: there float32\[16, 4\] with CRC-32 \d+, here float32\[16, 4\] w",
    ),
    "a bias": (
        {"params": changed(PARAMS, "bias", np.negative)},
        r"What differs: parameter bias: there",
    ),
    "data": (
        {"batches": [BATCHES[0], one_bit(BATCHES[1])]},
        r"What differs: batch 1, input 0: there float32\[12, 8\] with CRC-32 \d+, here",
    ),
    "shorter data": (
        {"batches": [BATCHES[0], BATCHES[1][:7]]},
        r"batch 1, input 0: there float32\[12, 8\] .*, here float32\[7, 8\]",
    ),
    "fewer batches": (
        {"batches": BATCHES[:1]},
        r"batch 1, input 0: there float32\[12, 8\] .*, here nothing",
    ),
    "more batches": (
        {"batches": [*BATCHES, BATCHES[0]]},
        r"batch 2, input 0: there nothing, here float32\[12, 8\]",
    ),
    "order": ({"batches": BATCHES[::-1]}, r"batch 0, input 0: .*; batch 1, input 0"),
    "sparsity": (
        {"sparsity": 0.6},
        r"sparsity of a: there 0\.5, here 0\.6; sparsity of b: there 0\.5, here 0\.6",
    ),
    "one sparsity": (
        {"sparsity": {"a": 0.5, "b": 0.75}},
        r"What differs: sparsity of b: there 0\.5, here 0\.75\. Give",
    ),
    "pattern": (
        {"pattern": js.NM(2, 4)},
        r"pattern: there \S*Unstructured\(scope='layer'\), here \S*NM\(.*keep=2",
    ),
    "scope": (
        {"pattern": js.Unstructured(scope="output")},
        r"pattern: there .*scope='layer'\), here .*scope='output'\)",
    ),
    "solver": (
        {"solver": solver},
        r"solver: there \S*solver\S*\(scale=0\.5\), here \S*solver\S*\. Give",
    ),
    "solver's settings": (
        {"solver": functools.partial(solver, scale=2.0)},
        r"solver: there \S*\(scale=0\.5\), here \S*\(scale=2\.0\)",
    ),
    "share": ({"share": jnp.tanh}, r"share: there None, here \S+"),
    "where": ({"where": "a$"}, r"sparsity of b: there 0\.5, here nothing"),
    "gram": ({"gram": False}, r"What differs: gram: there True, here False"),
    "sequential": ({"sequential": False}, r"sequential: there True, here False"),
    "weight": (
        {"weight": lambda x: x[:, 0] ** 2},
        r"weight of batch 0: there nothing, here float32\[12\]",
    ),
    "rules": ({"rules": {"tanh": "ab->ab"}}, r"rules: there None, here {'tanh"),
    "model": ({"fn": other_fn}, r"the model's program: there \d+ equations"),
    "a constant": ({"fn": half_fn}, r"the model's program: there"),
}


@pytest.fixture
def unsolved(monkeypatch):
    """Nothing may be solved."""

    def solved(*_, **__):
        raise AssertionError("this was done before, or is refused")

    monkeypatch.setattr(_layerwise, "solve_bundle", solved)


@pytest.mark.usefixtures("unsolved")
@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_with_what_differs(done, name):
    changes, message = CHANGES[name]
    with pytest.raises(ValueError, match=rf"(?s)checkpoint of another run.*{message}"):
        run(done[0], **changes)


@pytest.mark.usefixtures("unsolved")
def test_the_same_call_returns_the_same(done):
    directory, first = done
    again = run(
        directory,
        params=jax.tree.map(jnp.asarray, PARAMS),  # wherever they lie
        batches=[(x.copy(),) for x in BATCHES],
        solver=functools.partial(solver, scale=0.5),
        pattern=js.Unstructured(),
        host=True,  # which changes nothing
    )
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    jax.tree.map(np.testing.assert_array_equal, again.masks, first.masks)


def test_weights_are_compared_by_what_they_give(tmp_path):
    run(tmp_path, weight=lambda x: x[:, 0] ** 2)
    run(tmp_path, weight=lambda x: x[:, 0] * x[:, 0])
    with pytest.raises(
        ValueError, match=r"weight of batch 0: there float32\[12\] with"
    ):
        run(tmp_path, weight=lambda x: x[:, 1] ** 2)


def test_solvers_made_within_a_function(tmp_path):
    run(tmp_path, solver=made(0.5))
    run(tmp_path, solver=made(0.5))
    with pytest.raises(ValueError, match=r"solver: there .*scale=0\.5.*scale=0\.25"):
        run(tmp_path, solver=made(0.25))


def test_a_directory_of_the_version_before(tmp_path, monkeypatch):
    saved = _layerwise.save_state
    without = lambda directory, state, trace: saved(
        directory, state._replace(run=None), trace
    )
    monkeypatch.setattr(_layerwise, "save_state", without)
    first = run(tmp_path)
    with pytest.warns(UserWarning, match=r"not checked whether they are those of this"):
        again = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path)
    (tmp_path / "2" / "stamp" / "metadata").write_text("{")
    with pytest.raises(ValueError, match=r"/2 is damaged: stamp/metadata"):
        run(tmp_path)


def test_infos_stay_in_the_order_of_solving(tmp_path):
    fn = lambda p, x: apply_fn({**p, "a": p["b"], "b": p["a"]}, x)
    params = {"b": PARAMS["a"], "a": PARAMS["b"], "bias": PARAMS["bias"]}
    for _ in range(2):  # and from the checkpoint
        assert list(run(tmp_path, fn=fn, params=params).info) == ["b", "a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layerwise": {}}, r"is not what layerwise wrote.*it is of \[\]"),
        ({"solved": None}, r"a checkpoint of another run: it has solved None"),
        ({"layerwise": {"a": [[1, "getpid"]] * 7 + [0.0]}}, r"is not what layerwise w"),
        ({"layerwise": {"a": {}}}, r"is not what layerwise wrote"),
        ({"layerwise": [1]}, r"is not what layerwise wrote"),
        ({"run": [1]}, r"a checkpoint of another run, whose result"),
    ],
)
def test_notes_that_are_not_of_layerwise(tmp_path, changes, message):
    directory, arrays = tmp_path / "run", tmp_path / "arrays"
    run(directory)
    step = js.checkpoint.latest_step(directory)
    restored = js.checkpoint.restore(directory, params=PARAMS)
    js.checkpoint.save(
        arrays,
        step=step,
        params=restored.params,
        masks=restored.masks,
        extra=restored.extra | changes,
    )
    with pytest.raises(ValueError, match=message):
        run(arrays)


ODD = {
    "lambda": lambda x: x + 1,
    "partial": functools.partial(solver, scale=np.float32(0.1), pattern={"b": 1}),
    "nested": functools.partial(functools.partial(made(0.5), 1), 2, z=None, a="x"),
    "jitted": jax.jit(solver, static_argnames="pattern"),
    "library": js.solvers.sparsegpt,
    "method": js.Unstructured().__repr__,
    "set": {"one", "two", "three", "four", "five"},
    "array": np.arange(3),
    "type": jnp.bfloat16,
    "object": object(),
    "pattern": js.Block((4, 4), reduce="max"),
    "code": lambda x: x in {"p", "q", "r", "s"},
}


def texts():
    from jaxsparse.tracing import trace

    traced = trace(apply_fn, PARAMS, BATCHES[0])
    data = [(x,) for x in BATCHES]
    found = _fingerprint.fingerprint(
        traced, PARAMS, data, {"a": 0.5, "b": None}, weight=None, **ODD
    )
    return json.dumps(found)


def test_another_process_finds_the_same():
    """With other addresses, and with another salt for hashes."""
    program = (
        "import sys; sys.path[:0] = ['tests/oneshot', 'tests']; "
        "import test_resume_checks as t; print(t.texts())"
    )
    said = {}
    for salt in "12":
        env = os.environ | {"PYTHONHASHSEED": salt}
        out = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout
        said[salt] = json.loads(out.splitlines()[-1])
    assert said["1"] == said["2"]
    assert not any(" at 0x" in text for text in said["1"].values())
    here = json.loads(texts())
    same = {k for k in here if here[k] == said["1"][k]}
    # Here this file is a module of another name.
    assert same >= {"a", "library", "set", "array", "pattern"} & set(here)
    assert {"parameter a", "batch 1, input 0", "the model's program"} <= same


def test_a_setting_as_text():
    text = _fingerprint.text_of
    assert text(js.Unstructured()) != text(js.Unstructured(scope="global"))
    assert text(functools.partial(solver, scale=0.5)) != text(solver)
    assert text(made(1.0)) == text(made(1.0)) != text(made(2.0))
    assert text(lambda x: x + 1) != text(lambda x: x + 2)
    assert text(lambda x: jnp.sin(-x)) != text(lambda x: jnp.cos(-x))
    assert text({"b": 1, "a": 2}) == text({"a": 2, "b": 1})
    assert text(np.float32(0.5)) == text(jnp.asarray(np.float32(0.5))) == "float32(0.5)"
    assert text(1) != text(1.0) != text("1.0")

    def itself(n):
        return itself(n - 1) if n else made

    assert "..." in text(itself)
