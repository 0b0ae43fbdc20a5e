"""After apply_updates every pruned coordinate is exactly 0.0."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import problems

import jaxsparse as js

GRADUAL = js.schedules.polynomial(final=0.8, begin=5, end=65)
CADENCE = js.schedules.every(5, begin=5, end=65)


def schedule(**options):
    return js.prune_schedule(GRADUAL, every=CADENCE, **options)


SPELLINGS = {
    "enforce": lambda opt: (js.enforce(optax.chain(schedule(), opt)), None),
    "literal": lambda opt: (optax.chain(schedule(), opt), js.apply_updates),
    "last": lambda opt: (optax.chain(opt, js.keep_sparse(schedule())), None),
}


def assert_exact_zeros(params, masks):
    for w, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
        pruned = np.asarray(w)[~np.broadcast_to(np.asarray(mask), w.shape)]
        # Compared as bits: -0.0 would be no exact zero.
        assert not any(pruned.tobytes()), np.abs(pruned).max()


def few_pairs():
    """One optimizer for each spelling.

    The others are exhaustive: that zeros hold in a few steps with every optimizer
    `contracts/test_transforms.py` tests.
    """
    few = {("adam", "enforce"), ("momentum", "literal"), ("muon", "last")}
    return pytest.mark.parametrize(
        ("optimizer", "spelling"),
        [
            pytest.param(*pair, marks=[] if pair in few else pytest.mark.exhaustive)
            for pair in itertools.product(problems.OPTIMIZERS, SPELLINGS)
        ],
    )


@few_pairs()
@pytest.mark.usefixtures("relaxed_promotion")
def test_every_optimizer_keeps_exact_zeros_in_every_spelling(optimizer, spelling):
    tx, apply = SPELLINGS[spelling](problems.OPTIMIZERS[optimizer]())
    looked = []

    def seen(step, params, opt_state):
        if step % 5 == 0:
            assert_exact_zeros(params, js.masks_of(opt_state))
            looked.append(step)

    start = problems.params()
    params, state = problems.train(tx, start, apply=apply, seen=seen)
    assert len(looked) == problems.STEPS // 5
    js.assert_sparse(state, params)
    masks = js.masks_of(state)
    for layer in ("dense_0", "dense_1"):
        kept = int(np.sum(masks[layer]["kernel"]))
        n = start[layer]["kernel"].size
        assert n - kept == int(np.floor(0.8 * n + 0.5))
    assert bool(masks["dense_0"]["bias"])
    x = problems.batch(1000)
    begun = jax.jit(js.patterns.apply)(start, masks)
    assert problems.loss(params, x) < problems.loss(begun, x)


@pytest.mark.parametrize(
    "optimizer",
    [
        "adam",
        # What is counted is the same: weights that are not zero.
        pytest.param("momentum", marks=pytest.mark.exhaustive),
        pytest.param("muon", marks=pytest.mark.exhaustive),
        pytest.param("noisy_sgd", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.usefixtures("relaxed_promotion")
def test_the_literal_chain_with_plain_apply_updates_is_found_out(optimizer):
    tx = optax.chain(schedule(), problems.OPTIMIZERS[optimizer]())
    params, state = problems.train(tx, problems.params())
    (pruning,) = js.transforms.find_states(state)
    assert int(pruning.leaked) > 0
    with pytest.raises(ValueError, match=r"pruned weights are not zero.*js\.enforce"):
        js.assert_sparse(state)
    with pytest.raises(ValueError, match="dense_1/kernel: "):
        js.assert_sparse(state, params)


@pytest.mark.parametrize(
    "pattern",
    [
        js.Unstructured(scope="global"),
        *(
            pytest.param(pattern, marks=pytest.mark.exhaustive)
            for pattern in (
                js.NM(keep=1, of=4),
                js.Channel(),
                js.Unstructured(scope="output"),
                js.Block((4, 4)),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("relaxed_promotion")
def test_every_pattern_keeps_exact_zeros(pattern):
    final = 0.75
    prune = js.prune_schedule(
        js.schedules.polynomial(final=final, begin=5, end=65),
        every=CADENCE,
        pattern=pattern,
    )
    params, state = problems.train(prune.wrap(optax.adam(1e-2)), problems.params())
    masks = js.masks_of(state)
    assert_exact_zeros(params, masks)
    js.patterns.verify(masks, params, pattern=pattern)
    reached = js.patterns.sparsity_of(masks, params)
    assert max(reached["dense_0"]["kernel"], reached["dense_1"]["kernel"]) >= 0.74


@pytest.mark.usefixtures("relaxed_promotion")
def test_bf16_parameters_with_float32_moments_keep_exact_zeros():
    short = lambda w: np.asarray(w).astype(jnp.bfloat16)
    params = jax.tree.map(short, problems.params())
    tx = schedule().wrap(optax.adam(1e-2, mu_dtype=jnp.float32))
    grads = jax.tree.map(lambda w: w * short(0.5), params)

    @jax.jit
    def step(state, params):
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    state = jax.jit(tx.init)(params)
    for _ in range(70):
        state, params = step(state, params)
    masks = js.masks_of(state)
    assert params["dense_0"]["kernel"].dtype == jnp.bfloat16
    assert np.sum(masks["dense_0"]["kernel"]) == 38  # 192 - 154
    js.assert_sparse(state, params)


def test_an_update_of_lower_precision_than_its_parameter_still_cancels_it():
    params = {"w": jnp.array([[1.0, 1 / 3]])}
    to_bf16 = optax.stateless_with_tree_map(lambda u, _: u.astype(jnp.bfloat16))
    tx = js.enforce(
        optax.chain(js.prune_schedule(0.5, every=1), optax.sgd(0.1), to_bf16)
    )
    state = jax.jit(tx.init)(params)
    updates, state = jax.jit(tx.update)({"w": np.ones((1, 2), "f4")}, state, params)
    assert updates["w"].dtype == jnp.float32
    with jax.numpy_dtype_promotion("standard"):
        assert float(optax.apply_updates(params, updates)["w"][0, 1]) == 0.0
    js.assert_sparse(state)
