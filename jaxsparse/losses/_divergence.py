"""How far the answers of a pruned network are from those of the dense one."""

import math

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
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    alone = (log_p == -jnp.inf) | (log_q == -jnp.inf)  # one of them excludes the class
    known = lambda x: jnp.where(alone, jnp.zeros((), x.dtype), x)
    # KL(p || m) and KL(q || m) have parts of first order in this, which cancel out: so
    # it is written without them, and 0 where both agree.
    half = (known(log_p) - known(log_q)) / 2
    shared = (p - q) * half - (p + q) * _log_cosh(half)
    terms = jnp.where(alone, (p + q) * math.log(2), shared)
    return jnp.sum(terms, axis=-1) / 2


def _log_cosh(x: Array) -> Array:
    """Exact to rounding near 0, and without overflow far from it."""
    near = jnp.abs(x) < 1
    small = jnp.log1p(2 * jnp.sinh(jnp.where(near, x, 0) / 2) ** 2)
    large = jnp.where(near, 1, jnp.abs(x))
    large = large + jnp.log1p(jnp.exp(-2 * large)) - math.log(2)
    return jnp.where(near, small, large)
