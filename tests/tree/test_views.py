import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

CASES = {
    "dense": ((5, 3), js.Axes((0,), (1,)), None, (3, 5)),
    "torch": ((5, 3), js.Axes((1,), (0,)), None, (5, 3)),
    "convolution": ((2, 3, 4, 5), js.Axes((0, 1, 2), (3,)), None, (5, 24)),
    "query": ((6, 2, 3), js.Axes((0,), (1, 2)), None, (6, 6)),
    "attention out": ((2, 3, 7), js.Axes((0, 1), (-1,)), None, (7, 6)),
    "experts": ((2, 3, 4, 5), js.Axes((2,), (3,), (1, 0)), None, (3, 2, 5, 4)),
    "grouped": (
        (3, 2, 8),
        js.Axes((0, 1), (3,), (2,)),
        (3, 2, 4, 2),
        (4, 2, 6),
    ),
    "no input axis": ((4,), js.Axes((), (0,)), None, (4, 1)),
}
every_case = pytest.mark.parametrize("name", CASES)


def case(name):
    shape, axes, split, expected = CASES[name]
    return np.arange(np.prod(shape)).reshape(shape), axes, split, expected


@every_case
def test_matrices_have_the_sizes_of_the_view(name):
    w, axes, split, expected = case(name)
    view = js.tree.matrix_view(w.shape, axes, split=split)
    assert (*view.batch, view.d_out, view.d_in) == expected
    assert js.tree.to_matrices(w, view).shape == expected


@every_case
def test_there_and_back_nothing_changes(name):
    w, axes, split, _ = case(name)
    view = js.tree.matrix_view(w.shape, axes, split=split)
    matrices = js.tree.to_matrices(w, view)
    np.testing.assert_array_equal(js.tree.from_matrices(matrices, view), w)
    again = js.tree.to_matrices(js.tree.from_matrices(matrices, view), view)
    np.testing.assert_array_equal(again, matrices)


@every_case
def test_each_number_is_where_its_axes_say(name):
    w, axes, split, _ = case(name)
    view = js.tree.matrix_view(w.shape, axes, split=split)
    matrices, whole = js.tree.to_matrices(w, view), w.reshape(view.split)
    axes = view.axes
    for at in np.ndindex(whole.shape):
        flat = [
            np.ravel_multi_index([at[a] for a in some], [whole.shape[a] for a in some])
            if some
            else 0
            for some in (axes.output, axes.input)
        ]
        assert matrices[*(at[a] for a in axes.batch), *flat] == whole[at]


def test_numpy_stays_numpy_and_jax_stays_jax():
    w, axes, _, _ = case("experts")
    view = js.tree.matrix_view(w.shape, axes)
    assert type(js.tree.from_matrices(js.tree.to_matrices(w, view), view)) is np.ndarray
    traced = jax.jit(
        lambda w: js.tree.from_matrices(js.tree.to_matrices(w, view), view)
    )
    np.testing.assert_array_equal(traced(jnp.asarray(w)), w)


def test_views_of_equal_meaning_are_equal():
    one = js.tree.matrix_view((5, 3), js.Axes((0,), (1,)))
    assert one == js.tree.matrix_view((5, 3), js.Axes((-2,), (-1,)))
    assert (
        len({one, js.tree.matrix_view((5, 3), js.Axes((0,), (1,)), split=(5, 3))}) == 1
    )


def test_a_split_of_another_size_is_refused():
    with pytest.raises(
        ValueError, match=r"split \(2, 4\) holds not as much .*\(5, 3\)"
    ):
        js.tree.matrix_view((5, 3), js.Axes((0,), (1,)), split=(2, 4))


def test_axes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"does not name each .* exactly once"):
        js.tree.matrix_view((5, 3), js.Axes((0,), (0,)))
    with pytest.raises(ValueError, match="4 axes"):
        js.tree.matrix_view((3, 2, 8), js.Axes((0, 1), (2,)), split=(3, 2, 4, 2))


def test_arrays_that_do_not_fit_are_refused():
    view = js.tree.matrix_view((5, 3), js.Axes((0,), (1,)))
    with pytest.raises(ValueError, match=r"w has the shape \(4, 3\), .* \(5, 3\)"):
        js.tree.to_matrices(np.zeros((4, 3)), view)
    with pytest.raises(ValueError, match=r"matrices .* \(3, 4\), .* \(3, 5\)"):
        js.tree.from_matrices(np.zeros((3, 4)), view)
