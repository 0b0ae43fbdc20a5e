"""What happens to a kernel's entries before it is contracted: masks, scales, the rest.

Where all that is done is a product with something that does not depend on the kernel, a
zero stays a zero and the others stay what they are: a solver may work on the product.
Where a mean is subtracted or a norm is divided by, each entry depends on all others.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from jaxsparse.primitives import row_of


class Change(NamedTuple):
    """An equation that changes the entries of a kernel.

    Attributes:
      primitive: its name.
      source: the line of the model.
      kind: "mask" where entries are kept or set to 0, "scale" where they are multiplied
        by what does not depend on them, "other" for everything else.
      by: the parameters that it is scaled by.
    """

    primitive: str
    source: str
    kind: Literal["mask", "scale", "other"]
    by: frozenset[str] = frozenset()


class Altering(NamedTuple):
    """A change as the walk meets it: no one asks for the line of most of them."""

    eqn: Any
    kind: Literal["mask", "scale", "other"]
    by: frozenset[str] = frozenset()

    @property
    def change(self) -> Change:
        """The same in words."""
        return Change(self.eqn.primitive.name, self.eqn.source, self.kind, self.by)


class Past(NamedTuple):
    """What is known of a value that does not depend on the inputs.

    Attributes:
      paths: the parameters that it depends on.
      zero: whether all of it is 0.
      binary: whether it is bools, or made of some: 0 and 1.
    """

    paths: frozenset[str] = frozenset()
    zero: bool = False
    binary: bool = False


def past_of(eqn: Any, ins: Sequence[Past]) -> Past:
    """What is known of an equation's results."""
    paths = frozenset().union(*(p.paths for p in ins))
    if not row_of(eqn).keeps_entries or len(ins) != 1:
        return Past(paths)
    binary = ins[0].binary or eqn.invars[0].aval.dtype == bool
    return Past(paths, ins[0].zero, binary)


def together(pasts: Iterable[Past]) -> Past:
    """Of what a loop or a branch makes: it may depend on all that goes in."""
    return Past(frozenset().union(*(past.paths for past in pasts)))


def change_of(eqn: Any, operands: Sequence[tuple[Past, bool]]) -> tuple[Altering, ...]:
    """How an elementwise equation changes the kernels among its operands."""
    name = eqn.primitive.name
    ins, own = [past for past, _ in operands], [mine for _, mine in operands]
    other = (Altering(eqn, "other"),)
    if name == "neg":
        return (Altering(eqn, "scale"),)
    if name == "select_n":
        cases = list(zip(ins[1:], own[1:], strict=True))
        # A predicate that depends on the weights would be another one afterwards.
        apart = not ins[0].paths & frozenset().union(*(p.paths for p in ins[1:]))
        if apart and not own[0] and all(mine or p.zero for p, mine in cases):
            return (Altering(eqn, "mask"),) if sum(own) == 1 else other
        return other
    if len(ins) != 2 or name not in {"mul", "div", "add", "add_any", "sub"}:
        return other
    kernel, rest = (ins[0], ins[1]) if own[0] else (ins[1], ins[0])
    if kernel.paths & rest.paths or (name == "div" and not own[0]):
        return other
    if name in {"mul", "div"}:
        kind = "mask" if name == "mul" and rest.binary else "scale"
        # Two parameters that are multiplied are each scaled by the other.
        both = kernel.paths | rest.paths if all(own) else rest.paths
        return (Altering(eqn, kind, both),)
    return () if rest.zero and (own[0] or name != "sub") else other


def check_solvable(path: str, changes: Sequence[Change], chosen: Any = ()) -> None:
    """Raises where zeros of a kernel are not zeros of what acts in its place."""
    for change in changes:
        if change.kind == "other":
            raise ValueError(
                f"{_said(path, change)}, and that is no product with something that "
                "does not depend on it: a zero in it is not one in the weight that "
                f"acts, or changes the other weights. {_ADVICE}"
            )
        also = sorted((change.by & set(chosen)) - {path})
        if also:
            raise ValueError(
                f"{_said(path, change)}: it is multiplied by {also[0]}, which is "
                "selected too. Leave one of them out with `where`."
            )


def check_plain(path: str, changes: Sequence[Change]) -> None:
    """Raises where a kernel is not contracted as it is stored, but for masks."""
    for change in changes:
        if change.kind != "mask":
            raise ValueError(
                f"{_said(path, change)}: what is stored is not the weight that acts. "
                f"{_ADVICE}"
            )


_ADVICE = (
    "Leave it out with `where`, or fold it: calculate the weight once, store that, and "
    "give the model without this step."
)


def _said(path: str, change: Change) -> str:
    return (
        f"{path}: `{change.primitive}` at {change.source} changes it before it meets "
        "its inputs"
    )
