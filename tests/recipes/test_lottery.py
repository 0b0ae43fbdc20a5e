"""Rounds of lottery tickets: what is removed, where they begin, how they resume."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

PARAMS = {
    "kernel": jnp.asarray(
        np.random.default_rng(0).standard_normal((10, 8)).astype(np.float32)
    ),
    "bias": jnp.ones(8),
}


class Training:
    """Adds a number that depends on the round, and remembers where it began."""

    def __init__(self, fails_at=None):
        self.starts, self.fails_at = [], fails_at

    def __call__(self, params, masks, number):
        if number == self.fails_at:
            raise KeyboardInterrupt
        self.starts.append(params)
        noise = np.random.default_rng(10 + number).standard_normal((10, 8))
        moved = {**params, "kernel": params["kernel"] + jnp.asarray(noise, jnp.float32)}
        return js.patterns.apply(moved, masks)


@pytest.mark.parametrize("rewinds", [True, False])
def test_rounds(rewinds):
    train = Training()
    tickets = list(
        js.recipes.lottery_tickets(
            train,
            PARAMS,
            rounds=3,
            fraction=0.5,
            rewind_to=PARAMS if rewinds else None,
        )
    )
    assert [int(jnp.sum(t.masks["kernel"])) for t in tickets[1:]] == [40, 20, 10]
    assert [t.sparsity for t in tickets] == [0, 0.5, 0.75, 0.875]
    for (before, after), start in zip(
        itertools.pairwise(tickets), train.starts[1:], strict=True
    ):
        was, now = (
            np.broadcast_to(t.masks["kernel"], (10, 8)) for t in (before, after)
        )
        assert not np.any(now & ~was)
        sizes = np.where(was, np.abs(before.params["kernel"]), -1)
        np.testing.assert_array_equal(now, sizes >= np.sort(sizes.ravel())[-now.sum()])
        begin = PARAMS if rewinds else before.params
        np.testing.assert_array_equal(
            start["kernel"], np.where(now, begin["kernel"], 0)
        )


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    call = lambda train, directory: js.recipes.lottery_tickets(
        train, PARAMS, rounds=3, rewind_to=PARAMS, directory=directory
    )
    whole = list(call(Training(), tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        list(call(Training(fails_at=2), tmp_path / "killed"))
    rest = list(call(Training(), tmp_path / "killed"))
    assert [t.round for t in rest] == [1, 2, 3]
    for got, expected in zip(rest, whole[1:], strict=True):
        same = jax.tree.map(np.array_equal, got, expected)
        assert jax.tree.all(same)
    other = js.recipes.lottery_tickets(
        Training(), PARAMS, rounds=3, fraction=0.5, directory=tmp_path / "killed"
    )
    with pytest.raises(ValueError, match="rounds of another run"):
        next(other)


def test_a_training_that_loses_its_masks_is_named():
    forgets = lambda params, masks, number: PARAMS
    tickets = js.recipes.lottery_tickets(forgets, PARAMS, rounds=1)
    next(tickets)
    with pytest.raises(ValueError, match="kernel: train returned 16 weights"):
        next(tickets)
    with pytest.raises(ValueError, match="one sparsity"):
        js.recipes.lottery_tickets(forgets, PARAMS, rounds=1, pattern=js.NM(2, 4))
