import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsparse.schedules import rewinding


def linear(t, peak, end, length):
    """SparseML's `linear`: it would reach `end` one step after the phase."""
    return peak + (end - peak) * t / length


def cyclic(t, peak, end, cycle):
    """SparseML's `cyclic_linear`: it reaches `end` in the last step of each cycle."""
    return peak - (t % cycle) / (cycle - 1) * (peak - end)


def downstream(steps_per_epoch):
    """Two epochs, then cycles of four, to thirty."""
    t = np.arange(30 * steps_per_epoch, dtype=np.float64)
    begin = 2 * steps_per_epoch
    return np.where(
        t < begin,
        linear(t, 8e-5, 8e-6, begin),
        cyclic(t - begin, 8e-5, 8e-6, 4 * steps_per_epoch),
    )


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 100])
def test_it_is_the_schedule_of_the_recipes(steps_per_epoch):
    expected = downstream(steps_per_epoch)
    total = len(expected)
    at = range(2 * steps_per_epoch, total, 4 * steps_per_epoch)
    schedule = rewinding(peak=8e-5, end=8e-6, at=at, total_steps=total)
    np.testing.assert_allclose(schedule(np.arange(total)), expected, rtol=2e-6)


def test_it_is_the_schedule_of_the_upstream_recipe():
    t = np.arange(300)
    schedule = rewinding(peak=5e-4, end=5e-6, at=range(0, 300, 25), total_steps=300)
    np.testing.assert_allclose(schedule(t), cyclic(t, 5e-4, 5e-6, 25), rtol=2e-6)


def test_the_edges_of_cycles_are_exact():
    at, total = (16, 60, 75, 76, 90), 130
    schedule = rewinding(peak=0.5, end=0.125, at=at, total_steps=total)
    assert [float(schedule(t)) for t in (0, *at)] == [0.5] * 6
    last = [b - 1 for b in (*at, total)]
    # The first phase meets `end` one step later, a cycle of one step has its peak.
    expected = [0.125 + 0.375 / 16, 0.125, 0.125, 0.5, 0.125, 0.125]
    assert [float(schedule(t)) for t in last] == expected
    assert float(schedule(10**6)) == 0.125


def test_a_constant_rate_is_allowed():
    schedule = rewinding(peak=0.5, end=0.5, at=(3,), total_steps=9)
    assert set(np.asarray(schedule(np.arange(12))).tolist()) == {0.5}


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.float32])
def test_every_type_of_step_gives_the_same_float32(dtype):
    schedule = rewinding(peak=1e-3, end=1e-5, at=(5, 20), total_steps=40)
    got = [schedule(dtype(t)) for t in range(0, 40, 3)]
    assert got == [schedule(t) for t in range(0, 40, 3)]
    assert all(x.dtype == jnp.float32 and x.shape == () for x in got)


def test_it_runs_under_jit_and_drives_an_optimizer():
    schedule = rewinding(peak=0.5, end=0.125, at=(2, 5), total_steps=9)
    expected = np.asarray(schedule(jnp.arange(9)))
    jitted = jax.jit(schedule)(jnp.arange(9))
    np.testing.assert_allclose(jitted, expected, rtol=1e-6)
    tx = optax.sgd(schedule)
    state, update = tx.init(jnp.zeros(())), jax.jit(tx.update)
    taken = []
    for _ in range(9):
        step, state = update(jnp.ones(()), state)
        taken.append(-float(step))
    np.testing.assert_allclose(taken, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at": ()}, "optax.linear_schedule"),
        ({"at": (5, 5)}, "steps must increase; got 5 after 5"),
        ({"at": (7, 5)}, "steps must increase; got 5 after 7"),
        ({"at": (-1,)}, "at: a step must be at least 0"),
        ({"at": (5, 10)}, "rewind at step 10 is not within the training's 10 steps"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"peak": 1e-6}, "0 <= end <= peak"),
        ({"end": -1e-5}, "0 <= end <= peak"),
        ({"peak": float("nan")}, "0 <= end <= peak"),
        ({"peak": float("inf")}, "0 <= end <= peak"),
    ],
)
def test_schedules_without_meaning_are_refused(change, message):
    right = {"peak": 1e-3, "end": 1e-5, "at": (5,), "total_steps": 10}
    rewinding(**right)
    with pytest.raises(ValueError, match=message):
        rewinding(**right | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at": (2.5,)}, "at: a step must be an integer"),
        ({"peak": "1e-3"}, "peak must be a number"),
        ({"total_steps": 9.5}, "total_steps must be an integer"),
    ],
)
def test_types_are_checked(change, message):
    right = {"peak": 1e-3, "end": 1e-5, "at": (5,), "total_steps": 10}
    with pytest.raises(TypeError, match=message):
        rewinding(**right | change)
