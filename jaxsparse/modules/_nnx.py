"""A sparse layer for NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse import kernels
from jaxsparse._typing import Array
from jaxsparse.formats import Tiles
from jaxsparse.modules._structure import (
    initial_values,
    random_rows,
    shape_of,
    tiles_of,
)
from jaxsparse.patterns import Balanced

_WIDE = Balanced()
_NORMAL = jax.nn.initializers.lecun_normal()


class Structure(nnx.Variable):
    """The positions of a sparse layer's kept weights, integers that are not trained."""


class NNXSparseDense(nnx.Module):
    """An NNX layer like `nnx.Linear` whose kernel is sparse from the start.

    `values`, an `nnx.Param`, are the kept weights alone, so gradients and the moments
    of any optax optimizer are equally small. Their positions are drawn when the layer
    is made, at random in balanced tiles, and stored in `rows`, a `Structure`. `load`
    replaces them by a pruned kernel.

    Args:
      in_features: the number of inputs.
      out_features: the number of outputs.
      sparsity: the fraction of weights to leave out.
      pattern: the tiles; they must divide inputs and outputs.
      use_bias: whether to add a bias.
      kernel_init: an initializer; its fan-in is the number of inputs that an output
        reads.
      bias_init: an initializer.
      dtype: the type to compute in; by default that of the arguments.
      param_dtype: the type of the parameters.
      rules: which engine multiplies; see `js.kernels.choose`.
      rngs: the source of random keys.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> from flax import nnx
      >>> layer = js.modules.NNXSparseDense(
      ...     16, 8, sparsity=0.75, pattern=js.Balanced((1, 4)), rngs=nnx.Rngs(0))
      >>> layer.values.shape, layer(jnp.ones((2, 16))).shape
      ((2, 4, 1, 4), (2, 8))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        pattern: Balanced = _WIDE,
        use_bias: bool = True,
        kernel_init: Any = _NORMAL,
        bias_init: Any = jax.nn.initializers.zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rules: kernels.Rules = kernels.MEASURED,
        rngs: nnx.Rngs,
    ):
        self.shape = shape_of(in_features, out_features, sparsity, pattern)
        own = initial_values(kernel_init, rngs.params(), self.shape, param_dtype)
        self.values = nnx.Param(own)
        self.rows = Structure(random_rows(rngs.params(), self.shape))
        draw = lambda: bias_init(rngs.params(), (out_features,), param_dtype)
        self.bias = nnx.Param(draw()) if use_bias else nnx.data(None)
        self.dtype, self.rules = dtype, rules

    @property
    def packed(self) -> Tiles:
        """The kernel, as `js.formats.pack` gives it."""
        return tiles_of(self.shape, self.values[...], self.rows[...])

    def load(self, packed: Tiles) -> None:
        """Replace the kernel by a pruned one.

        Args:
          packed: balanced tiles of the same shapes.

        Raises:
          ValueError: other shapes.
        """
        own = self.packed
        shapes = [(x.values.shape, x.rows.shape) for x in (own, packed)]
        if packed.offsets is not None or shapes[0] != shapes[1]:
            raise ValueError(
                f"packed: the values have the shape {packed.values.shape}, those of "
                f"this layer {own.values.shape}. Prune with {self.shape.tile} as "
                "js.Balanced tiles, to the sparsity of the layer."
            )
        self.values[...] = packed.values.astype(own.values.dtype)
        self.rows[...] = packed.rows.astype(own.rows.dtype)

    def __call__(self, x: Array) -> Array:
        """Multiply, and add the bias.

        Args:
          x: `[..., in_features]`.

        Returns:
          `[..., out_features]`.
        """
        dtype = x.dtype if self.dtype is None else self.dtype
        packed = tiles_of(self.shape, self.values[...].astype(dtype), self.rows[...])
        y = kernels.matmul(x.astype(dtype), packed, rules=self.rules)
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias[...].astype(dtype), y.shape)
