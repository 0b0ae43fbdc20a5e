"""The range of numbers that scores are formed in: nothing ties because it is tiny.

A product of two small numbers leaves float16 at 6e-8 and float32 at 1e-38, where XLA on
CPUs takes everything for 0; weights whose scores are all 0 would be removed by index.
So scores are formed in float32 at least, and what is far below any score that is used
is put on a scale of its own, which has the order of the scores and does not end.
"""

import jax.numpy as jnp

from jaxsparse._typing import Array


def fourth_root(x: Array) -> Array:
    """`|x| ** (1/4)`: a product of three of these leaves no type's range."""
    return jnp.sqrt(jnp.sqrt(jnp.abs(x)))


def lifted(scores: Array, root: Array) -> Array:
    """Scores that keep their order where they are too small for their type.

    Those of at least `t = 2 ** -80` (`2 ** -320` in float64) stay as they are, bit for
    bit. Below, a score becomes `t * (score / t) ** (1/4)`: below `t` as well, in the
    same order, and not 0 down to `2 ** -264`, which three factors of 1e-25 are above.
    """
    quarter = -80 if jnp.finfo(scores.dtype).bits > 32 else -20  # of t's exponent
    least = jnp.asarray(2.0 ** (4 * quarter), scores.dtype)
    tiny = jnp.minimum(root * 2.0 ** (3 * quarter), least)
    return jnp.where(scores < least, tiny, scores)


def product(a: Array, b: Array) -> Array:
    """`|a * b|`, of which `lifted` keeps the order where it is tiny."""
    half = -jnp.finfo(a.dtype).minexp // 2
    # As they are larger, tiny products are not 0: two roots for four.
    high = jnp.minimum(jnp.abs(a), 2.0**half) * 2.0**half
    scaled = high * (jnp.abs(b) * 2.0**half)
    return lifted(jnp.abs(a * b), fourth_root(scaled) * 2.0 ** (-half / 2))
