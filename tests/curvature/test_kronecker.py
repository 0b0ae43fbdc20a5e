"""The Kronecker form of the Fisher matrix, against np.kron and a dense inverse."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse.curvature import _kronecker_sums
from jaxsparse.curvature._kronecker import (
    kronecker_diagonal,
    kronecker_estimator,
    kronecker_fisher,
    kronecker_ihvp,
)
from jaxsparse.linalg import triangle as _triangle

M = 6
DAMPING = 0.03
AXES = {
    "heads": js.Axes(input=(0,), output=(1, 2)),
    "stacked": js.Axes(input=(1,), output=(2,), batch=(0,)),
    "torch": js.Axes(input=(1,), output=(0,)),
    "turned": js.Axes(input=(2, 0), output=(1,), batch=(3,)),
}
# Shape, and how the reference finds layers, outputs and inputs, in this order.
KERNELS = {
    "bias": ((5,), "o", "1o1"),
    "conv": ((2, 2, 3, 4), "hwio", "1o(hwi)"),
    "dense": ((3, 4), "io", "1oi"),
    "heads": ((4, 2, 3), "iho", "1(ho)i"),
    "scale": ((), "", "111"),
    "stacked": ((2, 3, 4), "lio", "loi"),
    "torch": ((4, 3), "oi", "1oi"),
    "turned": ((2, 3, 4, 2), "jokl", "lo(kj)"),
}


def ones(*shape):
    return np.ones(shape, np.float32)


def axis_order(name):
    """The axes of a kernel, slowest first, and the three sizes of its matrices."""
    shape, letters, form = KERNELS[name]
    order = [letters.index(c) for c in form if c.isalpha()]
    sizes, open_, now = [], False, 1
    for c in form:
        if c == "(":
            open_, now = True, 1
        elif c == ")":
            open_ = False
            sizes.append(now)
        elif open_:
            now *= shape[letters.index(c)]
        else:
            sizes.append(1 if c == "1" else shape[letters.index(c)])
    return order, sizes


def as_matrices(x, name):
    """`[..., *shape]` as `[..., layers, d_out, d_in]`."""
    order, sizes = axis_order(name)
    extra = x.ndim - len(order)
    x = np.transpose(x, [*range(extra), *(extra + a for a in order)])
    return x.reshape(*x.shape[:extra], *sizes)


def back(x, name):
    order, _ = axis_order(name)
    shape = KERNELS[name][0]
    return x.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def dense_inverses(g, name, damping):
    """`((R kron L) / (m t) + damping I)^-1` of each layer, rows of a kernel in turn."""
    inverses = []
    for layer in np.moveaxis(as_matrices(np.asarray(g, np.float64), name), 1, 0):
        left = sum(x.T @ x for x in layer)
        right = sum(x @ x.T for x in layer)
        fisher = np.kron(right, left) / (len(layer) * np.trace(left))
        inverses.append(np.linalg.inv(fisher + damping * np.eye(len(fisher))))
    return np.stack(inverses)


def dense_ihvp(inverses, x, name):
    rows = as_matrices(np.asarray(x, np.float64), name)
    flat = rows.reshape(len(rows), -1)
    return back(np.einsum("lab,lb->la", inverses, flat), name)


def dense_diagonal(inverses, name):
    return back(np.diagonal(inverses, axis1=1, axis2=2), name)


def random(seed, *front, dtype=np.float32, names=tuple(KERNELS)):
    rng = np.random.default_rng(seed)
    draw = lambda k: rng.normal(size=(*front, *KERNELS[k][0])).astype(dtype)
    return jax.device_put({k: draw(k) for k in names})


def ihvp(fisher, tree):
    return {
        lay.path: kronecker_ihvp(f, tree[lay.path], fisher.damping, layout=lay)
        for f, lay in zip(fisher.factors, fisher.layouts, strict=True)
    }


def diagonal(fisher):
    return {
        lay.path: kronecker_diagonal(f, fisher.damping, layout=lay)
        for f, lay in zip(fisher.factors, fisher.layouts, strict=True)
    }


def assert_close(got, expected, tolerance):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    error = np.max(np.abs(got - expected)) / np.max(np.abs(expected))
    assert error < tolerance, error


@functools.cache
def everything(dtype):
    """The matrix of all kernels, products with its inverse and diagonals of that."""

    @jax.jit
    def run(grads, x):
        fisher = kronecker_fisher(grads, damping=DAMPING, axes=AXES)
        return fisher, ihvp(fisher, x), diagonal(fisher)

    return run(random(0, M, dtype=dtype), random(1, dtype=dtype))


def check_against_dense(dtype, tolerance):
    grads, x = random(0, M, dtype=dtype), random(1, dtype=dtype)
    fisher, products, diagonals = everything(dtype)
    for name in KERNELS:
        inverses = dense_inverses(grads[name], name, DAMPING)
        assert products[name].dtype == diagonals[name].dtype == dtype
        assert_close(products[name], dense_ihvp(inverses, x[name], name), tolerance)
        assert_close(diagonals[name], dense_diagonal(inverses, name), tolerance)
    return fisher


@pytest.mark.usefixtures("x64")
def test_the_inverse_is_that_of_the_dense_product_in_float64():
    check_against_dense(np.float64, 1e-9)


def test_and_in_float32():
    fisher = check_against_dense(np.float32, 1e-5)
    assert {x.dtype for x in jax.tree.leaves(fisher)} == {np.dtype(np.float32)}
    # The state is both sides of every layer, and no more.
    sizes = [axis_order(name)[1] for name in KERNELS]
    numbers = sum(n * (i * i + i + o * o + o) for n, o, i in sizes)
    assert sum(x.size for x in jax.tree.leaves(fisher)) == numbers + 1


def low_rank(m=40, d_in=12, d_out=10):
    """Gradients whose eigenvalues fall over some six orders of magnitude."""
    rng = np.random.default_rng(2)
    left = rng.normal(size=(d_in, d_in)) * np.logspace(0, -1.5, d_in)[:, None]
    right = rng.normal(size=(d_out, d_out)) * np.logspace(0, -1.5, d_out)[:, None]
    a, b = rng.normal(size=(m, d_in)) @ left, rng.normal(size=(m, d_out)) @ right
    return np.einsum("mi,mo->mio", a, b).astype(np.float32)


@pytest.mark.parametrize(
    ("accurate", "bounds"), [(True, (0, 3e-6)), (False, (1e-5, 1))]
)
def test_a_small_damping_is_not_lost_beside_large_eigenvalues(accurate, bounds):
    g = low_rank()
    wide = g.astype(np.float64).swapaxes(1, 2)
    left = np.einsum("moi,moj->ij", wide, wide)
    right = np.einsum("moi,mpi->op", wide, wide)
    fisher = np.kron(right, left) / (len(g) * np.trace(left))
    damping = 1e-6 * np.linalg.norm(fisher, 2)
    inverse = np.linalg.inv(fisher + damping * np.eye(len(fisher)))
    expected = np.diagonal(inverse).reshape(10, 12).T
    fisher = kronecker_fisher({"w": g}, damping=damping, accurate=accurate)
    error = np.max(np.abs(diagonal(fisher)["w"] / expected - 1))
    assert bounds[0] <= error < bounds[1]


def uncorrelated(seed=3, n=4):
    """`delta_j a_i^T` for all pairs, as kernels `(in, out)`."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, 3)), rng.normal(size=(n, 4))
    return np.einsum("ni,ko->nkio", a, b).reshape(n * n, 3, 4).astype(np.float32)


def empirical_inverse_diagonal(g, damping):
    g = g.reshape(len(g), -1).astype(np.float64)
    return np.diag(np.linalg.inv(g.T @ g / len(g) + damping * np.eye(g.shape[1])))


def test_it_is_the_empirical_fisher_matrix_where_both_sides_are_uncorrelated():
    g = uncorrelated()
    fisher = kronecker_fisher({"w": g}, damping=DAMPING)
    exact = empirical_inverse_diagonal(g, DAMPING).reshape(3, 4)
    assert_close(diagonal(fisher)["w"], exact, 1e-5)
    # Other lengths to some of the pairs, and it is an approximation.
    g[::5] *= 3
    fisher = kronecker_fisher({"w": g}, damping=DAMPING)
    exact = empirical_inverse_diagonal(g, DAMPING).reshape(3, 4)
    assert np.max(np.abs(diagonal(fisher)["w"] / exact - 1)) > 0.05


def test_a_vector_is_exact_whatever_its_gradients():
    g = np.asarray(random(4, M)["bias"])
    fisher = kronecker_fisher({"bias": g}, damping=DAMPING)
    exact = empirical_inverse_diagonal(g, DAMPING)
    assert_close(diagonal(fisher)["bias"], exact, 1e-5)


def test_the_trace_is_that_of_the_empirical_fisher_matrix():
    grads, fisher = random(0, M), everything(np.float32)[0]
    for f, path in zip(fisher.factors, fisher.paths, strict=True):
        trace = np.sum(np.square(np.asarray(grads[path], np.float64))) / M
        np.testing.assert_allclose(np.sum(f.input_values), trace, rtol=1e-6)
        np.testing.assert_allclose(np.sum(f.output_values, -1), 1, rtol=1e-6)


def test_streamed_gradients_give_what_one_call_gives():
    names = ("bias", "conv", "dense", "stacked")
    grads = random(0, M, names=names)
    params = random(5, names=names) | {"left_out": np.ones((3, 3, 3), np.float32)}
    axes = {"stacked": AXES["stacked"]}
    estimator = kronecker_estimator(axes=axes, where=lambda path, w: path in names)
    cut = lambda i: {k: np.asarray(g)[i : i + 2] for k, g in grads.items()}
    start, update = jax.jit(estimator.init)(params), jax.jit(estimator.update)
    first, others = update(start, cut(0)), start
    for i in range(2, M, 2):
        others = update(others, cut(i))

    @jax.jit
    def both(first, others, damping):
        once = kronecker_fisher(grads, damping=damping, axes=axes)
        fisher = estimator.finalize(estimator.merge(first, others), damping=damping)
        return (once, diagonal(once)), (fisher, diagonal(fisher))

    for damping in (DAMPING, 1.0):
        (once, expected), (fisher, got) = both(first, others, damping)
        assert fisher.paths == once.paths == names
        for name, inverse in expected.items():
            assert_close(got[name], inverse, 1e-6)
    assert fisher.treedef.num_leaves == len(names)


def test_gradients_are_worked_on_some_at_a_time(monkeypatch):
    # Two gradients a turn, and one is left over.
    monkeypatch.setattr(_kronecker_sums, "SLAB_BYTES", 2 * 32 * 12)
    g = random(6, 7)["dense"]
    fisher = kronecker_fisher({"dense": g}, damping=DAMPING)
    inverses = dense_inverses(g, "dense", DAMPING)
    expected = dense_diagonal(inverses, "dense")
    assert_close(diagonal(fisher)["dense"], expected, 1e-5)


@pytest.mark.parametrize("spec", [None, P("x", None, None), P(None, "x", None)])
def test_no_second_copy_of_the_gradients_is_made(spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = None if spec is None else NamedSharding(mesh, spec)
    view = js.tree.matrix_view((256, 192), js.Axes(input=(0,), output=(1,)))
    layout = _kronecker_sums.KernelLayout("w", view)

    def compiled(m):
        g = jax.ShapeDtypeStruct((m, 256, 192), jnp.float32, sharding=sharding)
        lowered = _kronecker_sums.sum_up.lower(None, g, layout=layout, accurate=True)
        return lowered.compile()

    scratch = lambda c: c.memory_analysis().temp_size_in_bytes
    many = compiled(1024)
    assert scratch(many) < 1024 * 256 * 192  # a quarter of the gradients, everywhere
    assert scratch(many) < 1.05 * scratch(compiled(128))
    gathered = "all-gather" in many.as_text()
    assert gathered == (spec == P(None, "x", None))


def test_relative_damping_counts_weights_whose_input_and_output_have_gradients():
    g = uncorrelated()
    g[:, 0, :] = 0
    g[:, :, 1] = 0
    mean = np.sum(np.square(g)) / len(g) / (2 * 3)
    relative = kronecker_fisher({"w": g}, rel_damping=0.1)
    np.testing.assert_allclose(relative.damping, 0.1 * mean, rtol=1e-6)
    # Inputs and outputs without gradients are apart from the rest.
    inverse = np.asarray(diagonal(relative)["w"])
    dead = np.concatenate([inverse[0], inverse[:, 1]])
    np.testing.assert_allclose(dead * relative.damping, 1, rtol=1e-5)


def test_gradients_that_are_all_zero_leave_the_damping():
    zeros = lambda *shape: np.zeros(shape, np.float32)
    grads = {"layers": zeros(M, 2, 3, 4), "empty": zeros(M, 0, 3)}
    grads["layers"][:, 1] = uncorrelated()[:M]
    axes = {"layers": AXES["stacked"]}
    run = jax.jit(lambda g: diagonal(kronecker_fisher(g, damping=0.5, axes=axes)))
    inverse = run(grads)
    layers = np.asarray(inverse["layers"])
    np.testing.assert_allclose(layers[0], 2.0, rtol=1e-6)
    assert np.all(layers[1] < 2.0)
    assert inverse["empty"].shape == (0, 3)


def test_jit_gives_what_eager_calls_give():
    names = ("bias", "dense")
    grads, x = random(0, M, names=names), random(1, names=names)

    @jax.jit
    def both(grads, x, damping):
        fisher = kronecker_fisher(grads, rel_damping=damping)
        return ihvp(fisher, x), diagonal(fisher)

    fisher = kronecker_fisher(grads, rel_damping=0.1)
    expected = ihvp(fisher, x), diagonal(fisher)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), both(grads, x, 0.1), expected)


def test_other_values_and_dampings_do_not_compile_again(caplog):
    def run(seed, damping):
        grads = random(seed, M, names=("dense",))
        fisher = kronecker_fisher(grads, damping=damping)
        return jax.block_until_ready((diagonal(fisher), ihvp(fisher, random(9))))

    run(0, 0.1)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        run(1, 0.2)
        assert "Compiling" not in caplog.text
        kronecker_fisher({"dense": ones(M, 3, 5)}, damping=0.1)
        assert "Compiling" in caplog.text


SHARDED = {
    "gradients": ((8, 16), P("x", None, None), P(None, None)),
    "layers": ((8, 4, 3), P(None, "x", None, None), P("x", None, None)),
    "window": ((2, 2, 3, 8), P(None, None, None, None, "x"), P(None, None, None, "x")),
}


def sharded_problem():
    rng = np.random.default_rng(7)
    shape = lambda k, *front: (*front, *SHARDED[k][0])
    grads = {k: rng.normal(size=shape(k, 16)).astype(np.float32) for k in SHARDED}
    xs = {k: rng.normal(size=shape(k)).astype(np.float32) for k in SHARDED}
    return grads, xs


def at_once(grads, xs):
    axes = {"layers": AXES["stacked"]}
    fisher = kronecker_fisher(grads, damping=DAMPING, axes=axes)
    inverses = diagonal(fisher)
    # They can be used beside the kernels.
    used = {name: jnp.square(xs[name]) / d for name, d in inverses.items()}
    return ihvp(fisher, xs), inverses, used


def streamed(grads, xs):
    estimator = kronecker_estimator(axes={"layers": AXES["stacked"]})
    sums = estimator.update(estimator.init(xs), grads)
    sums = estimator.merge(sums, sums)
    return diagonal(estimator.finalize(sums, damping=DAMPING))


alone = functools.cache(lambda: jax.jit(at_once)(*sharded_problem()))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_kernels(kind, monkeypatch):
    monkeypatch.setattr(
        _kronecker_sums, "SLAB_BYTES", 1
    )  # two turns, of 8 gradients each
    products, diagonals, _ = alone()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    grads, xs = sharded_problem()
    grads = {k: put(g, SHARDED[k][1]) for k, g in grads.items()}
    xs = {k: put(x, SHARDED[k][2]) for k, x in xs.items()}
    # Eager in one of the cases.
    run = at_once if kind == AxisType.Auto else jax.jit(at_once)
    got, inverses, used = run(grads, xs)
    jax.block_until_ready(used)
    for name, product in got.items():
        assert_close(product, products[name], 1e-5)
        assert len(product.sharding.device_set) == 8
        if kind == AxisType.Explicit:
            assert product.sharding.is_equivalent_to(xs[name].sharding, product.ndim)
    for name, inverse in inverses.items():
        assert_close(inverse, diagonals[name], 1e-5)
    for name, inverse in jax.jit(streamed)(grads, xs).items():
        assert_close(inverse, diagonals[name], 1e-5)


def test_errors_name_the_parameter_and_what_to_do():
    grads = random(0, M, names=("dense",))
    with pytest.raises(ValueError, match=r"either damping .* or rel_damping"):
        kronecker_fisher(grads)
    with pytest.raises(ValueError, match="damping must be positive"):
        kronecker_fisher(grads, damping=0.0)
    with pytest.raises(ValueError, match="attention/query: a kernel of three axes"):
        kronecker_fisher({"attention": {"query": ones(M, 4, 2, 3)}}, damping=1.0)
    with pytest.raises(ValueError, match="'nothing' matches no parameter"):
        kronecker_fisher(grads, damping=1.0, axes={"nothing": AXES["torch"]})
    with pytest.raises(ValueError, match=r"dense: no gradients, .* \(m = 0\)"):
        kronecker_fisher({"dense": ones(0, 3, 4)}, damping=1.0)
    with pytest.raises(TypeError, match="dense"):
        kronecker_fisher({"dense": ones(M, 3, 4).astype(np.int32)}, damping=1.0)
    spoilt = {"dense": np.array(grads["dense"])}
    spoilt["dense"][2, 0, 1] = np.nan
    with pytest.raises(ValueError, match=f"dense: 1 of {M} .* NaN or Inf.* number 2"):
        kronecker_fisher(spoilt, damping=1.0)

    estimator = kronecker_estimator()
    sums = estimator.init({"dense": ones(3, 4)})
    with pytest.raises(ValueError, match="call update first"):
        estimator.finalize(sums, damping=1.0)
    with pytest.raises(ValueError, match=r"dense: grads has the shape \(2, 4, 3\)"):
        estimator.update(sums, {"dense": ones(2, 4, 3)})
    with pytest.raises(ValueError, match="lacks"):
        estimator.update(sums, {"other": ones(2, 3, 4)})
    with pytest.raises(ValueError, match="dense"):
        estimator.update(sums, spoilt)
    other = estimator.init({"dense": ones(4, 3)})
    with pytest.raises(ValueError, match="other parameters"):
        estimator.merge(sums, other)


def test_squares_that_leave_the_range_of_float32_are_an_error():
    with pytest.raises(ValueError, match="w: the squares of the gradients leave"):
        kronecker_fisher({"w": np.float32(1e25) * ones(2, 2, 3)}, damping=1.0)


def test_sums_are_kept_in_48_bits():
    # In float32 the small gradient would vanish beside the large one.
    g = jnp.array([[[4096.0]], [[1e-2]]])
    estimator = kronecker_estimator()
    sums = estimator.update(estimator.init({"w": ones(1, 1)}), {"w": g})
    with jax.enable_x64(True):
        square = _triangle.join(sums.sums[0].input, jnp.float64)
    expected = 4096.0**2 + float(np.float32(1e-2)) ** 2
    np.testing.assert_allclose(square, expected, rtol=1e-14)
