"""How far the answers of a pruned network are from those of the dense one."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._dtypes import as_wide
from jaxsparse._typing import Array
from jaxsparse.losses._distill import check_logits


def jensen_shannon(student_logits: Array, teacher_logits: Array) -> Array:
    """Return the Jensen-Shannon divergence of two predictions, for each example.

    `(KL(p || m) + KL(q || m)) / 2` with the mean `m = (p + q) / 2` of the two softmax
    distributions, in nats: 0 where they agree, at most `log 2`, also where one of them
    excludes a class by a logit of -inf. Unlike the Kullback-Leibler divergence it is
    the same with both exchanged, and finite. Lin (1991). Averaged over the tokens of an
    example it says how much pruning has changed the model there, as
    `jaxsparse.contrib.paser` takes it.

    No gradient flows into the teacher. It computes in float32 (float64 for float64
    logits).

    Args:
      student_logits: `[..., classes]`.
      teacher_logits: the same shape.

    Returns:
      The divergence, `[...]`, NaN where logits are.

    Raises:
      TypeError: logits that are not floating.
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> dense = jnp.array([[2.0, 0.0], [0.0, -jnp.inf]])
      >>> pruned = jnp.array([[2.0, 0.0], [-jnp.inf, 0.0]])
      >>> [round(float(x), 4) for x in js.losses.jensen_shannon(pruned, dense)]
      [0.0, 0.6931]
    """
    check_logits(student_logits, teacher_logits)
    teacher = lax.stop_gradient(jnp.asarray(teacher_logits))
    log_q = jax.nn.log_softmax(as_wide(jnp.asarray(student_logits)))
    log_p = jax.nn.log_softmax(as_wide(teacher))
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0).astype(log_p.dtype)
    # Rounding would leave numbers a little below 0 where both agree.
    return jnp.maximum((_kl(log_p, log_m) + _kl(log_q, log_m)) / 2, 0)


def _kl(log_p: Array, log_m: Array) -> Array:
    """KL(p || m) over the last axis; `0 log 0` is 0, and its derivative no NaN."""
    there = ~(jnp.exp(log_p) == 0)  # NaN counts, so that it is seen
    known = lambda x: jnp.where(there, x, jnp.zeros((), x.dtype))
    log_p, log_m = known(log_p), known(log_m)
    terms = jnp.exp(log_p) * (log_p - log_m)
    return jnp.sum(known(terms), axis=-1)
