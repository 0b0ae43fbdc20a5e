"""Trees of five libraries through the steps of a user: prune, train, calibrate, narrow.

NNX states hold arrays in variables, Linen trees in boxes with the names of axes,
Equinox models are trees of modules, Haiku's names have slashes, and Keras has a list.
All are one model here, with the same numbers. (Keras and Haiku need not be installed:
to this library they are lists and dictionaries.)
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as js


def draw(seed, *shape):
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(numbers.astype(np.float32))


X = draw(0, 16, 8)
ARRAYS = [draw(1, 8, 16), draw(2, 16), draw(3, 16, 4), draw(4, 4)]
KERNELS = (0, 2)


class Library(NamedTuple):
    """A tree, its model, the places of `ARRAYS` among its leaves, and their paths."""

    params: Any
    apply_fn: Any
    places: tuple[int, ...]
    paths: tuple[str, ...]
    outputs_first: bool = False


def run(up, b, down, c, x):
    return jax.nn.relu(x @ up + b[None]) @ down + c[None]


def of_nnx(pure):
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.up, self.down = (nnx.Linear(*s, rngs=rngs) for s in ((8, 16), (16, 4)))

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    graph, state = nnx.split(Model())
    places = (3, 2, 1, 0)
    leaves = [ARRAYS[places.index(i)] for i in range(4)]
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    paths = ("up/kernel", "up/bias", "down/kernel", "down/bias")
    apply_fn = lambda params, x: nnx.merge(graph, params)(x)
    return Library(nnx.as_pure(state) if pure else state, apply_fn, places, paths)


def of_linen():
    box = functools.partial(nn.with_partitioning, names=("in", "out"))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = box(nn.initializers.lecun_normal())
            x = nn.relu(nn.Dense(16, kernel_init=init, name="up")(x))
            return nn.Dense(4, kernel_init=init, name="down")(x)

    model = Model()
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    places = (3, 2, 1, 0)
    leaves = [ARRAYS[places.index(i)] for i in range(4)]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    names = ("up/kernel", "up/bias", "down/kernel", "down/bias")
    return Library(params, model.apply, places, tuple(f"params/{n}" for n in names))


def of_equinox():
    class Model(eqx.Module):
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __call__(self, x):
            return self.down(jax.nn.relu(self.up(x)))

    linear = functools.partial(eqx.nn.Linear, key=jax.random.key(0))
    arrays, rest = eqx.partition(Model(linear(8, 16), linear(16, 4)), eqx.is_array)
    leaves = [w.T if w.ndim == 2 else w for w in ARRAYS]
    params = jax.tree.unflatten(jax.tree.structure(arrays), leaves)
    apply_fn = lambda params, x: jax.vmap(eqx.combine(params, rest))(x)
    paths = ("up/weight", "up/bias", "down/weight", "down/bias")
    return Library(params, apply_fn, (0, 1, 2, 3), paths, outputs_first=True)


def of_haiku():
    up, b, down, c = ARRAYS
    params = {"net/~/up": {"w": up, "b": b}, "net/~/down": {"w": down, "b": c}}

    def apply_fn(params, x):
        first, second = params["net/~/up"], params["net/~/down"]
        return run(first["w"], first["b"], second["w"], second["b"], x)

    paths = ("net/~/up/w", "net/~/up/b", "net/~/down/w", "net/~/down/b")
    return Library(params, apply_fn, (3, 2, 1, 0), paths)


def of_keras():
    paths = ("0", "1", "2", "3")
    return Library(list(ARRAYS), lambda ws, x: run(*ws, x), (0, 1, 2, 3), paths)


LIBRARIES = {
    "nnx": functools.partial(of_nnx, pure=False),
    "nnx pure": functools.partial(of_nnx, pure=True),
    "linen": of_linen,
    "equinox": of_equinox,
    "haiku": of_haiku,
    "keras": of_keras,
}
every_library = pytest.mark.parametrize("name", LIBRARIES)


@functools.cache
def library(name) -> Library:
    return LIBRARIES[name]()


def arrays_of(tree, lib):
    """The leaves in the order and the layout of `ARRAYS`."""
    leaves = jax.tree.leaves(tree)
    found = [np.asarray(leaves[place]) for place in lib.places]
    return [w.T if lib.outputs_first and w.ndim == 2 else w for w in found]


def assert_same(tree, expected, lib, **close):
    assert jax.tree.structure(tree) == jax.tree.structure(lib.params)
    for got, wanted in zip(arrays_of(tree, lib), expected, strict=True):
        compare = np.testing.assert_allclose if close else np.testing.assert_array_equal
        compare(got, np.asarray(wanted), **close)


def loss_of(apply_fn):
    return lambda params, x: jnp.mean(jnp.square(apply_fn(params, x)))


# What a plain list of the same arrays gives: the expected numbers of all libraries.
@functools.cache
def plain():
    return of_keras()


@every_library
def test_paths_are_those_of_the_model_and_no_more(name):
    lib = library(name)
    paths = [path for path, _ in js.tree.leaves_with_paths(lib.params)]
    assert tuple(paths[place] for place in lib.places) == lib.paths
    assert js.trace(lib.apply_fn, lib.params, X).paths == tuple(paths)


@every_library
def test_prune_by_rule_and_further(name):
    lib = library(name)
    kernels = [lib.paths[i] for i in KERNELS]
    half = js.prune(lib.params, dict.fromkeys(kernels, 0.5))
    expected = js.prune(plain().params, 0.5)
    assert_same(half.params, expected.params, lib)
    assert_same(half.masks, expected.masks, lib)
    more = js.prune(half.params, 0.75, masks=half.masks)
    assert_same(more.masks, js.prune(plain().params, 0.75).masks, lib)
    assert_same(
        js.patterns.apply(lib.params, more.masks), arrays_of(more.params, lib), lib
    )
    unpacked = js.patterns.unpack(js.patterns.pack(more.masks))
    assert_same(unpacked, arrays_of(more.masks, lib), lib)
    sparsities = jax.tree.leaves(js.patterns.sparsity_of(more.masks, lib.params))
    assert sorted(sparsities) == [0, 0, 0.75, 0.75]
    table = js.report.table(lib.params, more.masks, asked=0.75)
    assert {row.path for row in table.rows} == set(lib.paths)
    assert table.pruned.reached == 0.75


@every_library
def test_schedule(name):
    """In training, and from what the optimizer's state holds."""

    def trained(lib):
        schedule = js.prune_schedule(0.5, every=1, score=js.scores.taylor)
        tx = js.enforce(optax.chain(schedule, optax.sgd(0.01)))
        state, params = tx.init(lib.params), lib.params

        @jax.jit
        def step(params, state):
            grads = jax.grad(loss_of(lib.apply_fn))(params, X)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(2):
            params, state = step(params, state)
        js.assert_sparse(state, params)
        return params, js.patterns.apply(params, js.masks_of(state))

    lib = library(name)
    expected, _ = trained(plain())
    params, masked = trained(lib)
    assert_same(params, expected, lib, rtol=1e-5, atol=1e-6)
    assert_same(masked, arrays_of(params, lib), lib)


@every_library
def test_calibrate_and_layerwise(name):
    def found(lib):
        trace = js.trace(lib.apply_fn, lib.params, X)
        stats = js.calibration.run(trace, lib.params, [X], gram=False)
        run = functools.partial(
            js.oneshot.layerwise,
            lib.apply_fn,
            lib.params,
            [X],
            solver=js.solvers.wanda,
            gram=False,
        )
        half = run(sparsity=0.5)
        more = run(sparsity=0.75, masks=half.masks)
        return js.scores.wanda(lib.params, stats), half.params, more.masks

    lib = library(name)
    for tree, expected in zip(found(lib), found(plain()), strict=True):
        assert_same(tree, expected, lib, rtol=1e-5, atol=1e-6)


@every_library
def test_second_order(name):
    def found(lib):
        each = jax.jit(
            functools.partial(
                js.curvature.per_example_grads,
                loss_of(lib.apply_fn),
            )
        )
        grads = each(lib.params, X)
        fisher = js.curvature.diagonal_fisher(grads, damping=1e-3)
        return js.solvers.obs(lib.params, fisher, 0.5).masks

    lib = library(name)
    assert_same(found(lib), found(plain()), lib)


@every_library
def test_narrow(name):
    lib = library(name)
    trace = js.trace(lib.apply_fn, lib.params, X)
    groups = js.coupling.groups(trace)
    scores = js.channels.channel_scores(groups, js.scores.magnitude(lib.params))
    drop = js.channels.drop_lowest(groups, scores, 0.5)
    masks = js.narrowing.drop_masks(trace, drop)
    masked = js.patterns.apply(lib.params, masks)
    small = js.narrowing.narrow(trace, lib.params, drop)
    shapes = [w.shape for w in arrays_of(small.params, lib)]
    assert shapes == [(8, 8), (8,), (8, 4), (4,)]
    np.testing.assert_allclose(
        small.apply_fn(small.params, X), lib.apply_fn(masked, X), rtol=1e-5, atol=1e-5
    )


@every_library
def test_checkpoint(name, tmp_path):
    lib = library(name)
    pruned = js.prune(lib.params, 0.5)
    js.checkpoint.save(
        tmp_path / "run", step=1, params=pruned.params, masks=pruned.masks
    )
    restored = js.checkpoint.restore(tmp_path / "run", params=lib.params)
    assert_same(restored.params, arrays_of(pruned.params, lib), lib)
    assert_same(restored.masks, arrays_of(pruned.masks, lib), lib)
    js.checkpoint.export(tmp_path / "run.npz", pruned.params)
    assert set(js.checkpoint.load_export(tmp_path / "run.npz").params) == set(lib.paths)


# Trees with variables or boxes, and masks of the same model without them.


def bare(tree):
    """Nested dictionaries without boxes."""
    if hasattr(tree, "items"):
        return {k: bare(v) for k, v in tree.items()}
    return jax.tree.leaves(tree)[0]


@pytest.mark.parametrize("name", ["nnx", "nnx pure", "linen"])
@pytest.mark.parametrize("boxed", [True, False])
def test_masks_without_boxes_fit_parameters_with_them_and_the_reverse(name, boxed):
    lib = library(name)
    kinds = lib.params, bare(lib.params)
    params, other = kinds if boxed else kinds[::-1]
    same = lambda tree: assert_structure(tree, params)
    half = js.prune(other, 0.5)
    assert jax.tree.structure(half.masks) != jax.tree.structure(params)
    same(js.patterns.apply(params, half.masks))
    same(js.prune(params, 0.75, masks=half.masks).masks)
    same(js.prune(params, js.allocations.erk(other, 0.5)).masks)
    same(js.scores.taylor(params, other))
    same(js.patterns.sparsity_of(half.masks, params))
    same(js.allocations.round_to_weights(params, js.allocations.uniform(other, 0.5)))
    same(js.keep_sparse(half.masks).init(params).masks)
    js.patterns.verify(half.masks, params, pattern=js.Unstructured())
    js.patterns.check_masks(half.masks, params)
    assert js.report.table(params, half.masks, asked=0.5).pruned.reached == 0.5
    grads = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
    fisher = js.curvature.diagonal_fisher(grads, damping=1e-3)
    same(js.solvers.obs(params, fisher, 0.75, masks=half.masks).masks)
    tx = js.prune_schedule(0.5, every=1)
    adopted = tx.adopt((), js.patterns.apply(params, half.masks), masks=half.masks)
    same(js.apply_updates(params, params, adopted))


def assert_structure(tree, params):
    assert jax.tree.structure(tree) == jax.tree.structure(params)


def test_layerwise_takes_them_too():
    lib = library("nnx")
    half = js.prune(bare(lib.params), 0.5)
    found = js.oneshot.layerwise(
        lib.apply_fn,
        lib.params,
        [X],
        sparsity=js.allocations.uniform(bare(lib.params), 0.75),
        solver=js.solvers.magnitude,
        gram=False,
        masks=half.masks,
    )
    assert_structure(found.masks, lib.params)
    assert_same(found.masks, js.prune(plain().params, 0.75).masks, lib)


def test_other_paths_are_refused_by_their_names_without_value():
    lib = library("nnx")
    masks = js.prune(bare(lib.params), 0.5).masks
    masks["up"]["kernal"] = masks["up"].pop("kernel")
    with pytest.raises(ValueError, match=r"missing 'up/kernel'; not in .*'up/kernal'"):
        js.patterns.apply(lib.params, masks)
