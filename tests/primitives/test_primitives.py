"""What each rule says of the axes of its results, against what the primitive does.

Functions are run on the flat indices of their operand: a value of the result tells
where it came from. So leaves that operand and result have in common must have the same
index there, whichever way a rule refined them.
"""

import functools
import itertools
import re
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxsparse.primitives import PRIMITIVES, Masking, foreign
from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives._general import fresh, opaque
from jaxsparse.primitives.axes import coordinates, find, leaf, leaves, product
from jaxsparse.primitives.dims import unify
from jaxsparse.program import bind, called, interpret

FLAT = np.arange(24, dtype=np.float32).reshape(4, 6)


def walked(f, *args):
    """The axes of operands and results, and the primitives on the way."""
    jaxpr = jax.make_jaxpr(f)(*args)
    ins = [tuple(leaf(n) for n in np.shape(x)) for x in args]
    names = []

    def run(closed, args):
        env = dict(zip(closed.jaxpr.invars, args, strict=True))
        for var in closed.jaxpr.constvars:
            env[var] = tuple(leaf(n) for n in var.aval.shape)

        def read(atom):
            known = env.get(atom) if not hasattr(atom, "val") else None
            return known if known is not None else tuple(map(leaf, atom.aval.shape))

        for eqn in closed.jaxpr.eqns:
            dims = [read(x) for x in eqn.invars]
            if eqn.primitive.name == "jit":
                outs = run(eqn.params["jaxpr"], dims)
            else:
                names.append(eqn.primitive.name)
                outs = PRIMITIVES[eqn.primitive.name].axes(eqn, dims)
            shapes = [v.aval.shape for v in eqn.outvars]
            assert [tuple(d.size for d in dims) for dims in outs] == shapes
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(x) for x in closed.jaxpr.outvars]

    return ins, run(jaxpr, ins), names


def indices(axis):
    """For each leaf of several indices its index along an axis, -1 elsewhere."""
    found = {}
    for x, index in coordinates(axis):
        if x.size > 1:
            found[id(x)] = np.maximum(index, found.get(id(x), -1))
    return found


def table(dims):
    """The same for all positions of an array."""
    found = {}
    for at, axis in enumerate(dims):
        for x, index in indices(axis).items():
            shape = [-1 if i == at else 1 for i in range(len(dims))]
            sizes = [d.size for d in dims]
            found[x] = np.broadcast_to(index.reshape(shape), sizes).reshape(-1)
    return found


def conv(x, w, groups=1):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=dims, feature_group_count=groups
    )


def transposed_ragged(x, w, sizes):
    """Rows of groups and a matrix `[n, k]` for each group."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return lax.ragged_dot_general(x, w, sizes, numbers)


def windowed(x, window):
    return lax.reduce_window(x, -jnp.inf, lax.max, window, (1,) * x.ndim, "VALID")


# Functions of an array [4, 6] that move its entries, and how many leaves of the operand
# must be found in the result: fewer, and a rule gave up; None where that is its right.
MOVES = {
    "transpose": (lambda x: x.T, 2),
    "merge": (lambda x: x.reshape(24), 2),
    "split_axis": (lambda x: x.reshape(4, 2, 3), 3),
    "regroup": (lambda x: x.reshape(2, 12), 3),
    "regroup_far": (lambda x: x.reshape(8, 3), 3),
    "other_factors": (lambda x: x.reshape(6, 4), None),
    "ones": (lambda x: x.reshape(1, 4, 1, 6, 1), 2),
    "ones_gone": (lambda x: x.reshape(1, 4, 6).reshape(4, 1, 6)[:, 0], 2),
    "transposed_merge": (lambda x: x.reshape(2, 2, 6).transpose(0, 2, 1), 3),
    "broadcast": (lambda x: jnp.broadcast_to(x, (3, 4, 6)), 2),
    "broadcast_middle": (lambda x: lax.broadcast_in_dim(x, (4, 3, 6), (0, 2)), 2),
    "repeat": (lambda x: jnp.broadcast_to(x[:, None], (4, 3, 6)).reshape(12, 6), 2),
    "squeeze": (lambda x: lax.squeeze(x[None], (0,)), 2),
    "slice_front": (lambda x: x[:, :2], 2),
    "slice_middle": (lambda x: x[1:3, 2:5], 2),
    "stride": (lambda x: x[:, ::2], 2),
    "stride_offset": (lambda x: x[:, 1::3], 2),
    "stride_within": (lambda x: x[:, 1:5:2], None),
    "stride_uneven": (lambda x: x[::3], None),
    "one_index": (lambda x: x[2], 1),
    "concatenate": (lambda x: jnp.concatenate([x, x[:, :2]], 1), 3),
    "concatenate_rows": (lambda x: jnp.concatenate([x[2:], x[:2]], 0), 3),
    "cut_and_joined": (lambda x: jnp.concatenate([x[:, 3:], x[:, :3]], 1), 3),
    "stack": (lambda x: jnp.stack([x, x], 1), 2),
    "split": (lambda x: jnp.split(x, [1, 3], 1), 2),
    "split_last": (lambda x: jnp.split(x, 2, 0)[1], 2),
    "pad": (lambda x: jnp.pad(x, ((1, 0), (2, 1)), constant_values=-1), 2),
    "pad_negative": (
        lambda x: lax.pad(x, jnp.float32(-1), ((-1, 0, 0), (0, 0, 0))),
        None,
    ),
    "pad_interior": (
        lambda x: lax.pad(x, jnp.float32(-1), ((0, 0, 1), (0, 0, 0))),
        None,
    ),
    "tile": (lambda x: jnp.tile(x, (2, 3)), 2),
    "tile_more": (lambda x: jnp.tile(x, (2, 1, 2)), 2),
    "reverse": (lambda x: x[::-1], None),
    "take_rows": (lambda x: x[jnp.array([2, 0, 3])], 1),
    "take_columns": (lambda x: x[:, jnp.array([[1], [5]])], 1),
    "dynamic_slice": (lambda x: lax.dynamic_slice(x, (0, 2), (4, 3)), 1),
    "elementwise": (lambda x: jnp.where(x > -1, jnp.abs(x), x), 2),
    "clamp": (lambda x: lax.clamp(-1.0, x, 99.0), 2),
    "barrier": (lambda x: lax.optimization_barrier((x, x.T))[1], 2),
}


@pytest.mark.parametrize("name", MOVES)
def test_leaves_are_found_where_the_entries_are(name):
    f, least = MOVES[name]
    (dims,), outs, _ = walked(f, FLAT)
    values = jax.tree.leaves(f(jnp.asarray(FLAT)))
    before, found = table(dims), set()
    for value, out in zip(values, outs, strict=True):
        after, source = table(out), np.asarray(value, int).reshape(-1)
        inside = source >= 0
        for x in before.keys() & after.keys():
            expected = before[x][source[inside]]
            if not frozen_leaf(dims, x):
                np.testing.assert_array_equal(after[x][inside], expected)
                found.add(x)
        if least is not None and not inside.all():  # padding is no entry of it
            own = [after[x] for x in before.keys() & after.keys()]
            assert (np.min(own, 0)[~inside] == -1).all()
    if least is None:
        # What gave up says so: of some axis everything is frozen.
        assert any(all(map(is_frozen, leaves(d))) for d in (*dims, *outs[0]))
    else:
        assert len(found) >= least


def is_frozen(x):
    return any(note.startswith("frozen") for note in x.flags)


def frozen_leaf(dims, key):
    return any(id(x) == key and is_frozen(x) for d in dims for x in leaves(d))


# By letters, as in einsum: equal letters, the same axis; others, none in common. A `!`
# behind it: frozen; `.`: an axis of its own.
X, W = (4, 6), (6, 3)
LETTERS = {
    "product": ("ij,jk->ik", lambda x, w: x @ w, X, W),
    "batch": ("bij,bjk->bik", lambda x, w: x @ w, (2, 4, 6), (2, 6, 3)),
    "einsum": (
        "aij,bkj->aibk",
        lambda x, w: jnp.einsum("aij,bkj->aibk", x, w),
        (2, 4, 6),
        (2, 4, 6),
    ),
    "equal sizes stay apart": ("ij,ij->ij", lambda x, y: x * y + y, (4, 4), (4, 4)),
    "spread out": ("ij,.j->ij", lambda x, y: x + y, X, (1, 6)),
    "select_n": ("ij,ij,ij->ij", lambda p, x, y: lax.select(p > 0, x, y), X, X, X),
    "select_n of one": (",ij,ij->ij", lambda p, *x: lax.select(p > 0, *x), (), X, X),
    "clamp": (",ij,->ij", lax.clamp, (), X, ()),
    "conv": ("nh!w!i,y!x!io->n.!.!o", conv, (2, 5, 5, 4), (3, 3, 4, 6)),
    "sum": ("ij->j", lambda x: jnp.sum(x, 0), X),
    "max": ("bij->j", lambda x: jnp.max(x, (0, 1)), (2, 4, 6)),
    "argmax": ("ij->i", lambda x: jnp.argmax(x, 1), X),
    "reduce": (
        "ij,ij->j,j",
        lambda x, y: lax.reduce(
            (x, y), (1.0, 0.0), lambda a, b: (a[0] * b[0], a[1] + b[1]), (0,)
        ),
        X,
        X,
    ),
    "cumsum": ("ij!->ij!", lambda x: lax.cumsum(x, 1), X),
    "rev": ("i!j->i!j", lambda x: lax.rev(x, (0,)), X),
    "sort": ("ij->ij", lambda x: lax.sort(x, dimension=1), X),
    "sort two": ("ij,ij->ij,ij", lambda *x: lax.sort(x, dimension=0, num_keys=1), X, X),
    "top_k": ("ij->ik!,ik!", lambda x: lax.top_k(x, 2), X),
    "window": ("i!jk->.!jk", lambda x: windowed(x, (2, 1, 1)), (4, 3, 5)),
    "gather": ("ij,k->kj", lambda x, i: x[i.astype(int)], X, (3,)),
    "gather along": (
        "bij,bk->bkj",
        jax.vmap(lambda x, i: x[i.astype(int)]),
        (2, 4, 6),
        (2, 3),
    ),
    "scatter": (
        "ij,k,kj->ij",
        lambda x, i, y: x.at[i.astype(int)].add(y),
        X,
        (3,),
        (3, 6),
    ),
    "scatter columns": (
        "ij,k,ik->ij",
        lambda x, i, y: x.at[:, i.astype(int)].set(y),
        X,
        (3,),
        (4, 3),
    ),
    "scatter along": (
        "bij,bk,bkj->bij",
        jax.vmap(lambda x, i, y: x.at[i.astype(int)].set(y)),
        (2, 4, 6),
        (2, 3),
        (2, 3, 6),
    ),
    "whole update": (
        "ij,ij->ij",
        lambda x, y: lax.dynamic_update_slice(x, y, (0, 0)),
        X,
        X,
    ),
    "update": (
        "ij!,i.!->ij!",
        lambda x, y: lax.dynamic_update_slice(x, y, (0, 1)),
        X,
        (4, 2),
    ),
    "dynamic_slice": ("ij!->i.!", lambda x: lax.dynamic_slice(x, (0, 1), (4, 2)), X),
    "stack": ("ij,ij->i.!j", lambda x, y: jnp.stack([x, y], 1), X, X),
    "ragged": (
        "m!k,gkn,g->m!n",
        lambda x, w, g: lax.ragged_dot(x, w, g.astype(int)),
        (7, 4),
        (3, 4, 5),
        (3,),
    ),
    "ragged, transposed": (
        "m!k,nkg,g->m!n",
        lambda x, w, g: transposed_ragged(x, w.transpose(2, 0, 1), g.astype(int)),
        (7, 4),
        (4, 4, 3),
        (3,),
    ),
}


def letters_of(text):
    return [re.findall(r"[a-z.]!?", part) for part in text.split(",")]


@pytest.mark.parametrize("name", LETTERS)
def test_equal_letters_are_the_same_axis(name):
    equation, f, *shapes = LETTERS[name]
    ins, outs, _ = walked(f, *(jnp.zeros(s, jnp.float32) for s in shapes))
    words = [word for side in equation.split("->") for word in letters_of(side)]
    known = {}
    for place, (word, dims) in enumerate(zip(words, [*ins, *outs], strict=True)):
        for at, (letter, axis) in enumerate(zip(word, dims, strict=True)):
            assert is_frozen(find(axis)) == letter.endswith("!"), (place, letter)
            key = (place, at) if letter[0] == "." else letter[0]
            mine = set(map(id, leaves(axis)))
            assert mine == known.setdefault(key, mine), (place, letter)
    assert len(set().union(*known.values())) == sum(map(len, known.values()))


NOTED = {
    "reduced": (lambda x: jnp.sum(x, 1), "reduced: reduce_sum"),
    "sorted": (lambda x: lax.sort(x, dimension=1), "sorted"),
    "sorted, top_k": (lambda x: lax.top_k(x, 2)[0], "sorted"),
    "gathered": (lambda x: x[:, jnp.array([1, 2])], "gathered"),
    "scattered": (lambda x: x.at[:, jnp.array([1, 2])].set(0), "gathered"),
    "cumulated": (lambda x: lax.cummax(x, 1), "frozen: cummax"),
    "turned round": (lambda x: lax.rev(x, (1,)), "frozen: rev"),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_depends_on_an_axis_is_noted_of_it_alone(name):
    f, note = NOTED[name]
    ((other, axis),), _, _ = walked(f, FLAT)
    assert note in find(axis).flags
    assert not find(other).flags


def test_positions_along_an_axis_are_noted():
    _, ((rows, columns),), _ = walked(
        lambda x: x + lax.broadcasted_iota(jnp.float32, (4, 6), 1), FLAT
    )
    assert find(columns).flags == {"iota"}
    assert not find(rows).flags


def test_every_second_index_is_one_of_a_fast_factor():
    ((_, axis),), ((_, out),), _ = walked(lambda x: x[:, ::2], FLAT)
    major, minor = leaves(axis)
    assert (major.size, minor.size) == (3, 2)
    assert find(out) is major
    assert minor.flags == {"frozen: strides"}


def test_padding_is_a_segment_of_its_own():
    ((_, axis),), ((_, out),), _ = walked(lambda x: jnp.pad(x, ((0, 0), (2, 1))), FLAT)
    low, own, high = leaves(out)
    assert own is find(axis)
    assert (low.size, high.size) == (2, 1)
    assert not own.flags | low.flags | high.flags


def test_repeated_axes_are_an_axis_within_a_count():
    ((_, axis),), ((_, out),), _ = walked(lambda x: jnp.tile(x, (1, 3)), FLAT)
    count, own = leaves(out)
    assert own is find(axis)
    assert (count.size, count.flags) == (3, {"frozen: tile"})


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_a_convolution_are_a_slow_factor_of_both_channels(groups):
    x, w = jnp.zeros((2, 5, 5, 8)), jnp.zeros((3, 3, 8 // groups, 12))
    (x, w), (out,), _ = walked(lambda x, w: conv(x, w, groups), x, w)
    group, within = leaves(x[3])
    assert (group.size, within.size) == (groups, 8 // groups)
    assert within is find(w[2])
    assert leaves(w[3])[0] is group
    assert leaves(out[3]) == leaves(w[3])


def test_a_depthwise_convolution_has_a_group_for_each_channel():
    x, w = jnp.zeros((2, 5, 5, 8)), jnp.zeros((3, 3, 1, 8))
    (x, w), (out,), _ = walked(lambda x, w: conv(x, w, 8), x, w)
    assert find(x[3]) is find(w[3]) is find(out[3])


def equation_of(f, *args):
    return jax.make_jaxpr(f)(*args).jaxpr.eqns[-1]


def test_what_cannot_be_the_same_is_frozen():
    a, b = product([leaf(2), leaf(3)]), product([leaf(3), leaf(2)])
    eqn = equation_of(jnp.add, jnp.zeros(6), jnp.zeros(6))
    unify(a, b, eqn)
    for x in leaves(a) + leaves(b):
        assert all(note.startswith("frozen: add (") for note in x.flags)
        assert list(x.notes.values()) == [eqn] * len(x.flags)
        assert x.flags
    with pytest.raises(algebra.Incompatible):
        algebra.unify(a, b)


def test_a_rule_from_an_equation():
    eqn = equation_of(lambda x, w: x @ w, jnp.zeros(X), jnp.zeros(W))
    x, w = tuple(map(leaf, X)), tuple(map(leaf, W))
    (out,) = foreign("ij, jk -> ik").axes(eqn, [x, w])
    assert find(x[1]) is find(w[0])
    assert out == (x[0], w[1])


def test_a_question_mark_has_no_part_in_it():
    eqn = equation_of(lambda x, w: x @ w, jnp.zeros(X), jnp.zeros(W))
    x, w = tuple(map(leaf, X)), tuple(map(leaf, W))
    (out,) = foreign("ij,?->?").axes(eqn, [x, w])
    assert not set(out) & {*x, *w}
    assert [d.size for d in out] == [4, 3]
    assert x[0].flags | x[1].flags == {"fixed: dot_general"}
    assert is_frozen(w[0])


def test_other_types_of_another_width_are_not_followed():
    x = jnp.zeros(X, jnp.float32)
    (ins,), (out,), _ = walked(lambda x: lax.bitcast_convert_type(x, jnp.int16), x)
    assert all(map(is_frozen, (*ins, *out)))


def test_a_reshape_may_transpose_first():
    """As a convolution has that is mapped over its kernel."""
    x = jnp.zeros((3, 4, 6))
    f = lambda x: lax.reshape(x, (4, 18), dimensions=(1, 0, 2))
    (ins,), (out,), _ = walked(f, x)
    assert find(out[0]) is find(ins[1])
    assert [find(d) for d in leaves(out[1])] == [find(ins[0]), find(ins[2])]


def test_a_barrier_couples_nothing():
    x, y = jnp.zeros(X), jnp.ones(X)
    f = lambda x, y: lax.optimization_barrier((x, y))
    ins, outs, _ = walked(f, x, y)
    assert ins == list(outs)
    assert not {*map(find, ins[0])} & {*map(find, ins[1])}


def test_numbers_drawn_with_several_keys_have_an_axis_of_them():
    keys = jax.random.split(jax.random.key(0), 4)
    f = jax.vmap(lambda key: jax.random.bits(key, (3,)))
    (ins,), (out,), _ = walked(f, keys)
    assert find(out[0]) is find(ins[0])
    assert not out[1].flags


def test_an_equation_of_other_operands_is_refused():
    eqn = equation_of(lambda x, w: x @ w, jnp.zeros(X), jnp.zeros(W))
    with pytest.raises(ValueError, match="does not fit dot_general"):
        foreign("ijk,jk->ik").axes(eqn, [tuple(map(leaf, X)), tuple(map(leaf, W))])


def test_nothing_is_known_of_an_unknown_primitive():
    eqn = equation_of(lambda x: jnp.unstack(x)[0], jnp.zeros(X))
    dims = tuple(map(leaf, X))
    outs = opaque(eqn, [dims])
    assert [[d.size for d in out] for out in outs] == [[6]] * 4
    assert all(map(is_frozen, (*dims, *(d for out in outs for d in out))))


# The primitives of which no table above has one, with a call.
CALLS = {
    "add_any": jax.grad(lambda x: (x * x).sum()),
    "cummax": lambda x: lax.cummax(x, 1),
    "iota": lambda x: lax.broadcasted_iota(x.dtype, x.shape, 1) + x,
    "reduce_xor": lambda x: lax.reduce_xor(x.astype(int), (0,)),
    "scatter-sub": lambda x: x.at[jnp.array([0, 2])].subtract(1.0),
    "copy": jnp.copy,
    "convert_element_type": lambda x: x.astype(jnp.bfloat16),
    "integer_pow": lambda x: x**3,
    "reduce_precision": lambda x: lax.reduce_precision(x, 5, 7),
    "name": lambda x: checkpoint_name(x, "here"),
    "bitcast_convert_type": lambda x: lax.bitcast_convert_type(x, jnp.int32),
    "random_bits": lambda x: jax.random.bits(jax.random.key(0), (3,)),
    "random_split": lambda x: jax.random.split(jax.random.key(0), 3),
    "random_fold_in": lambda x: jax.random.fold_in(
        jax.random.key(0), x[0, 0].astype(int)
    ),
    "random_seed": lambda x: jax.random.key(x[0, 0].astype(int)),
    "random_wrap": lambda x: jax.random.wrap_key_data(jnp.zeros((4, 2), jnp.uint32)),
    "random_unwrap": lambda x: jax.random.key_data(jax.random.key(0)),
    "random_clone": lambda x: jax.random.clone(jax.random.key(0)),
    "reduce_prod": lambda x: jnp.prod(x, 0),
    "reduce_min": lambda x: jnp.min(x, 0),
    "reduce_and": lambda x: jnp.all(x > 0, 0),
    "reduce_or": lambda x: jnp.any(x > 0, 0),
    "argmin": lambda x: jnp.argmin(x, 0),
    "cumprod": lambda x: lax.cumprod(x, 1),
    "cummin": lambda x: lax.cummin(x, 1),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x, 1),
    "approx_top_k": lambda x: lax.approx_max_k(x, 2),
    "reduce_window": lambda x: lax.reduce_window(
        x, 1.0, lax.mul, (2, 1), (1, 1), "VALID"
    ),
    "reduce_window_sum": lambda x: lax.reduce_window(
        x, 0.0, lax.add, (2, 1), (2, 1), "SAME"
    ),
    "reduce_window_min": lambda x: lax.reduce_window(
        x, jnp.inf, lax.min, (2, 3), (1, 1), "VALID"
    ),
    "select_and_scatter_add": jax.grad(lambda x: windowed(x, (2, 1)).sum()),
    "scatter-mul": lambda x: x.at[jnp.array([0, 2])].multiply(2.0),
    "scatter-min": lambda x: x.at[jnp.array([0, 2]), 1:3].min(2.0),
    "scatter-max": lambda x: x.at[0].max(2.0),
    "empty": lambda x: lax.empty((3, 2), jnp.float32),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_other_rule_keeps_sizes(name):
    assert name in walked(CALLS[name], jnp.asarray(FLAT))[2]


# Names of other versions of JAX, and primitives of sharded or derived programs.
ELSEWHERE = {"copy_p", "ragged_dot", "eq_to", "le_to", "lt_to", "scatter_add"}
ELSEWHERE |= {"scatter_mul", "scatter_min", "scatter_max", "select_and_gather_add"}
ELSEWHERE |= {"sharding_constraint", "pcast", "pvary"}
ELSEWHERE |= {"unstack"}  # in test_kernels.py
NAMES = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
NAMES |= {"not": "bitwise_not", "regularized_incomplete_beta": "betainc"}


def entry_by_entry(name):
    """A function of `lax` with arguments that makes this primitive, if there is one."""
    f = getattr(lax, NAMES.get(name, name), None)
    for count in (1, 2, 3):
        for dtype in ("float32", "int32", "complex64"):
            args = [jnp.ones((4, 4), dtype)] * count
            try:
                eqns = jax.make_jaxpr(f)(*args).jaxpr.eqns
            except (TypeError, ValueError):
                continue
            if [e.primitive.name for e in eqns] == [name]:
                return f, args
    return None


@functools.cache
def plain():
    """By primitive what `entry_by_entry` gives."""
    names = (name for name in sorted(PRIMITIVES) if PRIMITIVES[name].entrywise)
    found = {name: entry_by_entry(name) for name in names}
    return {name: call for name, call in found.items() if call}


def test_entry_by_entry_the_axes_are_those_of_the_operands():
    for name, (f, args) in plain().items():
        ins, (out,), _ = walked(f, *args)
        for dims in ins:
            assert [find(d) for d in dims] == [find(d) for d in out], name
        assert find(out[0]) is not find(out[1]), name


def test_all_rules_are_in_a_table():
    seen = set(plain())
    for f in (*(f for f, _ in MOVES.values()), *CALLS.values()):
        seen |= set(walked(f, jnp.asarray(FLAT))[2])
    for _, f, *shapes in LETTERS.values():
        seen |= set(walked(f, *map(jnp.zeros, shapes))[2])
    left = {name for name, row in PRIMITIVES.items() if row.axes is not fresh} - seen
    assert left == ELSEWHERE


# What a row says beside the axes, against the primitive on small arrays.


@functools.cache
def met():
    """By primitive the equations of the functions above, with operands and results."""
    functions = [(f, jnp.asarray(FLAT)) for f, _ in MOVES.values()]
    functions += [(f, jnp.asarray(FLAT)) for f in CALLS.values()]
    functions += [(f, *args) for f, args in plain().values()]
    functions += [(f, *map(jnp.ones, shapes)) for _, f, *shapes in LETTERS.values()]
    found = {}

    def meaning(eqn, values, here):
        if called(eqn) is not None:
            return interpret(called(eqn), values, meaning)
        outs = bind(eqn, values)
        found.setdefault(eqn.primitive.name, []).append((eqn, values, outs))
        return outs

    for f, *args in functions:
        interpret(jax.make_jaxpr(f)(*args), args, meaning)
    return {name: (PRIMITIVES[name], all_) for name, all_ in found.items()}


class Whole:
    """Sizes of a model of which nothing goes."""

    def shape(self, dims):
        return tuple(d.size for d in dims)

    def size(self, axis):
        return axis.size

    def before(self, axis, at):
        return at


def axes_of(row, eqn):
    ins = [tuple(leaf(n) for n in x.aval.shape) for x in eqn.invars]
    return ins, row.axes(eqn, ins)


def test_at_the_old_sizes_equations_are_the_old_ones():
    tried = set()
    for name, (row, every) in met().items():
        for eqn, values, outs in every if row.resize and not row.draws else ():
            new = row.resize(eqn, Whole(), *axes_of(row, eqn))
            again = types.SimpleNamespace(
                primitive=eqn.primitive, params={**eqn.params, **new}
            )
            for x, y in zip(bind(again, values), outs, strict=True):
                assert x.shape == y.shape, name
                if name != "empty":
                    np.testing.assert_array_equal(x, y, err_msg=name)
            tried.add(name)
    assert len(tried) >= 8


def test_entries_come_from_where_the_row_says():
    every = ((n, row, x) for n, (row, found) in met().items() for x in found)
    for name, row, (_, values, outs) in every:
        of = lambda x: set(np.ravel(np.asarray(x, np.float32)).tolist())
        if row.same:
            for x, y in zip(values, outs, strict=False):
                np.testing.assert_array_equal(x, y)
        if (row.first or row.keeps_entries) and not row.joins and name != "gather":
            for y in outs:
                assert of(y) <= of(values[0]), name
        moves = row.first and not row.part and row.reduced is None
        if moves and name != "gather":
            assert of(outs[0]) == of(values[0]), name
        if row.joins:
            assert of(outs[0]) <= set().union(*map(of, values)), name


def test_what_is_reduced_or_contracted_is_gone_from_the_shape():
    every = ((row, x) for row, found in met().values() for x in found)
    for row, (eqn, values, outs) in every:
        if row.reduced is not None:
            gone = row.reduced(eqn)
            left = [n for a, n in enumerate(values[0].shape) if a not in gone]
            assert list(outs[0].shape) == left
        product = row.contraction(eqn)
        if product is None:
            continue
        shapes = [np.shape(x) for x in values[:2]]
        pairs = zip(*product.batch, strict=False)
        assert all(shapes[0][a] == shapes[1][b] for a, b in pairs)
        (summed, *_), (theirs, *_) = product.summed
        assert shapes[0][summed] == product.groups * shapes[1][theirs]
        if product.samples is None:
            free = [
                s[a] for s, axes in zip(shapes, product.free, strict=True) for a in axes
            ]
            batch = [shapes[0][a] for a in product.batch[0]]
            assert sorted(outs[0].shape) == sorted(batch + free)
        else:
            out = eqn.params["dimension_numbers"].out_spec
            assert outs[0].shape[out[1]] == shapes[1][product.free[1][0]]
            assert product.samples[1] == np.prod([outs[0].shape[a] for a in out[2:]])


GRID = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0)


@functools.cache
def at_numbers():
    """Entrywise primitives of floats as functions, with columns of numbers."""
    result = []
    for name, (f, args) in plain().items():
        if args[0].dtype == jnp.float32:
            columns = np.meshgrid(*[GRID] * len(args), indexing="ij")
            columns = [jnp.asarray(np.ravel(c), jnp.float32) for c in columns]
            with np.errstate(all="ignore"):
                out = np.asarray(jax.jit(f)(*columns))
            result.append((name, PRIMITIVES[name], f, columns, out))
    return result


def test_values_are_what_the_row_says():
    for name, row, _, columns, out in at_numbers():
        if row.value is not None:
            with np.errstate(all="ignore"):
                wanted = row.value(*(np.asarray(c, np.float64) for c in columns))
            np.testing.assert_allclose(out, wanted, 1e-5, 1e-6, err_msg=name)


def test_derivatives_are_gentle_where_the_row_says():
    for name, row, f, columns, out in at_numbers():
        if row.gentle and np.issubdtype(out.dtype, np.floating):
            of = lambda *xs, f=f: f(*xs).sum()
            every = jax.jit(jax.grad(of, argnums=range(len(columns))))(*columns)
            assert all(np.isfinite(slope).all() for slope in every), name


class Operand(NamedTuple):
    """One whose masked entries are zero, or are not known."""

    zero: frozenset
    constant: None = None


def test_zeros_stay_where_the_row_says():
    here = frozenset({1})
    for name, row, f, columns, out in at_numbers():
        (eqn,) = jax.make_jaxpr(f)(*columns).jaxpr.eqns
        for which in itertools.product((False, True), repeat=len(columns)):
            zeros = [here if zero else frozenset() for zero in which]
            known = Masking(
                eqn,
                [*map(Operand, zeros)],
                zeros,
                [()],
                here,
                frozenset(),
                lambda _: here,
            )
            if row.zeros is None or not row.zeros(known):
                continue
            at = np.ones(out.shape, bool)
            for column, zero in zip(columns, which, strict=True):
                at &= (np.asarray(column) == 0) | (not zero)
            values = out[at]
            assert values.size, name
            # 0 / 0 is another matter: it is no number at all.
            assert not values[np.isfinite(values)].any(), (name, which)


def test_rows_of_callers_are_read_once_and_checked():
    for wrong in ("ij,jk", 3, "a->b->c"):
        with pytest.raises(ValueError, match="is no equation such as"):
            foreign(wrong)
    row = foreign("bi,io->bo")
    other = row.sides(None, 1, [True, False])
    assert other == (0, (0,), (), ((1,), ()))
    assert row.sides(None, 1, [False, False]) is None
