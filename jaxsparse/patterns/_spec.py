"""Patterns: which weights live or die together, and who competes with whom.

A pattern is a frozen, hashable value. It says two things: its *unit* (a weight, a
tile, a channel) and the *scope* in which units compete. It holds no behavior:
selection, formats and kernels each read it, and a type checker tells where one of
them forgets a pattern.
"""

import dataclasses
import numbers
from typing import Literal, get_args

from jaxsparse import _checks

LayerScope = Literal["layer", "global"]
Scope = Literal["layer", "global", "output"]
Reduce = Literal["mean", "max"]


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Single weights.

    Attributes:
      scope: which weights compete: the weights of one parameter (`"layer"`; of one
        layer of it where it has batch axes), all selected weights (`"global"`), or the
        weights of one output unit (`"output"`, Wanda's choice).

    Example:
      >>> import jaxsparse as js
      >>> js.Unstructured(scope="global")
      Unstructured(scope='global')
    """

    scope: Scope = "layer"

    def __post_init__(self):
        _checks.check_choice(get_args(Scope), scope=self.scope)


@dataclasses.dataclass(frozen=True)
class NM:
    """N:M sparsity: `keep` of every `of` consecutive weights along the input axes.

    The count rule holds in each group: sparsity `s` removes `floor(s * of + 1/2)` of
    its weights, so that a schedule from 0 to `1 - keep/of` goes through 4:4, 3:4 and
    2:4. A sparsity above `1 - keep/of` is an error (a traced one is clipped). Several
    input axes (a convolution's window and channels) count as one, the last fastest.

    Attributes:
      keep: the number of weights kept in each group.
      of: the size of a group; it must divide the number of inputs.

    Example:
      >>> import jaxsparse as js
      >>> js.NM(keep=2, of=4).sparsity
      0.5
    """

    keep: int = 2
    of: int = 4

    def __post_init__(self):
        _checks.check_positive_int(self.keep, name="keep")
        _checks.check_positive_int(self.of, name="of", least=2)
        if self.keep > self.of:
            raise ValueError(
                f"NM keeps `keep` of every `of` weights, so keep <= of; got {self}."
            )

    @property
    def sparsity(self) -> float:
        """The sparsity of the full pattern, `1 - keep / of`."""
        return 1.0 - self.keep / self.of


@dataclasses.dataclass(frozen=True)
class Block:
    """Tiles of `shape = (inputs, outputs)` neighboring weights.

    The tiles lie on the last input axis and the last output axis of a kernel: on
    `(in, out)` for a dense layer, on the channels of each tap for a convolution.

    If tiles of a sharded parameter cross devices (4 of 12 outputs that are sharded over
    4 devices), XLA gathers its scores along that axis. If no tile crosses devices, they
    exchange only counts.

    Attributes:
      shape: the inputs and outputs of a tile; they must divide the axes of the kernel.
      reduce: a tile's score from its weights' scores, their mean or their maximum.
      scope: tiles compete within a parameter or over all.

    Example:
      >>> import jaxsparse as js
      >>> js.Block((4, 1), reduce="max")
      Block(shape=(4, 1), reduce='max', scope='layer')
    """

    shape: tuple[int, int] = (4, 4)
    reduce: Reduce = "mean"
    scope: LayerScope = "layer"

    def __post_init__(self):
        object.__setattr__(self, "shape", _tile("Block", self.shape))
        _checks.check_choice(get_args(Reduce), reduce=self.reduce)
        _checks.check_choice(get_args(LayerScope), scope=self.scope)


@dataclasses.dataclass(frozen=True)
class Channel:
    """Whole slices along one axis: output channels, heads, neurons.

    The mask is as small as the decision: `(1, d_out)` for a dense kernel, `(layers, 1,
    d_out)` for stacked ones whose batch axis is stated.

    Attributes:
      axis: the axis of the channels; the last one by default, which is the output axis
        of a flax kernel. Where it is known to be an input axis (of Equinox's layers, or
        with `axes` or a trace) the default warns.
      reduce: a slice's score from its weights' scores, their mean or their maximum.
      scope: slices compete within a parameter or over all.

    Example:
      >>> import jaxsparse as js
      >>> heads = js.Channel(axis=1)       # of a query kernel (in, heads, head_dim)
    """

    axis: int = -1
    reduce: Reduce = "mean"
    scope: LayerScope = "layer"

    def __post_init__(self):
        if isinstance(self.axis, bool) or not isinstance(self.axis, numbers.Integral):
            raise TypeError(f"Channel needs one integer axis, got {self.axis!r}.")
        _checks.check_choice(get_args(Reduce), reduce=self.reduce)
        _checks.check_choice(get_args(LayerScope), scope=self.scope)


@dataclasses.dataclass(frozen=True)
class Balanced:
    """Tiles of `shape = (inputs, outputs)` weights, equally many in each group.

    The outputs of a tile form a group, and tiles compete only within their group, so
    all groups of a layer keep the same number of tiles. A matrix product can therefore
    run as one batched product of gathered inputs, on any platform and without a kernel
    of its own (see `jaxsparse.formats.Tiles` and `jaxsparse.kernels`). Tiles are laid
    out as in `Block`, where all tiles of a layer compete. `Balanced((1, 1))` is
    `Unstructured("output")`.

    Attributes:
      shape: the inputs and outputs of a tile; they must divide the axes of the kernel.
        `(1, 128)` removes single inputs of 128 neighboring outputs; `(16, 16)` is a
        square; `(1, 4)` suits small vector units.
      reduce: a tile's score from its weights' scores, their mean or their maximum.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> kernel = jnp.array([[1.0, 2.0, 9.0, 8.0], [3.0, 4.0, 7.0, 6.0]])
      >>> masks = js.prune({"kernel": kernel}, 0.5, pattern=js.Balanced((1, 2))).masks
      >>> masks["kernel"].astype(int).tolist()
      [[0, 0, 1, 1], [1, 1, 0, 0]]
    """

    shape: tuple[int, int] = (1, 128)
    reduce: Reduce = "mean"

    def __post_init__(self):
        object.__setattr__(self, "shape", _tile("Balanced", self.shape))
        _checks.check_choice(get_args(Reduce), reduce=self.reduce)

    @property
    def scope(self) -> Literal["output"]:
        """Tiles compete within one group of outputs."""
        return "output"


def _tile(name: str, shape: object) -> tuple[int, int]:
    """The sides of a tile, checked."""
    if not isinstance(shape, tuple | list):
        raise TypeError(
            f"A {name}'s shape is (inputs, outputs); got {shape!r}. For square tiles "
            f"write js.{name}((4, 4))."
        )
    if len(shape) != 2:
        raise ValueError(f"A {name}'s shape is (inputs, outputs); got {shape}.")
    for size in shape:
        _checks.check_positive_int(size, name="shape")
    return (shape[0], shape[1])


Pattern = Unstructured | NM | Block | Channel | Balanced
