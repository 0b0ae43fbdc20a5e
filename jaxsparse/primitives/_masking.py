"""Where a result is zero if its operands' masked entries are: one function each way."""

from jaxsparse.primitives._row import Contraction, Leaves, Masking


def first(x: Masking) -> Leaves:
    """f(0) = 0, or entries only move."""
    return x.zeros[0] if x.zeros else frozenset()


def any_zero(x: Masking) -> Leaves:
    """One factor is enough."""
    return frozenset().union(*x.zeros)


def all_zero(x: Masking) -> Leaves:
    """All summands have to be zero."""
    return x.here.intersection(*x.zeros)


def cases(x: Masking) -> Leaves:
    """All cases have to be, whatever the predicate is."""
    return x.here.intersection(*x.zeros[1:])


def updated(x: Masking) -> Leaves:
    """The operand and the update."""
    return x.here.intersection(*x.zeros[:2])


def scattered(x: Masking) -> Leaves:
    """The operand and the updates."""
    return x.here.intersection(x.zeros[0], x.zeros[2])


def power(x: Masking) -> Leaves:
    """Positive powers alone."""
    return first(x) if x.eqn.params["y"] > 0 else frozenset()


def bounded(x: Masking) -> Leaves:
    """Bounds that zero lies within do not matter: max(x, -1), min(x, 6)."""
    within = [z for i, z in enumerate(x.zeros) if not _beyond(x, i)]
    return x.here.intersection(*(within or x.zeros))


def padded(x: Masking) -> Leaves:
    """Padding with zeros leaves the other segments of an axis alone."""
    others = x.here - x.layers - x.leaves(x.before[0])
    return x.zeros[0] | others if x.ins[1].constant == 0 else x.zeros[0] & x.zeros[1]


def joined(x: Masking) -> Leaves:
    """What lies in other segments of an axis is of no concern."""
    others = (x.here - x.layers - x.leaves(dims) for dims in x.before)
    pairs = zip(x.zeros, others, strict=True)
    return x.here.intersection(*(zero | other for zero, other in pairs))


def product(x: Masking, contraction: Contraction) -> Leaves:
    """By the operand that has the axis; one of both has to be zero."""
    free = [
        x.leaves([dims[a] for a in axes])
        for dims, axes in zip(x.before, contraction.free, strict=False)
    ]
    if contraction.groups > 1:  # groups are of both
        free[1] -= x.leaves([x.before[0][a] for a in contraction.summed[0]])

    zero, apart = frozenset(), x.here
    for e, own in zip(x.ins, free, strict=False):
        vanishes = x.here if e.constant == 0 else x.here & e.zero
        zero, apart = zero | vanishes, apart - (own - vanishes)
    return zero & apart


def _beyond(x: Masking, operand: int) -> bool:
    """Whether an operand is a bound that zero lies within."""
    number, name = x.ins[operand].constant, x.eqn.primitive.name
    if number is None:
        return False
    if name == "clamp":
        return operand != 1 and (number <= 0 if operand == 0 else number >= 0)
    return number <= 0 if name == "max" else number >= 0
