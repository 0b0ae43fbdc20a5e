"""What every transformation keeps, with every optimizer and wrapper of optax's.

A new transformation is a new row of `TRANSFORMS`.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transforms.problems import OPTIMIZERS
from transforms.test_zeros import assert_exact_zeros

import jaxsparse as js
from jaxsparse import contrib, penalties, transforms

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

STEPS = 4
SHAPES = {"up": (8, 16), "bias": (16,), "down": (16, 8)}


def parameters(dtypes=("float32", "float32", "float32")) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    draw = lambda shape, dtype: jnp.asarray(rng.standard_normal(shape), dtype)
    pairs = zip(SHAPES.items(), dtypes, strict=True)
    return {path: draw(shape, dtype) for (path, shape), dtype in pairs}


def apply_fn(params, x):
    return jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]


def loss(params, x):
    return jnp.mean((apply_fn(params, x) - 1) ** 2)


def batch(step):
    numbers = np.random.default_rng([1, step]).standard_normal((4, 8))
    return jnp.asarray(numbers, jnp.float32)


@functools.cache
def groups():
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()}
    return js.coupling.groups(js.trace(apply_fn, shapes, batch(0))).prunable


@functools.cache
def fixed_masks():
    return js.prune(parameters(), 0.5).masks


def schedule(**options):
    gradual = js.schedules.polynomial(final=0.5, begin=0, end=STEPS - 1)
    return js.prune_schedule(gradual, every=1, **options)


def moving(method):
    return method(0.5, every=2, key=jax.random.key(0), track=True)


def masked(params, state):
    """Where a mask says that a parameter is zero."""
    return js.masks_of(state)


def dropped(params, state):
    """Where a channel that `hesso` has dropped is zero, from its last step on."""
    (hesso,) = (
        x
        for x in jax.tree.leaves(state, is_leaf=is_hesso)
        if isinstance(x, js.penalties.HessoState)
    )
    gone = jax.tree.map(jnp.any, hesso.zero)
    assert any(jax.tree.leaves(gone)) == (int(hesso.step) >= STEPS - 1)
    if int(hesso.step) < STEPS - 1:
        return jax.tree.map(lambda w: jnp.ones((), bool), params)
    (kept,) = (~gone for gone in hesso.zero.values())
    return {"up": kept[None], "bias": kept, "down": jnp.ones((), bool)}


def is_hesso(x):
    return isinstance(x, js.penalties.HessoState)


class Row(NamedTuple):
    """A transformation.

    Attributes:
      make: around an optimizer.
      kept: what of the parameters may be other than 0, by the parameters and the state;
        None where nothing is promised to be zero.
      apply: in place of `optax.apply_updates`.
    """

    make: Callable[[optax.GradientTransformation], Any]
    kept: Callable[[Any, Any], Any] | None = None
    apply: Callable[..., Any] = lambda params, updates, _: optax.apply_updates(
        params, updates
    )


def before(make_member):
    """First in a chain, where the optimizer takes what it gives."""
    return Row(lambda optimizer: optax.chain(make_member(groups()), optimizer))


def after(make_member):
    """Last in a chain, where the optimizer's update is known."""
    return Row(lambda optimizer: optax.chain(optimizer, make_member(groups())))


TRANSFORMS = {
    "prune_schedule": Row(
        lambda optimizer: optax.chain(schedule(), optimizer), masked, js.apply_updates
    ),
    "enforce": Row(
        lambda optimizer: js.enforce(optax.chain(schedule(), optimizer)), masked
    ),
    "windowed_obs": Row(
        schedule(
            score=transforms.windowed_obs(window=2, block_size=8, damping=1e-3)
        ).wrap,
        masked,
    ),
    "windowed_obs, summed": Row(
        schedule(
            score=transforms.windowed_obs(
                window=2, block_size=8, damping=1e-3, summed=True
            )
        ).wrap,
        masked,
    ),
    "rigl": Row(
        lambda optimizer: moving(transforms.rigl).wrap(optimizer, skip_updates=True),
        masked,
    ),
    "set_": Row(lambda optimizer: moving(transforms.set_).wrap(optimizer), masked),
    "snfs": Row(lambda optimizer: moving(transforms.snfs).wrap(optimizer), masked),
    "static": Row(transforms.static(0.5, key=jax.random.key(0)).wrap, masked),
    "acdc": Row(
        transforms.acdc(
            0.5, begin=0, end=3, sparse=1, dense=1, pattern=js.NM(2, 4)
        ).wrap,
        masked,
    ),
    "frugal": Row(
        lambda optimizer: js.enforce(
            optax.chain(
                schedule(),
                transforms.frugal(
                    optimizer,
                    optax.sign_sgd(1e-2),
                    density=0.5,
                    every=2,
                    key=jax.random.key(0),
                ),
            )
        ),
        masked,
    ),
    "soft_shrink": after(lambda groups: transforms.soft_shrink(0.5)),
    "keep_sparse": Row(
        lambda optimizer: optax.chain(optimizer, js.keep_sparse(fixed_masks())), masked
    ),
    "keep_sparse, on a schedule": Row(
        lambda optimizer: optax.chain(optimizer, js.keep_sparse(schedule())), masked
    ),
    "scale_by_mfac": Row(
        lambda optimizer: js.enforce(
            optax.chain(
                schedule(),
                transforms.scale_by_mfac(window=2, damping=1e-3),
                optimizer,
            )
        ),
        masked,
    ),
    "hesso": Row(
        lambda optimizer: penalties.hesso(
            optimizer, groups(), sparsity=0.5, begin=0, periods=1, duration=STEPS - 1
        ),
        dropped,
    ),
    "group_lasso": before(lambda groups: penalties.group_lasso(groups, strength=1e-2)),
    "group_norm_decay": before(
        lambda groups: penalties.group_norm_decay(groups, strength=1e-3)
    ),
    "growing_regularization": before(
        lambda groups: penalties.growing_regularization(groups, increment=1e-2, every=2)
    ),
    "prox_group_lasso": after(
        lambda groups: penalties.prox_group_lasso(groups, strength=1e-2)
    ),
    "wgsef_prox": after(
        lambda groups: contrib.wgsef_prox(groups, sparsity=0.5, strength=1e-2)
    ),
}


def kernels(params):
    return {path: w.ndim > 1 for path, w in params.items()}


def labels(params):
    return {path: "kernel" if w.ndim > 1 else "rest" for path, w in params.items()}


adam = functools.partial(optax.adam, 1e-2)
both = lambda: {"kernel": adam(), "rest": optax.sgd(1e-2)}
WRAPPERS = {
    "chain": lambda make: make(optax.chain(optax.clip_by_global_norm(0.1), adam())),
    "schedule": lambda make: make(optax.adam(optax.cosine_decay_schedule(1e-2, 9))),
    "inject_hyperparams": lambda make: make(
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
    ),
    "masked": lambda make: make(optax.masked(adam(), kernels)),
    "partition": lambda make: make(optax.partition(both(), labels)),
    "MultiSteps": lambda make: optax.MultiSteps(make(adam()), 2),
    "MultiSteps inside": lambda make: make(
        optax.MultiSteps(adam(), 2).gradient_transformation()
    ),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(adam()), 3),
    "apply_if_finite inside": lambda make: make(optax.apply_if_finite(adam(), 3)),
}

# The others are parts of `enforce`, or add up slices as `prox_group_lasso` does.
REPRESENTATIVES = {
    *("enforce", "windowed_obs", "scale_by_mfac", "keep_sparse", "hesso", "rigl"),
    *("growing_regularization", "prox_group_lasso"),
}
representatives = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in REPRESENTATIVES else pytest.mark.exhaustive
        )
        for name in TRANSFORMS
    ],
)


def pairs(columns):
    """Each transformation and each column is there by default, other pairs are not."""
    return pytest.mark.parametrize(
        ("name", "column"),
        [
            pytest.param(name, column, marks=[] if few else pytest.mark.exhaustive)
            for i, name in enumerate(TRANSFORMS)
            for j, column in enumerate(columns)
            for few in [j == i % len(columns)]
        ],
    )


def step_of(tx, row):
    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return row.apply(params, updates, state), state

    return step


def kinds(tree):
    """Structure, shapes and types, weak ones too, as a second compilation sees them."""
    kind = lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False))  # keys: never
    return jax.tree.map(kind, tree)


def train(tx, row, params, compilations=1):
    """Some jitted steps; what is promised is looked at after each."""
    step = jax.jit(step_of(tx, row))
    state = jax.jit(tx.init)(params)
    if row.kept is masked:  # as one begins: masks may be there from the start
        params = js.patterns.apply(params, js.masks_of(state))
    before = kinds((params, state))
    for t in range(STEPS):
        params, state = step(params, state, batch(t))
        assert kinds((params, state)) == before
        if row.kept is not None:
            assert_exact_zeros(params, row.kept(params, state))
    assert step._cache_size() <= compilations
    assert all(jnp.isfinite(w).all() for w in params.values())
    return params, state


@pairs(OPTIMIZERS)
def test_with_every_optimizer(name, column):
    row = TRANSFORMS[name]
    # One parameter in bfloat16, so that one compilation tests both types.
    params = parameters(("float32", "float32", "bfloat16"))
    _, state = train(row.make(OPTIMIZERS[column]()), row, params)
    if row.kept is masked:
        kept = js.masks_of(state)
        assert [int(kept[k].sum()) for k in ("up", "down")] == [64, 64]
        assert kept["bias"].shape == ()


@pairs(WRAPPERS)
def test_with_every_wrapper(name, column):
    row = TRANSFORMS[name]
    train(WRAPPERS[column](row.make), row, parameters())


@representatives
def test_eager_steps_are_jitted_steps_and_compile_once(name, compilations):
    row = TRANSFORMS[name]
    tx, params = row.make(optax.sgd(0.05)), parameters()
    step = step_of(tx, row)
    eager, jitted = [(params, tx.init(params))], (params, tx.init(params))
    for t in range(2):
        eager.append(step(*eager[-1], batch(t)))
        jitted = jax.jit(step)(*jitted, batch(t))
    for got, expected in zip(
        jax.tree.leaves(jitted), jax.tree.leaves(eager[-1]), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    with compilations() as again:
        step(*eager[1], batch(1))
    assert again.names == []


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if few else pytest.mark.exhaustive)
        for name in TRANSFORMS
        # To compile that one, anew in each run, takes as long as all others together.
        for few in [name in REPRESENTATIVES - {"windowed_obs"}]
    ],
)
def test_shardings_are_kept_and_change_nothing(name):
    one, _ = trained(name, parameters())
    with compiled_anew() if name == "windowed_obs" else contextlib.nullcontext():
        _shardings_are_kept(name, one)


@contextlib.contextmanager
def compiled_anew():
    """Keeps nothing that is compiled for a later run.

    Independent collectives of a program that jaxlib 0.10 reads from the cache may begin
    in another order on each simulated device, which then wait for each other for ever.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


def trained(name, params, **options):
    row = TRANSFORMS[name]
    return train(row.make(adam()), row, params, **options)


def _shardings_are_kept(name, one):
    row, params = TRANSFORMS[name], parameters()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    put = lambda w: jax.device_put(w, NamedSharding(mesh, P("x")))
    spread = jax.tree.map(put, params)
    # The first step settles where its state lies; from then on nothing is compiled.
    many, state = trained(name, spread, compilations=2)
    for path, w in many.items():
        assert w.sharding.is_equivalent_to(spread[path].sharding, w.ndim)
        np.testing.assert_allclose(w, one[path], rtol=1e-5, atol=1e-6)
    if row.kept is masked:
        for path, mask in js.masks_of(state).items():
            if mask.shape == SHAPES[path]:
                assert mask.sharding.is_equivalent_to(spread[path].sharding, mask.ndim)


def test_every_public_transformation_has_a_row():
    # Those that are none: they read states, or are called in place of one.
    others = {
        *("apply_updates", "assert_sparse", "dropped", "find_states", "init_sparse"),
        *("masks_of", "explored"),
        "drop_and_grow",  # by rigl, set_ and snfs
        "mfac",  # a chain of scale_by_mfac and optax's members
    }
    every = {**vars(js.transforms), **vars(js.penalties)}
    public = {k for k, f in every.items() if callable(f) and k[0].islower()}
    found = {name.split(",")[0] for name in TRANSFORMS}
    assert public - others == found - {"wgsef_prox"}  # that is in contrib
