import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

STEPS = np.arange(0, 130)
DTYPES = [np.int32, np.uint32, np.int64, np.float32]


def polynomial(step, init, final, begin, end, power):
    """Zhu & Gupta's formula in float64."""
    t = np.clip((np.float64(step) - begin) / (end - begin), 0, 1)
    return final + (init - final) * (1 - t) ** power


@pytest.mark.parametrize("power", [1, 3, 0.5])
@pytest.mark.parametrize(("init", "final"), [(0.0, 0.9), (0.3, 0.8), (0.8, 0.1)])
def test_the_polynomial_is_that_of_the_paper(init, final, power):
    schedule = js.schedules.polynomial(
        init=init, final=final, begin=20, end=100, power=power
    )
    expected = polynomial(STEPS, init, final, 20, 100, power)
    np.testing.assert_allclose(schedule(STEPS), expected, rtol=0, atol=2e-7)


def test_the_ends_are_exact():
    schedule = js.schedules.polynomial(init=0.35, final=0.95, begin=7, end=101)
    for step in (0, 7):
        assert schedule(step) == np.float32(0.35)
    for step in (101, 10**6):
        assert schedule(step) == np.float32(0.95)
        assert js.patterns.removed_count(schedule(step), 10**8) == 95_000_000


def test_late_steps_lose_no_digits():
    begin = 2**30
    schedule = js.schedules.polynomial(final=0.5, begin=begin, end=begin + 4, power=1)
    got = [float(schedule(begin + t)) for t in range(5)]
    assert got == [0.0, 0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "schedule",
    [
        js.schedules.polynomial(final=0.9, begin=20, end=100),
        js.schedules.one_shot(0.5, step=20),
        js.schedules.alternating(0.5, begin=20, end=100, sparse=5, dense=3),
        js.schedules.constant(0.5),
    ],
    ids=["polynomial", "one_shot", "alternating", "constant"],
)
def test_every_type_of_step_gives_the_same_float32(schedule, dtype):
    expected = [schedule(int(t)) for t in STEPS[::10]]
    got = [schedule(dtype(t)) for t in STEPS[::10]]
    assert got == expected
    assert all(s.dtype == jnp.float32 and s.shape == () for s in got)


def test_one_shot_cuts_at_its_step():
    schedule = js.schedules.one_shot(0.75, step=10)
    np.testing.assert_array_equal(schedule(STEPS), np.where(STEPS < 10, 0, 0.75))


def test_alternating_phases_follow_each_other_and_end_sparse():
    schedule = js.schedules.alternating(0.5, begin=3, end=14, sparse=4, dense=2)
    phases = "...ssss..ssss.ssss"
    assert "".join("s" if schedule(t) else "." for t in range(18)) == phases


def test_a_schedule_runs_under_jit_and_in_an_optax_chain():
    schedule = js.schedules.polynomial(final=0.8, begin=0, end=10)
    assert jax.jit(schedule)(5) == schedule(5)
    joined = optax.join_schedules([schedule, js.schedules.constant(0.5)], [5])
    assert joined(jnp.int32(7)) == 0.5


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), 90])
@pytest.mark.parametrize(
    "make",
    [
        js.schedules.constant,
        lambda s: js.schedules.one_shot(s, step=1),
        lambda s: js.schedules.polynomial(final=s, begin=0, end=1),
        lambda s: js.schedules.polynomial(init=s, final=0.5, begin=0, end=1),
        lambda s: js.schedules.alternating(s, begin=0, end=9, sparse=1, dense=1),
    ],
    ids=["constant", "one_shot", "final", "init", "alternating"],
)
def test_a_sparsity_outside_its_range_is_refused(make, sparsity):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        make(sparsity)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: js.schedules.polynomial(final=0.5, begin=9, end=9), "one_shot"),
        (lambda: js.schedules.polynomial(final=0.5, begin=-1, end=9), "begin must be"),
        (
            lambda: js.schedules.polynomial(final=0.5, begin=0, end=9, power=0),
            "power must be positive",
        ),
        (lambda: js.schedules.one_shot(0.5, step=-1), "step must be at least 0"),
        (
            lambda: js.schedules.alternating(0.5, begin=9, end=8, sparse=1, dense=1),
            "end must be at least 9",
        ),
        (
            lambda: js.schedules.alternating(0.5, begin=0, end=8, sparse=0, dense=1),
            "sparse must be at least 1",
        ),
    ],
)
def test_schedules_without_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
