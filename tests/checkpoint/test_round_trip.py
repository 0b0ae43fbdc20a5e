"""What is restored is what was saved: bits, types, containers."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as js

save, restore = js.checkpoint.save, js.checkpoint.restore


def assert_same(got, expected):
    """The same containers, kinds, types and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, x), y in zip(
        js.tree.leaves_with_paths(got), jax.tree.leaves(expected), strict=True
    ):
        if not hasattr(y, "dtype"):
            assert type(x) is type(y), path
            assert x == y or (x != x and y != y), path
            continue
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array), path
        assert x.dtype == y.dtype, path
        assert x.shape == y.shape, path
        if isinstance(y, jax.Array):
            assert getattr(x, "weak_type", 0) == getattr(y, "weak_type", 0), path
            assert x.committed == y.committed, path
            if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def stamp_of(path):
    return json.loads((path / "stamp" / "metadata").read_text())


class Odd(NamedTuple):
    a: object
    b: object


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.arange(6.0).reshape(2, 3),
        jnp.array([1.0, -0.0, jnp.nan, jnp.inf, 3e-39], jnp.bfloat16),
        jnp.array([1, 2], jnp.float8_e4m3fn),
        jnp.array([1, -2], jnp.int4),
        jnp.array([1 + 2j], jnp.complex64),
        jnp.array(True),
        jnp.zeros(()),
        jnp.zeros((0, 3), jnp.bfloat16),
        jnp.zeros((3, 0), bool),
        jnp.asarray(0.1),  # weakly typed
        jnp.full((2, 3), 7),
        jax.random.key(3),
        jax.random.split(jax.random.key(3, impl="rbg"), (2, 3)),
        jax.random.split(jax.random.key(3), (0, 3)),
        np.arange(3.0),  # float64, which JAX would cut
        np.array([[True, False]]),
        np.float64(0.1),
        np.zeros((0, 2)),
        3,
        True,
        0.1,
        float("nan"),
        float("-inf"),
        2**70,
        "text",
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', x)}{np.shape(x)}",
)
def test_a_leaf_comes_back_as_it_was(tmp_path, leaf):
    params = {"x": leaf}
    save(tmp_path, step=1, params=params)
    assert_same(restore(tmp_path, params=params).params, params)


@pytest.mark.parametrize(
    "shape", [(1,), (7,), (8,), (9,), (1, 12), (12, 1), (10, 3), (3, 3, 5, 4), (1, 1)]
)
def test_bools_of_every_shape_come_back(tmp_path, shape):
    mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)
    save(tmp_path, step=1, params={"mask": mask, "host": np.asarray(mask)})
    template = {"mask": mask, "host": np.zeros(shape, bool)}
    got = restore(tmp_path, params=template).params
    assert_same(got, {"mask": mask, "host": np.asarray(mask)})


def test_containers_are_those_of_the_template(tmp_path):
    full = lambda value: jnp.asarray(np.full((2, 2), value, np.float32))
    params = {
        "list": [full(1), (full(2), ())],
        "named": Odd(a=full(3), b=None),
        "empty": (optax.EmptyState(), optax.MaskedNode(), {}, None),
        "a/b": full(4),
        "a": {"b": full(5)},
        "a.b": full(6),
        "odd name ../'\"\n\u00fc": full(7),
        7: {},
    }
    params.pop(7)  # keys of two types cannot be sorted
    save(tmp_path, step=1, params=params)
    assert_same(restore(tmp_path, params=params).params, params)


def test_a_bare_array_and_a_tree_without_arrays(tmp_path):
    save(tmp_path, step=1, params=jnp.arange(3.0), opt_state=optax.EmptyState())
    got = restore(tmp_path, params=jnp.zeros(3), opt_state=optax.EmptyState())
    assert got.params.tolist() == [0, 1, 2]
    assert got.opt_state == optax.EmptyState()
    assert got.masks is None
    assert got.extra == {}
    save(tmp_path, step=2, params={}, opt_state=(3, jnp.zeros((0,))))
    got = restore(tmp_path, params={}, opt_state=(0, jnp.zeros((0,))))
    assert got.step == 2
    assert got.params == {}
    assert got.opt_state[0] == 3


class Run(NamedTuple):
    params: object
    opt_state: object
    fresh: object  # the state before the first step


def trained(tx, params, steps=2):
    fresh = state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return Run(params, state, fresh)


@pytest.fixture
def params(relaxed_promotion):  # which optax needs
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.standard_normal((12, 8)), jnp.float32),
        "half": {"kernel": jnp.asarray(rng.standard_normal((8, 4)), jnp.bfloat16)},
        "bias": jnp.asarray(np.zeros(8, np.float32)),
    }


@pytest.fixture(scope="module")
def run():
    """A sparse run with a typed key in its state; shared, for it compiles."""
    tx = js.enforce(
        optax.chain(
            js.prune_schedule(0.5, every=1, where=r"kernel$"),
            optax.add_noise(eta=1e-3, gamma=0.5, key=jax.random.key(0)),
            optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
        )
    )
    kernel = jnp.asarray(np.arange(96, dtype=np.float32).reshape(12, 8))
    with jax.numpy_dtype_promotion("standard"):
        return trained(tx, {"kernel": kernel, "bias": jnp.asarray(0.5)})


@pytest.mark.parametrize("abstract", [False, True])
def test_an_optimizer_state(tmp_path, run, abstract):
    step = run.opt_state[0].step
    save(tmp_path, step=step, params=run.params, opt_state=run.opt_state)
    template = run.params, run.fresh
    if abstract:
        template = jax.eval_shape(lambda: template)
    got = restore(tmp_path, params=template[0], opt_state=template[1])
    assert got.step == 2
    assert_same((got.params, got.opt_state), (run.params, run.opt_state))
    assert_same(got.masks, js.masks_of(run.opt_state))


def test_the_optimizer_state_can_stay_on_disk_but_its_masks_are_missed(tmp_path, run):
    save(tmp_path, step=1, params=run.params, opt_state=run.opt_state)
    with pytest.warns(UserWarning, match="else pruned weights grow back"):
        got = restore(tmp_path, params=run.params)
    assert_same(got.params, run.params)
    assert got.opt_state is None
    assert got.masks is None


def test_going_on_from_a_checkpoint_compiles_nothing_anew(tmp_path):
    # A weak type that is lost, or an array that is suddenly bound to a device, would.
    strong = jnp.asarray(np.zeros(3, np.float32))
    state = {"weak": jnp.asarray(0.5), "strong": strong, "key": jax.random.key(0)}
    step = jax.jit(lambda state: state["weak"] * state["strong"].astype(jnp.bfloat16))
    expected = step(state)
    save(tmp_path, step=1, params=state)
    got = step(restore(tmp_path, params=state).params)
    assert got.dtype == expected.dtype == jnp.bfloat16
    assert step._cache_size() == 1


def test_an_optimizer_that_changes_types(tmp_path, relaxed_promotion):
    tx = optax.inject_hyperparams(optax.adam)(1e-2)
    ones = np.ones(4, np.float32)
    params = {"b": jnp.asarray(ones), "w": jnp.asarray(ones, jnp.bfloat16)}
    fresh = jax.jit(tx.init)(params)
    shapes = jax.eval_shape(tx.update, params, fresh, params)[1]
    _, state = jax.jit(tx.update)(params, fresh, params)
    save(tmp_path, step=1, params=params, opt_state=state)
    with pytest.raises(
        ValueError,
        match=r"mu/w: got float32\[4\], expected bfloat16.*"
        r"jax\.eval_shape\(tx\.update",
    ):
        restore(tmp_path, params=params, opt_state=fresh)
    got = restore(tmp_path, params=params, opt_state=shapes)
    assert_same(got.opt_state, state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.masked(tx, {"kernel": True, "half": True, "bias": False}),
    ],
    ids=["MultiSteps", "apply_if_finite", "masked"],
)
def test_masks_are_found_inside_wrappers(tmp_path, params, wrap):
    tx = wrap(js.prune_schedule(0.5, every=1, where="kernel").wrap(optax.sgd(1e-2)))
    params, state, fresh = trained(tx, params)
    save(tmp_path, step=1, params=params, opt_state=state)
    got = restore(tmp_path, params=params, opt_state=fresh)
    assert_same(got.opt_state, state)
    assert_same(got.masks, js.masks_of(state))


def test_nnx(tmp_path, relaxed_promotion):
    def make():
        kernel = np.random.default_rng(0).standard_normal((4, 8))
        init = lambda *_: jnp.asarray(kernel, jnp.float32)
        model = nnx.Linear(4, 8, kernel_init=init, rngs=nnx.Rngs(0))
        tx = js.prune_schedule(0.5, every=1, where="kernel").wrap(optax.adam(1e-2))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    model, optimizer = make()
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    update = nnx.jit(lambda optimizer, model: optimizer.update(model, grads))
    update(optimizer, model)
    params = nnx.state(model, nnx.Param)
    save(tmp_path, step=1, params=params, opt_state=optimizer.opt_state)

    model, optimizer = make()
    got = restore(
        tmp_path, params=nnx.state(model, nnx.Param), opt_state=optimizer.opt_state
    )
    assert isinstance(got.params["kernel"], nnx.Param)
    assert_same(got.params, params)
    assert isinstance(got.opt_state[0], js.transforms.PruneScheduleState)
    nnx.update(model, got.params)
    optimizer.opt_state = got.opt_state
    update(optimizer, model)
    mask = got.masks["kernel"]
    kernel, kept = np.asarray(model.kernel.get_value()), np.asarray(mask)
    assert (kernel == 0).sum() == (~kept).sum() == 16

    # Masks in plain containers, for params in variables.
    save(tmp_path, step=2, params=params, masks=nnx.to_pure_dict(got.masks))
    again = restore(tmp_path, params=params).masks
    assert again["kernel"].get_value().tolist() == mask.tolist()


def test_masks_of_their_own(tmp_path, params):
    pruned, masks = js.prune(params, 0.5, where="kernel")
    assert masks["bias"].shape == ()
    by_channel = np.array([[True, False, True, True]])
    masks["half"]["kernel"] = jnp.asarray(by_channel)
    save(tmp_path, step=1, params=pruned, masks=masks, extra={"epoch": 3, "x": [None]})
    got = restore(tmp_path, params=params)
    assert_same(got.params, pruned)
    assert_same(got.masks, masks)
    assert got.opt_state is None
    assert got.extra == {"epoch": 3, "x": [None]}


def test_a_dense_run_is_adopted(tmp_path, params):
    adam = optax.adam(1e-2)
    params, state, fresh = trained(adam, params)
    save(tmp_path, step=2, params=params, opt_state=state)
    got = restore(tmp_path, params=params, opt_state=fresh)
    prune_schedule = js.prune_schedule(0.5, every=1)
    state = prune_schedule.adopt(got.opt_state, got.params)
    jax.jit(prune_schedule.wrap(adam).update)(params, state, params)


def test_python_numbers_meet_a_template_of_eval_shape(tmp_path):
    state = {"flag": True, "step": 3, "rate": 0.5}
    save(tmp_path, step=1, params=state)
    template = jax.eval_shape(lambda: state)
    got = restore(tmp_path, params=template).params
    assert jax.tree.map(lambda x: x.item(), got) == state


def test_masks_take_one_bit_a_weight_on_disk(tmp_path):
    mask = jnp.asarray(np.random.default_rng(0).random((1024, 512)) < 0.5)
    params = {"kernel": jnp.asarray(np.zeros(mask.shape, np.float32))}
    path = save(tmp_path, step=1, params=params, masks={"kernel": mask})
    files = [f for f in (path / "masks").rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    assert mask.size / 8 <= size < 1.1 * mask.size / 8

    tx = js.prune_schedule(0.5, every=1).wrap(optax.identity())
    zeros = lambda x: jnp.asarray(np.zeros(x.shape, x.dtype))
    state = jax.tree.map(zeros, jax.eval_shape(tx.init, params))
    state = (state[0]._replace(masks={"kernel": mask}), *state[1:])
    path = save(tmp_path, step=2, params=params, opt_state=state)
    files = [f for f in (path / "opt_state").rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    assert mask.size / 8 <= size < 1.1 * mask.size / 8


def test_the_stamp(tmp_path):
    path = save(tmp_path, step=5, params={"w": jnp.asarray(np.ones((2, 9), bool))})
    assert path == tmp_path / "5"
    stamp = stamp_of(path)
    assert stamp["format"] == 1
    assert stamp["jaxsparse"] == js.__version__
    assert stamp["jax"] == jax.__version__
    assert stamp["leaves"]["params"] == {
        "w": {"shape": [2, 9], "dtype": "bool", "packed_axis": 1}
    }


def test_x64(tmp_path, x64):
    params = {"w": jnp.array([0.1, 1e-300])}
    save(tmp_path, step=1, params=params)
    assert_same(restore(tmp_path, params=params).params, params)
    shapes = jax.eval_shape(lambda: params)
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=r"params w: .*float64.*jax_enable_x64"),
    ):
        restore(tmp_path, params=shapes)
