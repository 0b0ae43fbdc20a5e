"""The algebra of axes against index arithmetic."""

import collections
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsparse.primitives.axes import (
    Incompatible,
    concatenation,
    coordinates,
    cut,
    find,
    flag,
    leaf,
    leaves,
    product,
    split_minor,
    unify,
)

budget = settings(max_examples=50)
large_budget = settings(max_examples=500)
ACTIONS = ["product", "join", "split", "cut", "unify"]
SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])


def table(axis):
    """For each leaf, at each position, its indices there (several if it is squared)."""
    found = {}
    for x, index in coordinates(axis):
        assert index.shape == (axis.size,)
        if x.size > 1:  # one of size 1 says nothing
            at = found.setdefault(id(x), [[] for _ in range(axis.size)])
            for i in np.flatnonzero(index >= 0):
                at[i].append(int(index[i]))
    return {x: [sorted(here) for here in at] for x, at in found.items()}


def picked(tables, size):
    """What lies at each of `size` positions, given `(table, position or None)`s."""
    joined = collections.defaultdict(lambda: [[] for _ in range(size)])
    for part, positions in tables:
        for x, at in part.items():
            for i, p in enumerate(positions):
                joined[x][i] = sorted(joined[x][i] + ([] if p is None else at[p]))
    return dict(joined)


def assert_product(whole, parts):
    i, tables = np.arange(whole.size), []
    for part in parts[::-1]:
        tables.append((table(part), (i % part.size).tolist()))
        i = i // part.size
    assert math.prod(p.size for p in parts) == whole.size
    assert_agree(whole, parts, table(whole), picked(tables, whole.size))


def assert_concatenation(whole, parts):
    tables, start = [], 0
    for part in parts:
        here = [i - start for i in range(whole.size)]
        tables.append((table(part), [p if 0 <= p < part.size else None for p in here]))
        start += part.size
    assert start == whole.size
    assert_agree(whole, parts, table(whole), picked(tables, whole.size))


def assert_same(a, b):
    assert_agree(a, [b], table(a), table(b))


def assert_agree(whole, parts, one, other):
    """The same leaves with the same indices.

    `x + x` turns out to be `2 * x` and still stays a sum, without a leaf that counts:
    then what both know is compared.
    """
    repeats = lambda axis: len(set(map(id, leaves(axis)))) < len(leaves(axis))
    if any(map(repeats, [whole, *parts])):
        both = one.keys() & other.keys()
        one, other = ({x: t[x] for x in both} for t in (one, other))
    assert one == other


RELATIONS = {
    "product": assert_product,
    "concatenation": assert_concatenation,
    "same": assert_same,
}


@budget
@given(data=st.data())
def test_whatever_was_said_of_axes_holds_to_the_end(data):
    """Also for what was refined, by way of another axis, long afterwards."""
    say_and_look(data)


@pytest.mark.exhaustive  # the same, more often
@large_budget
@given(data=st.data())
def test_whatever_was_said_of_axes_holds_in_many_cases(data):
    say_and_look(data)


def say_and_look(data):
    pool = [leaf(n) for n in data.draw(st.lists(SIZES, min_size=2, max_size=4))]
    said = []
    for _ in range(data.draw(st.integers(1, 7))):
        a, b = (data.draw(st.sampled_from(pool)) for _ in "ab")
        action = data.draw(st.sampled_from(ACTIONS))
        try:
            if action == "product" and a.size * b.size <= 96:
                pool.append(product([a, b]))
                said.append(("product", pool[-1], [a, b]))
            elif action == "join" and a.size + b.size <= 96:
                pool.append(concatenation([a, b]))
                said.append(("concatenation", pool[-1], [a, b]))
            elif action == "split":
                sizes = [n for n in range(1, a.size + 1) if a.size % n == 0]
                parts = split_minor(a, data.draw(st.sampled_from(sizes)))
                pool.extend(parts)
                said.append(("product", a, parts))
            elif action == "cut" and a.size > 1:
                parts = cut(a, data.draw(st.integers(1, a.size - 1)))
                pool.extend(parts)
                said.append(("concatenation", a, parts))
            elif action == "unify":
                equal = [x for x in pool if x.size == a.size]
                b = data.draw(st.sampled_from(equal))
                unify(a, b)
                said.append(("same", a, b))
        except Incompatible:
            continue
    for relation, whole, parts in said:
        RELATIONS[relation](whole, parts)


def expressions(size):
    """Axes of one size, built from new leaves."""
    plain = st.builds(lambda: leaf(size))
    factors = [n for n in range(2, size) if size % n == 0]
    if size < 2:
        return plain
    joined = st.integers(1, size - 1).flatmap(
        lambda n: st.builds(
            lambda *parts: concatenation(parts), expressions(n), expressions(size - n)
        )
    )
    if not factors:
        return st.one_of(plain, joined)
    merged = st.sampled_from(factors).flatmap(
        lambda n: st.builds(
            lambda *parts: product(parts), expressions(size // n), expressions(n)
        )
    )
    return st.one_of(plain, merged, merged, joined)


def copied(axis, known):
    """The same expression of other leaves."""
    node = find(axis)
    if not node.parts:
        return known.setdefault(id(node), leaf(node.size))
    make = concatenation if node.is_sum else product
    return make([copied(part, known) for part in node.parts])


def unified(a, b):
    try:
        unify(a, b)
    except Incompatible:
        return False
    assert_same(a, b)
    return True


def numbered(a, b):
    """Both expressions, and which of their leaves are the same."""
    order = {}
    found = leaves(a) + leaves(b)
    return repr(a), repr(b), [order.setdefault(id(x), len(order)) for x in found]


@budget
@given(data=st.data(), size=st.sampled_from([4, 6, 8, 12]))
def test_unify_is_symmetric(data, size):
    unify_both_ways(data, size)


@pytest.mark.exhaustive  # the same, more often
@large_budget
@given(data=st.data(), size=st.sampled_from([4, 6, 8, 12]))
def test_unify_is_symmetric_in_many_cases(data, size):
    unify_both_ways(data, size)


def unify_both_ways(data, size):
    a, b = data.draw(expressions(size)), data.draw(expressions(size))
    known = {}
    a2, b2 = copied(a, known), copied(b, known)
    assert numbered(a, b) == numbered(a2, b2)
    works = unified(a, b)
    assert works == unified(b2, a2)
    if works:
        assert numbered(a, b) == numbered(a2, b2)


@budget
@given(size=st.sampled_from([6, 8, 12, 24]), data=st.data())
def test_regrouped_leaves_have_the_indices_of_a_reshape(size, data):
    n = data.draw(st.sampled_from([k for k in range(1, size + 1) if size % k == 0]))
    axis = leaf(size)
    parts = leaf(size // n), leaf(n)
    unify(axis, product(parts))
    grid = np.indices((size // n, n)).reshape(2, size)
    found = {id(x): index for x, index in coordinates(axis)}
    for part, expected in zip(parts, grid, strict=True):
        if part.size > 1:
            np.testing.assert_array_equal(found[id(find(part))], expected)


def test_joined_leaves_have_the_indices_of_a_concatenation():
    a, b = leaf(2), leaf(3)
    (x, first), (y, second), (z, third) = coordinates(concatenation([a, b, a]))
    assert (x, y, z) == (a, b, a)
    assert first.tolist() == [0, 1, -1, -1, -1, -1, -1]
    assert second.tolist() == [-1, -1, 0, 1, 2, -1, -1]
    assert third.tolist() == [-1, -1, -1, -1, -1, 0, 1]


def test_a_refined_leaf_is_refined_everywhere():
    a, b = leaf(12), leaf(5)
    merged, joined = product([a, b]), concatenation([b, a])
    twin = leaf(12)
    unify(twin, a)
    split_minor(a, 4)
    cut(find(a).parts[0], 1)
    assert repr(twin) == repr(a) == "((1+2)*4)"
    assert repr(merged) == "(((1+2)*4)*5)"
    assert repr(joined) == "(5+((1+2)*4))"


def test_what_is_noted_of_a_leaf_stays_with_what_it_becomes():
    a, parts = leaf(12, "first"), [leaf(3), leaf(4)]
    unify(a, product(parts))
    flag(a, "second")
    assert [x.flags for x in parts] == [{"first", "second"}] * 2
    major, minor = split_minor(parts[1], 2)
    assert major.flags == minor.flags == {"first", "second"}


def test_query_key_and_value_are_found_in_a_fused_axis():
    heads = [leaf(4), leaf(2), leaf(2)]
    width = leaf(3)
    fused = leaf(24)
    unify(fused, concatenation(product([h, width]) for h in heads))
    query, rest = cut(fused, 12)
    key, value = cut(rest, 6)
    for part, head in zip((query, key, value), heads, strict=True):
        major, minor = split_minor(part, 3)
        assert find(major) is head
        assert find(minor) is width


def test_factors_keep_their_order_when_they_are_split():
    factors = [leaf(2), leaf(3), leaf(5), leaf(4)]
    major, minor = split_minor(product(factors), 20)
    assert leaves(major) == factors[:2]
    assert leaves(minor) == factors[2:]
    with pytest.raises(Incompatible):
        split_minor(product(factors), 40)


def test_equal_segments_may_be_a_product_of_a_count():
    a, b = leaf(3), leaf(3)
    fused, count, width = concatenation([a, b]), leaf(2), leaf(3)
    unify(fused, product([count, width]))
    assert find(a) is find(b) is find(width)


IMPOSSIBLE = {
    "other sizes": lambda: unify(leaf(4), leaf(6)),
    "coprime factors": lambda: unify(
        product([leaf(2), leaf(3)]), product([leaf(3), leaf(2)])
    ),
    "a cut through a fast factor": lambda: cut(product([leaf(2), leaf(3)]), 2),
    "a cut within a product in a sum": lambda: cut(
        concatenation([leaf(2), product([leaf(2), leaf(3)])]), 3
    ),
    "no multiple": lambda: split_minor(leaf(6), 4),
    "segments of other sizes": lambda: split_minor(
        concatenation([leaf(2), leaf(4)]), 3
    ),
    "a factor within the fast part": lambda: split_minor(
        product([leaf(2), leaf(3)]), 2
    ),
    "a product and uneven segments": lambda: unify(
        product([leaf(3), leaf(4)]), concatenation([leaf(5), leaf(7)])
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_is_refused(name):
    with pytest.raises(Incompatible):
        IMPOSSIBLE[name]()


def test_an_axis_is_not_a_part_of_itself():
    a = leaf(6)
    with pytest.raises(Incompatible, match="contain itself"):
        unify(a, concatenation([a, leaf(0)]))


def test_an_axis_of_very_many_slices():
    """A loop over time steps, written out: so many cuts are not nested so deeply."""
    count = 1200  # more than Python lets functions call themselves
    whole = leaf(count)
    for i in range(1, count - 1):
        part, _ = cut(cut(whole, i)[1], 1)
        assert find(part).size == 1
    assert [x.size for x in leaves(whole)] == [1] * count
