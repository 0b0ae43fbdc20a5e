"""SquareHead: the pruned network imitates the dense one's hidden states."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _checks
from jaxsparse._dtypes import as_wide
from jaxsparse._typing import Array, PyTree
from jaxsparse.tree import leaves_with_paths


def square_head(
    student: PyTree, teacher: PyTree, *, mask: Array | None = None, eps: float = 2**-7
) -> Array:
    """Return how far a student's hidden states are from its teacher's, relatively.

    `sum_l mean((s_l - t_l)^2) / (mean(t_l^2) + eps)` over layers `l`, with means over
    tokens that are no padding and over features. Kurtic et al. (2023, "Sparse
    Fine-tuning for Inference Acceleration of Large Language Models", arXiv:2310.06927):
    states after each block, beside the task's loss with equal weight::

        loss = task_loss + js.losses.square_head(states, dense_states, mask=is_token)

    Each layer counts by itself, whatever the size of its states. Unlike
    `jaxsparse.losses.distill` it is one number for a batch, as the divisor is a mean
    over all of its tokens. No gradient flows into the teacher. It computes in float32
    (float64 for float64 states).

    Args:
      student: a tree of hidden states, such as a list with one `[batch, tokens, d]` for
        each block.
      teacher: the same of the dense network.
      mask: bools of the states' leading axes, such as `[batch, tokens]`, False for
        padding, which may hold NaN; None for no padding. At least one is True.
      eps: 2^-7 in the reference implementation, the precision of bfloat16.

    Returns:
      The loss, a scalar.

    Raises:
      ValueError: states of another structure or shape, a mask of other leading axes, a
        negative `eps`.
      TypeError: states that are not floating-point, a mask that is not of bools.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> dense = [jnp.array([[3.0, 4.0], [9.0, 9.0]]), jnp.array([[1.0, 1.0]] * 2)]
      >>> pruned = [jnp.array([[3.0, 4.5], [0.0, 0.0]]), jnp.array([[1.0, 0.0]] * 2)]
      >>> mask = jnp.array([True, False])
      >>> float(js.losses.square_head(pruned, dense, mask=mask, eps=0.0))   # 0.01 + 0.5
      0.5099999904632568
    """
    _checks.check_like(teacher, student=student, of="teacher")
    _checks.check_number(least=0, eps=eps)
    if mask is not None:
        _checks.check_bools(mask, name="mask")
    total = jnp.zeros((), jnp.float32)
    pairs = zip(leaves_with_paths(student), jax.tree.leaves(teacher), strict=True)
    for (path, s), t in pairs:
        _check(path, s, t, mask)
        s, t = as_wide(jnp.asarray(s)), lax.stop_gradient(as_wide(jnp.asarray(t)))
        apart, size = _mean((s, t), mask), _mean((t, jnp.zeros_like(t)), mask)
        total = total + apart / (size + eps)
    return total


def _mean(pair: tuple[Array, Array], mask: Array | None) -> Array:
    """The mean of squared differences where the mask is True, 0 where it never is."""
    a, b = pair
    if mask is None:
        return jnp.mean((a - b) ** 2)
    here = jnp.reshape(mask, (*mask.shape, *[1] * (a.ndim - mask.ndim)))
    # Selected before they are squared: a NaN of padding would come back in gradients.
    apart = jnp.where(here, a, 0) - jnp.where(here, b, 0)
    count = jnp.sum(mask, dtype=jnp.int32) * (a.size // mask.size)
    return jnp.sum(apart**2) / jnp.maximum(count, 1).astype(a.dtype)


def _check(path: str, student: Any, teacher: Any, mask: Any) -> None:
    for name, x in {"student": student, "teacher": teacher}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{path or name}: hidden states of the {name} must be floating-point, "
                f"got {x.dtype}."
            )
    if mask is not None and jnp.shape(mask) != student.shape[: jnp.ndim(mask)]:
        raise ValueError(
            f"{path or 'student'}: a mask of shape {jnp.shape(mask)} does not fit "
            f"states of shape {tuple(student.shape)}, whose leading axes it must have."
        )
