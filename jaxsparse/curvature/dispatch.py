"""Functions to query an approximation of the Fisher matrix, one for each operation.

Each is dispatched on the kind of approximation. So a new one is a file: a frozen
dataclass with what `Fisher` names, registered as a pytree, and what it answers,

    @dispatch.ihvp.register
    def _(fisher: OwnFisher, xs: list[Array]) -> list[Array]: ...

An approximation must implement `ihvp` and `inverse_diagonal`; call `can` before using
any other. Trees are taken apart by the public functions of the same names: here they
are lists, with an array for each parameter that takes part.
"""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax

from jaxsparse._typing import Array


@runtime_checkable
class Fisher(Protocol):
    """An approximation of the Fisher matrix of some parameters, and its inverse."""

    @property
    def damping(self) -> Array:
        """The number added to the diagonal, a scalar."""
        ...

    @property
    def treedef(self) -> Any:
        """The structure of the gradients."""
        ...

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the parameters that take part."""
        ...


def _question(refusal: str) -> Any:
    """A generic function that is refused where no answer is registered."""

    def refuse(fisher: Any, *_: Any, **options: Any) -> Any:
        raise TypeError(refusal.format(type(fisher).__name__))

    return functools.singledispatch(refuse)


def can(question: Any, fisher: Any) -> bool:
    """Whether an approximation of this kind answers a question of this file."""
    return question.dispatch(type(fisher)) is not question.dispatch(object)


# What every approximation answers.

ihvp = _question("{} registers no products with its inverse.")
"""`ihvp(fisher, xs)`: a list of `F^-1 x`."""

inverse_diagonal = _question("{} registers no diagonal of its inverse.")
"""`inverse_diagonal(fisher)`: a list, the diagonal of `F^-1`."""


@functools.singledispatch
def shapes(fisher: Any) -> list[tuple[int, ...]]:
    """The shapes of the parameters: those of the layouts, unless registered."""
    return [layout.shape for layout in fisher.layouts]


@functools.singledispatch
def apart(fisher: Any) -> list[Any]:
    """One for each parameter, of one item of each tuple, unless registered."""
    own = {f.name: getattr(fisher, f.name) for f in dataclasses.fields(fisher)}
    own = {name: x for name, x in own.items() if isinstance(x, tuple)}

    def part(path: str, *values: Any) -> Any:
        one: Any = {name: (x,) for name, x in zip(own, values, strict=True)}
        one["treedef"] = jax.tree.structure({path: 0})
        return dataclasses.replace(fisher, **one)

    return list(map(part, fisher.paths, *own.values()))


# What some do.

restrict = _question(
    "A {} without some of its rows is none any more. Take the gradients of the masked "
    "network: per_example_grads(..., masks=masks)."
)
"""`restrict(fisher, masks, donate=)`: the approximation of the weights kept."""

eliminate = _question(
    "The joint update needs a block or a full Fisher matrix (block_fisher, mfac); got "
    "{}. Use update='independent'."
)
"""`eliminate(fisher, ws, removed, kept)`: a list, the best change of what is kept."""

inverse_blocks = _question(
    "inverse_blocks needs js.curvature.block_fisher(...), got {}."
)
"""`inverse_blocks(fisher, size=)`: a list of `[F^-1]_QQ` for groups Q of neighbours."""

group_scores = _question(
    "Units are scored together by a block Fisher matrix, js.curvature."
    "block_fisher(..., pattern=pattern); got {}."
)
"""`group_scores(fisher, ws)`: a list of pairs, the losses and `([F^-1]_QQ)^-1 w_Q`."""

greedy_scores = _question(
    "Greedy OBS works in blocks: js.curvature.block_fisher(...); got {}."
)
"""`greedy_scores(fisher, ws, kept, most=)`: a list of the losses, one after another."""
