"""What every public score, pattern and allocation keeps. A new one is a new row."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js

SHAPES = {
    "a": {"kernel": (16, 16), "bias": (16,)},
    "b": {"kernel": (16, 16), "bias": (16,)},
}
KERNELS = ("a", "b")


def model(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda s: draw(s).astype(dtype), SHAPES, is_leaf=is_shape)


def mixed_model():
    """One kernel in each type, so that one compilation tests both."""
    return model() | {"b": model("bfloat16")["b"]}


def apply(params, x):
    for layer, bias in ((params[k]["kernel"], params[k]["bias"]) for k in KERNELS):
        x = jax.nn.relu(x @ layer + bias[None])
    return x


def batch(params):
    return jnp.linspace(-1, 1, 32, dtype=params["a"]["bias"].dtype).reshape(2, 16)


def loss(params, x):
    return jnp.mean((apply(params, x) - 1) ** 2)


def with_grads(score):
    return lambda params, key: score(params, jax.grad(loss)(params, batch(params)))


def averaged(params, key):
    grads = jax.grad(loss)(params, batch(params))
    score = js.scores.moving_average(js.scores.taylor)
    state = score.update(grads, score.init(params), params)
    return score.score(params, grads, state)


def second_order(score, make_fisher):
    """By a Fisher matrix of all parameters, from two gradients."""

    def scored(params, key):
        grads = js.curvature.per_example_grads(loss, params, batch(params), where=".")
        inverse = js.curvature.inverse_diagonal(make_fisher(grads, damping=1e-3))
        if score is js.scores.obd:
            inverse = jax.tree.map(jnp.reciprocal, inverse)
        return score(params, inverse, where=".")

    return scored


SCORES = {
    "magnitude": lambda params, key: js.scores.magnitude(params),
    "random": lambda params, key: js.scores.random(params, key=key),
    "taylor": with_grads(js.scores.taylor),
    "snip": with_grads(js.scores.snip),
    "grasp": lambda params, key: js.scores.grasp(loss, params, batch(params)),
    "synflow": lambda params, key: js.scores.synflow(apply, params, batch(params)),
    "moving_average": averaged,
    "obd": second_order(js.scores.obd, js.curvature.diagonal_fisher),
    "obs": second_order(
        js.scores.obs, functools.partial(js.curvature.block_fisher, block_size=8)
    ),
}


def statistics(params):
    """The inputs of both kernels."""
    view = js.tree.matrix_view((16, 16), js.Axes((0,), (1,)))
    inputs, x = {}, batch(params)
    for k in KERNELS:
        state = js.calibration.init((), 16, gram=False)
        inputs[k] = js.calibration.finalize(js.calibration.update(state, x))
        x = jax.nn.relu(x @ params[k]["kernel"] + params[k]["bias"][None])
    kernels = tuple((f"{k}/kernel", k, view) for k in KERNELS)
    return js.calibration.Statistics(inputs, kernels)


def key_of_path(path):
    (key,) = jax.tree.leaves(js.tree.keys_like(jax.random.key(0), {path: 0}))
    return key


def with_norms(score):
    def scored(params, key):
        grads = js.curvature.per_example_grads(loss, params, batch(params), where=".")
        norms = js.calibration.gradient_norms(grads, order=1)
        return score(params, statistics(params), norms)

    return scored


# Biases and, by FLAP, channels of constant inputs score 0; so kernels alone are given.
def of_kernels(scored):
    def full(params, key):
        scores = scored(params, key)
        fill = lambda s, w: s if w.ndim > 1 else jnp.abs(w)
        return jax.tree.map(fill, scores, params)

    return full


SCORES |= {
    "wanda": of_kernels(
        lambda params, key: js.scores.wanda(params, statistics(params))
    ),
    "flap": of_kernels(lambda params, key: js.scores.flap(params, statistics(params))),
    "gblm": of_kernels(with_norms(js.scores.gblm)),
    "gradient_norm": with_norms(
        lambda params, _, norms: js.scores.gradient_norm(params, norms)
    ),
}
RANDOM = {"random"}
PATTERNS = {
    "layer": js.Unstructured(),
    "global": js.Unstructured("global"),
    "output": js.Unstructured("output"),
    "nm": js.NM(2, 4),
    "block": js.Block((4, 4)),
    "block, global": js.Block((4, 4), reduce="max", scope="global"),
    "balanced": js.Balanced((2, 8)),
    "channel": js.Channel(),
    "channel, global": js.Channel(axis=0, scope="global"),
}
ALLOCATIONS = {
    "uniform": js.allocations.uniform,
    "erk": js.allocations.erk,
    "from_global_scores": lambda params, s: js.allocations.from_global_scores(
        js.scores.magnitude(params), s
    ),
    "round_to_weights": lambda params, s: js.allocations.round_to_weights(
        params, js.allocations.erk(params, s)
    ),
}
ALLOCATIONS |= {
    "owl": lambda params, s: js.allocations.owl(js.scores.magnitude(params), s),
    "dsa": lambda params, s: js.allocations.dsa(js.scores.magnitude(params), s),
    "als": lambda params, s: js.contrib.als(
        params, {"a/kernel": 0.1, "b/kernel": 0.2}, s, lower=s / 2, upper=(1 + s) / 2
    ),
    "arithmetic_progression": functools.partial(
        js.allocations.arithmetic_progression, difference=0.1
    ),
    "ecoflap": lambda params, s: js.allocations.ecoflap(
        loss, params, [batch(params)], s, key=jax.random.key(0)
    ),
    "evolve": lambda params, s: {
        k: {"kernel": v, "bias": 0.0}
        for k, v in (
            js.allocations.evolve(
                lambda levels, batch: levels["a"] ** 2,
                dict.fromkeys(KERNELS, 256),
                s,
                batches=[0],
                key=jax.random.key(0),
                step=4,
                generations=2,
                offspring=4,
                stages=((1, 1),),
            )
            if s
            else dict.fromkeys(KERNELS, 0.0)
        ).items()
    },
}
OF_KERNELS = {"wanda", "flap", "gblm"}


def inputs_of_size(size):
    """Statistics of a kernel [8, 4] whose inputs have a mean square and a variance."""
    view = js.tree.matrix_view((8, 4), js.Axes((0,), (1,)))
    state = js.calibration.init((), 8, gram=False)
    known = js.calibration.finalize(js.calibration.update(state, size[None]))
    known = known._replace(variance=known.square)
    return js.calibration.Statistics({"x": known}, (("kernel", "x", view),))


def tiny_average(w, g):
    score = js.scores.moving_average(js.scores.taylor, decay=0.5)
    state = score.update({"w": g}, score.init({"w": w}), {"w": w})
    return score.score({"w": w}, None, state)["w"]


# Linear and quadratic: then gradients and second derivatives are what is given.
TINY_INPUTS = np.linspace(1, 3, 8, dtype=np.float32)
TINY = {
    "magnitude": lambda w, g: (
        js.scores.magnitude({"w": w})["w"],
        lambda w, g: np.abs(w),
    ),
    "random": lambda w, g: (
        js.scores.random({"w": w}, key=jax.random.key(0))["w"],
        lambda w, g: np.asarray(jax.random.uniform(key_of_path("w"), (8, 4))),
    ),
    "taylor": lambda w, g: (
        js.scores.taylor({"w": w}, {"w": g})["w"],
        lambda w, g: np.abs(w * g),
    ),
    "snip": lambda w, g: (
        js.scores.snip({"w": w}, {"w": g}, where=".")["w"],
        lambda w, g: np.abs(w * g),
    ),
    "moving_average": lambda w, g: (tiny_average(w, g), lambda w, g: np.abs(w * g)),
    "grasp": lambda w, g: (
        js.scores.grasp(
            lambda p, b: jnp.sum(p["w"] * b) + jnp.sum(jnp.square(p["w"])) / 2,
            {"w": w},
            g,
        )["w"],
        lambda w, g: w * (w + g),
    ),
    "synflow": lambda w, g: (
        js.scores.synflow(
            lambda p, x: jnp.sum(p["w"] * p["g"], axis=1, keepdims=True) * x,
            {"w": w, "g": g},
            jnp.zeros((1, 1), w.dtype),
        )["w"],
        lambda w, g: w * g,
    ),
    "obd": lambda w, g: (
        js.scores.obd({"w": w}, {"w": g}, where=".")["w"],
        lambda w, g: w * w * g,
    ),
    "obs": lambda w, g: (
        js.scores.obs({"w": w}, {"w": 1e-3 / g.astype(jnp.float32)}, where=".")["w"],
        lambda w, g: w * w * g,
    ),
    "wanda": lambda w, g: (
        js.scores.wanda({"kernel": w}, inputs_of_size(TINY_INPUTS))["kernel"],
        lambda w, g: w * TINY_INPUTS[:, None],
    ),
    "flap": lambda w, g: (
        js.scores.flap({"kernel": w}, inputs_of_size(TINY_INPUTS))["kernel"],
        lambda w, g: np.broadcast_to(
            (np.square(w) * np.square(TINY_INPUTS)[:, None]).sum(1, keepdims=True),
            w.shape,
        ),
    ),
    "gblm": lambda w, g: (
        js.scores.gblm({"kernel": w}, inputs_of_size(TINY_INPUTS), {"kernel": g})[
            "kernel"
        ],
        lambda w, g: w * (TINY_INPUTS[:, None] + 100 * g),
    ),
    "gradient_norm": lambda w, g: (
        js.scores.gradient_norm({"w": w}, {"w": g})["w"],
        lambda w, g: w * g,
    ),
}
every_score = pytest.mark.parametrize("name", SCORES)
every_pattern = pytest.mark.parametrize("name", PATTERNS)
every_allocation = pytest.mark.parametrize("name", ALLOCATIONS)
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@functools.cache
def jitted_score(name):
    return jax.jit(SCORES[name])


@functools.partial(jax.jit, static_argnames="pattern")
def jitted_prune(params, sparsity, pattern):
    return js.prune(params, sparsity, pattern=pattern)


def assert_same_kind(tree, like):
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    for got, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def differ(tree, other):
    return any(
        (x != y).any()
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


def functions_of(package):
    every = vars(package).items()
    return {k for k, f in every if inspect.isfunction(f) and not k.startswith("_")}


# Scores.


@every_score
@both_dtypes
def test_scores_keep_structure_and_shapes_in_float32_at_least(name, dtype, getkey):
    params = model(dtype)
    # A magnitude is exact in its own type.
    like = params if name == "magnitude" else model()
    scores = jitted_score(name)(params, getkey())
    if name in OF_KERNELS:  # the rest is filled in by this file
        scores = {k: {"kernel": scores[k]["kernel"]} for k in KERNELS}
        like = {k: {"kernel": like[k]["kernel"]} for k in KERNELS}
    assert_same_kind(scores, like)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e5m2", "float32"])
def test_scores_of_tiny_values_have_the_order_of_the_true_ones(name, dtype):
    """No two are equal that are not, and none is 0: pruning would go by index."""
    rng = np.random.default_rng(0)
    of_type = lambda x: np.asarray(x, dtype)
    # From the smallest normal number of the type, times an eighth more each, shuffled.
    least = max(float(jnp.finfo(dtype).smallest_normal), 1e-25)
    draw = lambda: of_type(least * 2.0 ** (rng.permutation(32).reshape(8, 4) // 4))
    w, g = draw(), draw()
    found, expected = TINY[name](jnp.asarray(w), jnp.asarray(g))
    found = np.asarray(jnp.ravel(found), np.float64)
    exact = expected(w.astype(np.float64), g.astype(np.float64)).ravel()
    order = np.argsort(exact, kind="stable")
    steps = np.diff(exact[order]) > 1e-3 * np.abs(exact[order][1:])
    assert steps.any()
    assert (found != 0).all()
    assert (np.diff(found[order])[steps] > 0).all()


@every_score
def test_scores_are_the_same_eager_and_jitted(name, getkey):
    params, key = model(), getkey()
    eager, jitted = SCORES[name](params, key), jitted_score(name)(params, key)
    for got, expected in zip(
        jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True
    ):
        # Fused sums round otherwise, by a part of their largest term.
        atol = 1e-6 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)


@every_score
def test_eager_scores_do_not_compile_again_for_other_values(name, getkey, compilations):
    SCORES[name](model(), getkey())
    with compilations() as second:
        SCORES[name](model(seed=1), getkey())
    assert second.names == []


@every_score
def test_scores_lie_where_their_parameters_do(name, getkey):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = jax.device_put(model(), NamedSharding(mesh, P("x")))
    scores = SCORES[name](params, getkey())
    for score, w in zip(jax.tree.leaves(scores), jax.tree.leaves(params), strict=True):
        assert score.sharding.is_equivalent_to(w.sharding, w.ndim)


@every_score
def test_scores_depend_on_the_key_if_they_are_random_and_on_nothing_else(name, getkey):
    params, key, other = model(), getkey(), getkey()
    score = jitted_score(name)
    assert_same(score(params, key), score(params, key))
    assert differ(score(params, key), score(params, other)) == (name in RANDOM)


@every_score
def test_scores_are_numbers_and_not_all_equal(name, getkey):
    for leaf in jax.tree.leaves(jitted_score(name)(model(), getkey()), is_leaf=None):
        assert jnp.isfinite(leaf).all()
        assert leaf.min() < leaf.max()


# Patterns.


@every_pattern
def test_pruning_keeps_structure_shapes_and_dtypes(name):
    params = mixed_model()
    pruned, masks = jitted_prune(params, 0.5, PATTERNS[name])
    assert_same_kind(pruned, params)
    js.patterns.check_masks(masks, params)


@every_pattern
def test_the_count_is_exact_and_the_pattern_is_obeyed(name):
    params = mixed_model()
    pruned, masks = jitted_prune(params, 0.5, PATTERNS[name])
    js.patterns.verify(masks, params, pattern=PATTERNS[name])
    assert sum(int((pruned[k]["kernel"] != 0).sum()) for k in KERNELS) == 256


@every_pattern
def test_pruning_is_the_same_eager_and_jitted(name):
    params = mixed_model()
    eager = js.prune(params, 0.5, pattern=PATTERNS[name])
    assert_same(eager, jitted_prune(params, 0.5, PATTERNS[name]))


@every_pattern
def test_eager_pruning_does_not_compile_again_for_another_sparsity(name, compilations):
    js.prune(model(), 0.25, pattern=PATTERNS[name])
    with compilations() as second:
        js.prune(model(seed=1), 0.5, pattern=PATTERNS[name])
    assert second.names == []


@every_pattern
def test_what_is_not_selected_stays_bit_for_bit(name):
    params = model()
    odd = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42] * 4)
    params["b"]["bias"] = odd
    pruned = js.prune(params, 0.5, pattern=PATTERNS[name]).params
    bits = lambda x: np.asarray(x).view(np.uint32).tolist()
    assert bits(pruned["b"]["bias"]) == bits(odd)
    assert bits(pruned["a"]["bias"]) == bits(params["a"]["bias"])


@every_pattern
def test_what_is_kept_stays_bit_for_bit(name):
    params = mixed_model()
    pruned, masks = jitted_prune(params, 0.5, PATTERNS[name])
    for k in KERNELS:
        expected = np.where(masks[k]["kernel"], params[k]["kernel"], 0)
        np.testing.assert_array_equal(pruned[k]["kernel"], expected)


def test_parameters_of_equal_shape_share_one_compilation(compilations):
    # Of a shape that no other test has.
    params = {f"layer_{i}": jnp.ones((5, 17)) for i in range(4)}
    with compilations() as once:
        js.patterns.masks({"layer_0": params["layer_0"]}, 0.5)
    with compilations() as all_four:
        js.patterns.masks(params, 0.5)
    assert once.of("_mask_one") == 1
    assert all_four.of("_mask_one") == 0


def test_fisher_matrices_of_equal_shape_share_one_compilation(compilations):
    params = {f"layer_{i}": jnp.ones((7, 13)) for i in range(3)}
    grads = jax.tree.map(lambda w: jnp.stack([w, -w]), params)
    with compilations() as all_three:
        fisher = js.curvature.block_fisher(grads, block_size=13, damping=1.0)
        js.solvers.obs(params, fisher, 0.5)
    found = {"sum_up", "block_eliminate"}
    assert {name: all_three.of(name) for name in found} == dict.fromkeys(found, 1)


# Allocations.


@every_allocation
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_allocations_are_numbers_for_every_parameter(name, sparsity):
    found = ALLOCATIONS[name](model(), sparsity)
    assert jax.tree.structure(found) == jax.tree.structure(model())
    assert all(type(s) is float and 0 <= s < 1 for s in jax.tree.leaves(found))
    assert [found[k]["bias"] for k in KERNELS] == [0.0, 0.0]


@every_allocation
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_allocations_meet_the_total(name, sparsity):
    params = model()
    found = ALLOCATIONS[name](params, sparsity)
    removed = sum(found[k]["kernel"] * params[k]["kernel"].size for k in KERNELS)
    # In whole weights where weights are counted, exactly where they are not.
    slack = 0.5 if name not in ("uniform", "erk") else 1e-9
    assert abs(removed - sparsity * 512) <= slack


@every_allocation
def test_allocations_can_be_pruned_by(name):
    found = ALLOCATIONS[name](model(), 0.75)
    masks = js.prune(model(), found).masks
    assert sum(int(masks[k]["kernel"].sum()) for k in KERNELS) == 128


# The table itself.


def test_every_public_score_and_allocation_has_a_row():
    helpers = {"as_score", "bias_compensation"}
    assert functions_of(js.scores) - helpers == set(SCORES) == set(TINY)
    allocations = functions_of(js.allocations) | {"als"}  # that is in contrib
    measures = {"level_sparsities", "sensitivity"}  # what allocations are made from
    assert allocations - measures == set(ALLOCATIONS)
    kinds = {type(p) for p in PATTERNS.values()}
    assert kinds == set(js.patterns.Pattern.__args__)
