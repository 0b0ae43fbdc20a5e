import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.conftest import compilations as compilations
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import activation as oracle

import jaxsparse as js

N, EXPERTS = 32, 2
VIEWS = {
    "dense": js.tree.matrix_view((8, 16), js.Axes((0,), (1,))),
    "torch": js.tree.matrix_view((16, 8), js.Axes((1,), (0,))),
    "query": js.tree.matrix_view((8, 2, 4), js.Axes((0,), (1, 2))),
    "attend": js.tree.matrix_view((2, 4, 16), js.Axes((0, 1), (2,))),
    "conv": js.tree.matrix_view((2, 2, 2, 16), js.Axes((0, 1, 2), (3,))),
    "experts": js.tree.matrix_view((EXPERTS, 8, 4), js.Axes((1,), (2,), (0,))),
    "last": js.tree.matrix_view((8, 4, EXPERTS), js.Axes((0,), (1,), (2,))),
    "grouped": js.tree.matrix_view(
        (4, 2, 8), js.Axes((0, 1), (3,), (2,)), split=(4, 2, EXPERTS, 4)
    ),
}
every_view = pytest.mark.parametrize("name", VIEWS)
GRADS = 5
# The same by hand: `[batch, d_out, d_in]`, with one batch where there is none.
MATRICES = {
    "dense": lambda x: x.T[None],
    "torch": lambda x: x[None],
    "query": lambda x: x.reshape(8, 8).T[None],
    "attend": lambda x: x.reshape(8, 16).T[None],
    "conv": lambda x: x.reshape(8, 16).T[None],
    "experts": lambda x: x.transpose(0, 2, 1),
    "last": lambda x: x.transpose(2, 1, 0),
    "grouped": lambda x: x.reshape(8, EXPERTS, -1).transpose(1, 2, 0),
}


@functools.cache
def rows(batch=()):
    rng = np.random.default_rng(len(batch))
    mix = rng.standard_normal((*batch, 8, 8)) * np.geomspace(0.1, 3, 8)
    x = rng.standard_normal((*batch, N, 8)) @ mix + 1
    return x.astype(np.float32)


@functools.cache
def model(names=tuple(VIEWS)):
    """Parameters `{name: {kernel, bias}}`, statistics of all, gradients of all."""
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    bias = jnp.asarray(np.ones(4, np.float32))
    params = {k: {"kernel": draw(*VIEWS[k].shape), "bias": bias} for k in names}
    inputs = {}
    for batch in {VIEWS[k].batch for k in names}:
        state = js.calibration.init(batch, 8, gram=False)
        state = js.calibration.update(state, rows(batch))
        inputs[str(batch)] = js.calibration.finalize(state)
    kernels = tuple((f"{k}/kernel", str(VIEWS[k].batch), VIEWS[k]) for k in names)
    grads = {k: {"kernel": draw(GRADS, *VIEWS[k].shape), "bias": None} for k in names}
    return params, js.calibration.Statistics(inputs, kernels), grads


@jax.jit
def scored(params, stats, norms):
    """Everything at once: one program, and not one for each operation and view."""
    return {
        "wanda": js.scores.wanda(params, stats),
        "flap": js.scores.flap(params, stats),
        "standardised": js.scores.flap(params, stats, standardise=True),
        "gblm": js.scores.gblm(params, stats, norms, alpha=0.3),
        "without gradients": js.scores.gblm(params, stats, norms, alpha=0.0),
        "gradient_norm": js.scores.gradient_norm(params, norms),
    }


@functools.cache
def scores(names=tuple(VIEWS), order=1):
    params, stats, grads = model(names)
    return scored(params, stats, js.calibration.gradient_norms(grads, order=order))


def matrices(x, name):
    return MATRICES[name](np.asarray(x))


def rows_of(name):
    return rows(VIEWS[name].batch).reshape(-1, N, 8)


@every_view
def test_wanda_is_what_the_output_loses_with_one_weight(name):
    params, _, _ = model()
    got = matrices(scores()["wanda"][name]["kernel"], name)
    w, x = matrices(params[name]["kernel"], name), rows_of(name)
    expected = [oracle.wanda(wb, xb) for wb, xb in zip(w, x, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for i, j in [(0, 0), (3, 7), (2, 5)]:
        change = oracle.output_change(w[0], x[0], i, j)
        np.testing.assert_allclose(got[0, i, j], change, rtol=1e-4)


@every_view
@pytest.mark.parametrize("order", [1, 2])
def test_gblm_adds_the_gradients(name, order):
    params, _, grads = model()
    got = {k: np.asarray(s[name]["kernel"]) for k, s in scores(order=order).items()}
    w = np.asarray(params[name]["kernel"], np.float64)
    g = oracle.gradient_norms(grads[name]["kernel"], order)
    np.testing.assert_allclose(got["gradient_norm"], abs(w) * g, rtol=1e-5)
    np.testing.assert_allclose(got["gblm"], got["wanda"] + 0.3 * abs(w) * g, rtol=1e-5)


def test_without_gradients_in_it_gblm_is_wanda():
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, scores()["without gradients"], scores()["wanda"])


@every_view
def test_flap_is_what_the_output_loses_when_an_input_is_its_mean(name):
    w, x = matrices(model()[0][name]["kernel"], name), rows_of(name)
    for b, of_matrix in enumerate(matrices(scores()["flap"][name]["kernel"], name)):
        expected = [oracle.mean_replaced(w[b], x[b], j) for j in range(8)]
        np.testing.assert_allclose(
            of_matrix, np.broadcast_to(expected, of_matrix.shape), rtol=1e-4
        )


@every_view
def test_flap_standardised_has_mean_0_and_spread_1_over_a_kernel_s_channels(name):
    channels, before = (
        matrices(scores()[kind][name]["kernel"], name)[:, 0]
        for kind in ("standardised", "flap")
    )
    np.testing.assert_allclose(channels.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(channels.std(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(channels.argsort(-1), before.argsort(-1))


def test_flap_of_equal_channels_is_no_division_by_zero():
    state = js.calibration.init((), 8, gram=False)
    state = js.calibration.update(state, np.ones((N, 8), np.float32))
    known = {"x": js.calibration.finalize(state)}
    stats = js.calibration.Statistics(known, (("kernel", "x", VIEWS["dense"]),))
    params = {"kernel": jnp.asarray(np.ones((8, 16), np.float32))}
    got = js.scores.flap(params, stats, standardise=True)["kernel"]
    assert not np.asarray(got).any()


def test_flap_s_channels_and_heads_can_be_selected():
    _, stats, _ = model(("dense", "attend"))
    flap = {k: scores()["flap"][k] for k in ("dense", "attend")}
    channels = js.patterns.masks(flap, 0.5, pattern=js.Channel(axis=0), axes=stats.axes)
    assert channels["dense"]["kernel"].shape == (8, 1)
    kept = np.asarray(channels["dense"]["kernel"])[:, 0]
    by_channel = np.asarray(flap["dense"]["kernel"])[:, 0]
    assert by_channel[kept].min() >= by_channel[~kept].max()
    assert channels["attend"]["kernel"].shape == (2, 1, 1)


@pytest.mark.parametrize("by_weight", [False, True], ids=["channels", "weights"])
@pytest.mark.parametrize("name", ["dense", "experts"])
def test_compensation_keeps_the_mean_of_the_outputs(name, by_weight):
    params, stats, _ = model()
    w = matrices(params[name]["kernel"], name).reshape(*VIEWS[name].batch, -1, 8)
    rng = np.random.default_rng(3)
    shape = w.shape if by_weight else (*w.shape[:-2], 8)
    kept = rng.random(shape) < 0.5
    mean = stats.of(f"{name}/kernel").mean
    bias = js.scores.bias_compensation(jnp.asarray(w), mean, jnp.asarray(kept))
    mask = kept if by_weight else kept[..., None, :]
    pruned = np.where(mask, w, 0)
    x = rows(VIEWS[name].batch)
    before = (x @ np.swapaxes(w, -1, -2)).mean(-2)
    after = (x @ np.swapaxes(pruned, -1, -2)).mean(-2) + np.asarray(bias)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_in_each_output_unit_the_least_of_wanda_s_scores_are_removed():
    _, stats, _ = model()
    pattern = js.Unstructured(scope="output")
    select = lambda s: js.patterns.masks(s, 0.5, pattern=pattern, axes=stats.axes)
    wanda = scores()["wanda"]
    masks = jax.jit(select)(wanda)
    for name in VIEWS:
        kept, s = (matrices(t[name]["kernel"], name) for t in (masks, wanda))
        assert (kept.sum(-1) == 4).all()
        least = np.where(kept, s, np.inf).min(-1)
        assert (least >= np.where(kept, -np.inf, s).max(-1)).all()


def test_what_has_no_statistics_is_refused_unless_it_takes_no_part():
    params, stats, grads = model(("dense",))
    kernel = jnp.asarray(np.ones((8, 4), np.float32))
    params = params | {"head": {"kernel": kernel, "bias": kernel[0]}}
    grads = grads | {"head": {"kernel": kernel[None], "bias": None}}
    norms = js.calibration.gradient_norms(grads, order=1)
    where = r"^(?!head).*kernel$"
    for score in (
        js.scores.wanda,
        js.scores.flap,
        functools.partial(js.scores.gblm, gradients=norms),
    ):
        with pytest.raises(ValueError, match=r"^head/kernel: .*no statistics"):
            score(params, stats)
        got = jax.tree.map(np.asarray, score(params, stats, where=where))
        assert jax.tree.structure(got) == jax.tree.structure(params)
        assert not got["head"]["kernel"].any()
        assert not got["dense"]["bias"].any()
        assert got["dense"]["kernel"].any()


def test_what_has_no_gradients_is_refused_unless_it_takes_no_part():
    params, stats, grads = model(("dense", "conv"))
    grads = grads | {"conv": {"kernel": None, "bias": None}}
    norms = js.calibration.gradient_norms(grads, order=1)
    for score in (
        lambda where=None: js.scores.gblm(params, stats, norms, where=where),
        lambda where=None: js.scores.gradient_norm(params, norms, where=where),
    ):
        with pytest.raises(ValueError, match=r"^conv/kernel: .*no gradients of it"):
            score()
        assert not np.any(score(where=r"dense/kernel")["conv"]["kernel"])


def test_what_takes_no_part_may_be_of_any_type():
    params, stats, _ = model(("dense",))
    params = params | {"steps": np.int32(3), "key": jax.random.key(0)}
    for score in (js.scores.wanda, js.scores.flap):
        steps = score(params, stats)["steps"]
        assert int(steps) == 0
        assert steps.dtype == jnp.int32


def test_scores_of_bf16_weights_are_those_of_the_same_float32_weights():
    params, stats, grads = model(("dense",))
    norms = js.calibration.gradient_norms(grads, order=2)
    short = jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda w: w.astype(np.float32), short)
    for kind, got in scored(short, stats, norms).items():
        assert {s.dtype.name for s in jax.tree.leaves(got)} == {"float32"}
        expected = scored(wide, stats, norms)[kind]["dense"]["kernel"]
        np.testing.assert_array_equal(got["dense"]["kernel"], expected)
    mean = stats.of("dense/kernel").mean
    w = jnp.asarray(short["dense"]["kernel"].T)
    bias = js.scores.bias_compensation(w, mean, jnp.asarray(np.zeros(8, bool)))
    assert bias.dtype == jnp.bfloat16


@pytest.mark.usefixtures("x64")
def test_float64_weights_are_scored_in_float64():
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((8, 16)), rng.standard_normal((N, 8))
    state = js.calibration.init((), 8, gram=False, dtype=jnp.float64)
    known = js.calibration.finalize(js.calibration.update(state, x))
    stats = js.calibration.Statistics({"x": known}, (("w", "x", VIEWS["dense"]),))
    got = np.asarray(js.scores.wanda({"w": jnp.asarray(w)}, stats)["w"])
    np.testing.assert_allclose(got.T, oracle.wanda(w.T, x), rtol=1e-13)


def test_jitted_it_is_the_same_and_does_not_compile_again(compilations):
    params, stats, grads = model(("dense",))
    norms = js.calibration.gradient_norms(grads, order=1)
    got = scores(("dense",))
    for kind, eager in {
        "wanda": js.scores.wanda(params, stats),
        "flap": js.scores.flap(params, stats),
        "standardised": js.scores.flap(params, stats, standardise=True),
        "gblm": js.scores.gblm(params, stats, norms, alpha=0.3),
        "gradient_norm": js.scores.gradient_norm(params, norms),
    }.items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            got[kind],
            eager,
        )
    other = jax.tree.map(
        lambda w: jnp.asarray(np.asarray(w) + np.asarray(1, w.dtype)),
        (params, stats, norms),
    )
    with compilations() as found:
        scored(*other)
        js.scores.wanda(other[0], other[1])
    assert found.names == []


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_scores_of_sharded_weights_lie_where_the_weights_do(name, kind):
    params, stats, _ = model()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    outputs = P(*[None] * (len(VIEWS[name].shape) - 1), "x")
    w = jax.device_put(params[name]["kernel"], NamedSharding(mesh, outputs))
    sharded = {name: {"kernel": w, "bias": params[name]["bias"]}}
    both = lambda p: (js.scores.wanda(p, stats), js.scores.flap(p, stats))
    # Eager for one of them: there the shardings go from operation to operation.
    wanda, flap = (jax.jit(both) if name == "conv" else both)(sharded)
    for got, expected in ((wanda, scores()["wanda"]), (flap, scores()["flap"])):
        np.testing.assert_allclose(
            got[name]["kernel"], expected[name]["kernel"], rtol=1e-5
        )
    for got in (wanda, flap):
        assert got[name]["kernel"].sharding.is_equivalent_to(w.sharding, w.ndim)


# Bad input.


def test_statistics_of_another_model_are_refused():
    params, stats, _ = model(("dense",))
    wider = {
        "dense": {
            "kernel": np.ones((8, 17), np.float32),
            "bias": np.ones(4, np.float32),
        }
    }
    with pytest.raises(ValueError, match=r"dense/kernel: .* \(8, 16\), which has"):
        js.scores.wanda(wider, stats)
    cut = jax.tree.map(
        lambda x: np.asarray(x)[..., :-1], stats.inputs["()"]._replace(count=None)
    )
    short = js.calibration.Statistics({"()": cut}, stats.kernels)
    with pytest.raises(ValueError, match=r"dense/kernel: statistics of shape \(7,\)"):
        js.scores.flap(params, short)


def test_gradients_that_are_not_summed_over_examples_are_refused():
    params, stats, grads = model(("dense",))
    with pytest.raises(ValueError, match=r"dense/kernel: .*\(5, 8, 16\).*sums over"):
        js.scores.gradient_norm(params, grads)
    with pytest.raises(ValueError, match=r"dense/kernel: .*\(5, 8, 16\).*sums over"):
        js.scores.gblm(params, stats, grads)


@pytest.mark.parametrize("alpha", [-1.0, float("nan")])
def test_a_bad_alpha_is_refused(alpha):
    params, stats, grads = model(("dense",))
    norms = js.calibration.gradient_norms(grads, order=1)
    with pytest.raises(ValueError, match="alpha must be"):
        js.scores.gblm(params, stats, norms, alpha=alpha)


def test_compensation_refuses_what_does_not_fit():
    w, mean = np.ones((3, 4), np.float32), np.ones(4, np.float32)
    with pytest.raises(ValueError, match=r"has a mean of shape \(4,\)"):
        js.scores.bias_compensation(w, mean[:3], np.ones(4, bool))
    with pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
        js.scores.bias_compensation(w, mean, np.ones(3, bool))
    with pytest.raises(TypeError, match="bools"):
        js.scores.bias_compensation(w, mean, np.ones(4))
