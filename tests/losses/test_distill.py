import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.losses import distill


@functools.cache
def jitted(temperature, hardness):
    return jax.jit(
        functools.partial(distill, temperature=temperature, hardness=hardness)
    )


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def oracle(student, teacher, labels, temperature, hardness):
    """The formula in float64."""
    student, teacher = np.float64(student), np.float64(teacher)
    log_p, log_q = (
        log_softmax(teacher / temperature),
        log_softmax(student / temperature),
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    ce = -np.take_along_axis(log_softmax(student), labels[..., None], -1)[..., 0]
    return (1 - hardness) * ce + hardness * temperature**2 * kl


def problem(shape=(2, 3, 5), seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, *shape)).astype(np.float32) * 3
    return student, teacher, rng.integers(shape[-1], size=shape[:-1])


@pytest.mark.parametrize("hardness", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.5])
def test_it_is_the_formula(temperature, hardness):
    student, teacher, labels = problem()
    given = {"temperature": temperature, "hardness": hardness}
    eager = functools.partial(distill, **given)
    loss = eager if temperature == 1 else jitted(**given)  # either will do
    got = loss(student, teacher, labels)
    expected = oracle(student, teacher, labels, **given)
    assert got.shape == labels.shape
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_the_gradient_is_that_of_the_formula_and_spares_the_teacher():
    student, teacher, labels = problem((4, 5))
    t, h = 2.0, 0.75

    def total(student, teacher):
        return distill(student, teacher, labels, temperature=t, hardness=h).sum()

    got, into_teacher = jax.jit(jax.grad(total, argnums=(0, 1)))(student, teacher)
    p, q = np.exp(log_softmax(teacher / t)), np.exp(log_softmax(student / t))
    task = np.exp(log_softmax(student)) - np.eye(5)[labels]
    np.testing.assert_allclose(got, h * t * (q - p) + (1 - h) * task, atol=2e-6)
    assert not np.any(np.asarray(into_teacher))


def test_a_perfect_imitation_costs_nothing():
    student, _, _ = problem()
    loss = lambda x: distill(x, student, temperature=2.0, hardness=1.0).sum()
    assert float(loss(student)) == 0
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(student), 0, atol=1e-6)


LEAST = float(np.finfo(np.float32).min)
gradient_by_student = jax.jit(
    jax.grad(lambda *args: jitted(temperature=2.0, hardness=0.5)(*args).sum())
)


@pytest.mark.parametrize(
    ("in_student", "in_teacher"),
    [(-np.inf, -np.inf), (LEAST, LEAST), (-np.inf, LEAST), (LEAST, -np.inf)],
)
def test_classes_that_both_exclude_do_not_count(in_student, in_teacher):
    student, teacher, labels = problem((4, 5))
    labels = labels % 3  # one of the classes that stay
    given = {"temperature": 2.0, "hardness": 0.5}
    expected = oracle(student[:, :3], teacher[:, :3], labels, **given)
    student[:, 3:], teacher[:, 3:] = in_student, in_teacher
    with jax.debug_nans(True):
        got = jitted(**given)(student, teacher, labels)
        gradient = np.asarray(gradient_by_student(student, teacher, labels))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    assert np.isfinite(gradient).all()
    assert not gradient[:, 3:].any()


def test_a_student_unlearns_what_its_teacher_excludes():
    student, teacher, _ = problem((4, 5))
    loss = jitted(2.0, 1.0)
    nearly = np.where(np.arange(5) < 3, teacher, np.float32(-1e4))
    teacher[:, 3:] = -np.inf
    expected = loss(student, nearly)
    np.testing.assert_allclose(loss(student, teacher), expected, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: loss(x, teacher).sum()))(student)
    assert (np.asarray(gradient)[:, 3:] > 0).all()


def test_a_class_that_the_student_alone_excludes_costs_infinity():
    student = np.zeros((4, 5), np.float32)
    student[0, 1] = -np.inf
    loss = jitted(2.0, 1.0)(student, np.zeros_like(student))
    assert loss.tolist() == [np.inf, 0.0, 0.0, 0.0]


def test_bf16_logits_are_computed_with_in_float32():
    student, teacher, labels = problem((8, 200))
    short = [x.astype(jnp.bfloat16) for x in (student, teacher)]
    wide = [x.astype(np.float32) for x in short]
    loss = jitted(2.0, 0.5)
    got = loss(*short, labels)
    assert got.dtype == jnp.float32
    # Far below one rounding to bfloat16.
    np.testing.assert_allclose(got, loss(*wide, labels), rtol=1e-5)
    np.testing.assert_allclose(loss(short[0], wide[1], labels), got, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: loss(x, short[1], labels).sum()))(short[0])
    assert gradient.dtype == jnp.bfloat16


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64():
    student, teacher, labels = problem()
    student, teacher = np.float64(student), np.float64(teacher)
    got = jitted(2.0, 0.5)(student, teacher, labels)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(
        got, oracle(student, teacher, labels, 2.0, 0.5), rtol=1e-12
    )


def test_temperature_and_hardness_may_be_traced():
    student, teacher, labels = problem()
    f = jax.jit(
        lambda t, h: distill(student, teacher, labels, temperature=t, hardness=h)
    )
    for t, h in [(2.0, 0.5), (5.5, 1.0), (1.0, 0.0)]:
        expected = distill(student, teacher, labels, temperature=t, hardness=h)
        np.testing.assert_allclose(f(t, h), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="labels: missing"):
        jax.jit(lambda h: distill(student, teacher, temperature=1.0, hardness=h))(1.0)


def test_a_part_without_a_share_is_not_computed():
    student, teacher, labels = problem()
    nothing = np.full_like(teacher, np.nan)
    got = distill(student, nothing, labels, temperature=2.0, hardness=0)
    np.testing.assert_allclose(
        got, oracle(student, teacher, labels, 2.0, 0.0), rtol=2e-5, atol=2e-6
    )


LOGITS = np.zeros((2, 3, 5), np.float32)
LABELS = np.zeros((2, 3), np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"hardness": 1.5}, r"hardness must lie in \[0, 1\]"),
        ({"hardness": -0.5}, r"hardness must lie in \[0, 1\]"),
        ({"labels": None}, "labels: missing"),
        ({"labels": LABELS[:1]}, r"labels of shape \(1, 3\) do not fit"),
        ({"teacher_logits": LOGITS[:, :2]}, r"got \(2, 3, 5\) and \(2, 2, 5\)"),
        ({"teacher_logits": LOGITS[0]}, r"got \(2, 3, 5\) and \(3, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    right = {"student_logits": LOGITS, "teacher_logits": LOGITS, "labels": LABELS}
    right |= {"temperature": 2.0, "hardness": 0.5}
    distill(**right)
    with pytest.raises(ValueError, match=message):
        distill(**right | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits": LOGITS.astype(int)}, "student_logits must be floating"),
        ({"teacher_logits": LOGITS.astype(int)}, "teacher_logits must be floating"),
        ({"labels": LOGITS[..., 0]}, "labels must be integers"),
        ({"hardness": "0.5"}, "hardness must be a number"),
        ({"temperature": LOGITS[0, 0]}, "temperature must be a number"),
    ],
)
def test_types_are_checked(change, message):
    right = {"student_logits": LOGITS, "teacher_logits": LOGITS, "labels": LABELS}
    right |= {"temperature": 2.0, "hardness": 0.5}
    with pytest.raises(TypeError, match=message):
        distill(**right | change)
