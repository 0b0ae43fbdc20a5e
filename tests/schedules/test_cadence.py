import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.schedules import at, every

CADENCES = [
    (every(10, begin=5, end=30), [5, 15, 25]),
    (every(10, begin=5, end=35), [5, 15, 25, 35]),
    (every(7), [0, 7, 14, 21, 28, 35, 42, 49]),
    (every(1, begin=48), [48, 49]),
    (every(3, begin=4, end=4), [4]),
    (at(3, 30), [3, 30]),
    (at(30, 3, 3), [3, 30]),
]


@pytest.mark.parametrize(("cadence", "steps"), CADENCES)
def test_masks_change_at_these_steps(cadence, steps):
    assert [t for t in range(50) if cadence(t)] == steps
    assert np.flatnonzero(jax.jit(cadence)(jnp.arange(50))).tolist() == steps
    unsigned = jnp.arange(50, dtype=jnp.uint32)
    assert np.flatnonzero(cadence(unsigned)).tolist() == steps


@pytest.mark.parametrize(("cadence", "steps"), CADENCES)
def test_the_last_update_of_a_training_is_known(cadence, steps):
    for length in range(51):
        before = [t for t in steps if t < length]
        assert cadence.last(length) == (before[-1] if before else -1)


def test_without_an_end_there_is_no_last_update():
    assert every(10).last() is None
    assert every(10, end=95).last() == 90
    assert at(3, 30).last() == 30


def test_cadences_are_values():
    assert every(10, begin=5) == every(10, begin=5)
    assert hash(at(3, 30)) == hash(at(30, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: every(0), "interval must be at least 1"),
        (lambda: every(10, begin=-1), "begin must be at least 0"),
        (lambda: every(10, begin=5, end=4), "Masks would never change"),
        (at, "lists no step"),
        (lambda: at(3, -1), "step must be at least 0"),
    ],
)
def test_a_cadence_without_updates_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make", [lambda: every(2.5), lambda: at(True), lambda: at("3")]
)
def test_steps_are_integers(make):
    with pytest.raises(TypeError, match="must be an integer"):
        make()
