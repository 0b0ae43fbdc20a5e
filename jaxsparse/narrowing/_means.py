"""Means over an axis that became shorter: by which number they divide.

A mean is a sum divided by a number that the model's Python code wrote into the program.
To be equal to a module built at the new width that number has to change; to be equal to
the masked model it has to stay.
"""

from jaxsparse.coupling.known import Known

MEANS = frozenset({"div", "mul"})


def resized_mean(name: str, ins: list[Known]) -> list[Known]:
    """The operands of a mean, with the number of entries that there are now.

    A division by the old number n, or by n - 1 (an unbiased variance), and a
    multiplication by 1 / n are recognized.
    """
    for at, other in ((0, 1), (1, 0)) if name == "mul" else ((0, 1),):
        summed, number = ins[at].summed, ins[other].number
        if summed is None or not number:
            continue
        old, new = summed
        written = 1 / number if name == "mul" else number
        less = round(old - written)
        if less not in {0, 1} or abs(old - less - written) > 1e-6 * old:
            continue
        value = ins[other].value
        right = new - less
        out = list(ins)
        kind = type(value) if isinstance(value, int | float) else value.dtype.type
        out[other] = Known(kind(1 / right if name == "mul" else right))
        return out
    return ins
