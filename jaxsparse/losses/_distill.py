"""Knowledge distillation: the pruned network imitates the dense one."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import wide_dtype
from jaxsparse._typing import Array


def distill(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array | None = None,
    *,
    temperature: Any,
    hardness: Any,
) -> Array:
    """Return the loss of a student that imitates a teacher, for each example.

    `(1 - hardness) * CE(labels, student) + hardness * T^2 * KL(p_T || q_T)`, with the
    teacher's `p_T = softmax(teacher_logits / T)` and the student's `q_T` likewise
    (Hinton et al., 2015, arXiv:1503.02531). The factor `T^2` keeps the size of the
    gradients when the temperature `T` changes. oBERT (arXiv:2203.07259) uses
    `hardness=1.0` with temperature 2.0 on a task and 5.5 in pre-training;
    `jaxsparse.recipes` has these numbers.

    No gradient flows into the teacher. Classes that the teacher excludes with a logit
    of -inf add nothing, whatever the student's logit; a class that the student alone
    excludes costs infinity, as the definition has it. It computes in float32 (float64
    for float64 logits), also for bfloat16 logits.

    Differs from the reference implementation (SparseML), which returns a mean over the
    batch: here one number for each example or token comes back, so that padding can be
    left out, as in `jnp.mean(loss, where=is_token)`.

    Args:
      student_logits: `[..., classes]`.
      teacher_logits: the same shape.
      labels: integers in `[0, classes)` of shape `[...]`. They may be left out at
        hardness 1, where the student learns from its teacher alone.
      temperature: positive; higher tells more of the less likely classes.
      hardness: the share of the teacher, in [0, 1]. A number skips the part whose share
        is 0; a traced value needs the labels.

    Returns:
      The loss, `[...]`, NaN where logits are.

    Raises:
      TypeError: logits that are not floating, labels that are no integers; a
        temperature or hardness that is no number.
      ValueError: shapes that do not fit, missing labels, a temperature or hardness out
        of range.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> teacher = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> student = jnp.array([[2.0, 0.0], [1.0, 0.0]])
      >>> loss = js.losses.distill(student, teacher, temperature=2.0, hardness=1.0)
      >>> [round(float(x), 4) for x in loss]
      [0.0, 0.4898]
      >>> labels = jnp.array([0, 1])
      >>> loss = js.losses.distill(
      ...     student, teacher, labels, temperature=2.0, hardness=0.5)
      >>> [round(float(x), 4) for x in loss]
      [0.0635, 0.9015]
    """
    _check_number("temperature", temperature)
    _check_number("hardness", hardness)
    check_logits(student_logits, teacher_logits)
    fixed = _checks.is_concrete(hardness)
    student, teacher = _wide(student_logits), lax.stop_gradient(_wide(teacher_logits))
    imitation = 0.0
    if not (fixed and hardness == 0):
        imitation = hardness * temperature**2 * _kl(student, teacher, temperature)
    if fixed and hardness == 1:
        return jnp.asarray(imitation)
    if labels is None:
        raise ValueError(
            "labels: missing, and a hardness below 1 gives them a share of the loss. "
            "Pass them, or hardness=1.0."
        )
    _check_labels(labels, student_logits)
    task = optax.losses.softmax_cross_entropy_with_integer_labels(student, labels)
    return (1 - hardness) * task + imitation


def _kl(student: Array, teacher: Array, temperature: Any) -> Array:
    """KL(p_T || q_T) over the last axis, without the classes that p_T excludes."""
    log_p = jax.nn.log_softmax(teacher / temperature)
    log_q = jax.nn.log_softmax(student / temperature)
    # 0 log 0 is 0. The difference of two -inf is NaN: even left out of the sum it would
    # stop a program that looks for NaN.
    there = jnp.exp(log_p) > 0
    log_p = jnp.where(there, log_p, jnp.zeros((), log_p.dtype))
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p, where=there)


def _wide(logits: Array) -> Array:
    logits = jnp.asarray(logits)
    return logits.astype(wide_dtype(logits.dtype))


def _check_number(name: str, value: Any) -> None:
    if not _checks.is_concrete(value):
        return
    if isinstance(value, bool) or not (
        isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0
    ):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if name == "temperature" and not 0 < float(value) < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {value!r}.")
    if name == "hardness" and not 0 <= float(value) <= 1:
        raise ValueError(
            f"hardness must lie in [0, 1]: it is the share of the teacher; got {value}."
        )


def check_logits(student: Array, teacher: Array) -> None:
    """Raises unless both are logits of one shape."""
    _checks.check_arrays(student_logits=student, teacher_logits=teacher)
    for name, logits in {"student": student, "teacher": teacher}.items():
        dtype = jnp.asarray(logits).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{name}_logits must be floating-point, got {dtype}.")
    if jnp.shape(student) != jnp.shape(teacher) or not jnp.ndim(student):
        raise ValueError(
            "student_logits and teacher_logits must have one shape [..., classes]; got "
            f"{jnp.shape(student)} and {jnp.shape(teacher)}."
        )


def _check_labels(labels: Array, logits: Array) -> None:
    dtype = jnp.asarray(labels).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers, the indices of classes; got {dtype}."
        )
    if jnp.shape(labels) != jnp.shape(logits)[:-1]:
        raise ValueError(
            f"labels of shape {jnp.shape(labels)} do not fit logits of shape "
            f"{jnp.shape(logits)}: expected {jnp.shape(logits)[:-1]}."
        )
