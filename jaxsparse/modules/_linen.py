"""A sparse layer for Linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsparse import kernels
from jaxsparse._typing import Array
from jaxsparse.modules._structure import (
    initial_values,
    random_rows,
    shape_of,
    tiles_of,
)
from jaxsparse.patterns import Balanced


class LinenSparseDense(nn.Module):
    """A Linen layer like `nn.Dense` whose kernel is sparse from the start.

    Its parameter `values` are the kept weights alone, so gradients and the moments of
    any optax optimizer are equally small. Their positions are drawn at `init`, at
    random in balanced tiles, and stored in the collection `"structure"`, which is not
    trained. To load a pruned kernel, pass the fields of its packed form: `{"params":
    {"values": packed.values}, "structure": {"rows": packed.rows}}`.

    Attributes:
      features: the number of outputs.
      sparsity: the fraction of weights to leave out.
      pattern: the tiles; they must divide inputs and outputs.
      use_bias: whether to add a bias.
      kernel_init: an initializer; its fan-in is the number of inputs that an output
        reads.
      bias_init: an initializer.
      dtype: the type to compute in; by default that of the arguments.
      param_dtype: the type of the parameters.
      rules: which engine multiplies; see `js.kernels.choose`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> layer = js.modules.LinenSparseDense(8, 0.75, js.Balanced((1, 4)))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 16)))
      >>> variables["params"]["values"].shape, variables["structure"]["rows"].shape
      ((2, 4, 1, 4), (2, 4))
    """

    features: int
    sparsity: float
    pattern: Balanced = Balanced()
    use_bias: bool = True
    kernel_init: Any = jax.nn.initializers.lecun_normal()
    bias_init: Any = jax.nn.initializers.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32
    rules: kernels.Rules = kernels.MEASURED

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Multiply, and add the bias.

        Args:
          x: `[..., d_in]`.

        Returns:
          `[..., features]`.
        """
        shape = shape_of(x.shape[-1], self.features, self.sparsity, self.pattern)
        draw = lambda key: initial_values(
            self.kernel_init, key, shape, self.param_dtype
        )
        values = self.param("values", draw)
        rows = self.variable(
            "structure", "rows", lambda: random_rows(self.make_rng("params"), shape)
        ).value
        dtype = x.dtype if self.dtype is None else self.dtype
        packed = tiles_of(shape, jnp.asarray(values, dtype), rows)
        y = kernels.matmul(jnp.asarray(x, dtype), packed, rules=self.rules)
        if not self.use_bias:
            return y
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return y + jnp.broadcast_to(bias.astype(dtype), y.shape)
