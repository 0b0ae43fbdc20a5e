"""What all rules share: to unify axes or freeze them, and to say which equation did."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives.axes import Axis

Dims = tuple[Axis, ...]
Rule = Callable[[Any, Sequence[Dims]], list[Dims]]


def unify(a: Axis, b: Axis, eqn: Any) -> None:
    """Makes two axes the same, or freezes both."""
    try:
        algebra.unify(a, b)
    except algebra.Incompatible as error:
        freeze(a, f"{eqn.primitive.name} ({error})", eqn)
        freeze(b, f"{eqn.primitive.name} ({error})", eqn)


def freeze(axis: Axis, why: str, eqn: Any) -> None:
    """Says of an axis that its indices must stay."""
    algebra.flag(axis, f"frozen: {why}", eqn=eqn)


def frozen(size: int, why: str, eqn: Any) -> Axis:
    """A new axis whose indices must stay."""
    axis = algebra.leaf(size)
    freeze(axis, why, eqn)
    return axis


def out_shapes(eqn: Any) -> list[tuple[int, ...]]:
    """The shapes of an equation's results."""
    return [tuple(v.aval.shape) for v in eqn.outvars]
