"""What `js.solvers.obs` keeps, whatever the Fisher matrix: counts, types, places."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import selection
from solvers import problems

import jaxsparse as js

KERNELS = problems.KERNELS
PATTERNS = {
    "layer": js.Unstructured(),
    "global": js.Unstructured("global"),
    "output": js.Unstructured("output"),
    "nm": js.NM(2, 4),
    "column of 4": js.Block((4, 1)),
    "tile": js.Block((2, 2)),
    "tile, global": js.Block((2, 2), scope="global"),
    "tile, balanced": js.Balanced((2, 2)),
    "channel": js.Channel(),
    "channel, global": js.Channel(axis=0, scope="global"),
}
every_pattern = pytest.mark.parametrize("name", PATTERNS)


@functools.cache
def fisher_of(name="layer", dtype="float32", seed=0):
    """Made once for all tests: factorisations are most of their time."""
    return js.curvature.block_fisher(
        problems.grads(seed, dtype),
        block_size=problems.BLOCK,
        damping=problems.DAMPING,
        pattern=PATTERNS[name],
    )


@functools.cache
def other_fisher(kind):
    make = {
        "mfac": js.curvature.mfac,
        "mfac, blocks": functools.partial(js.curvature.mfac, block_size=problems.BLOCK),
        "diagonal": js.curvature.diagonal_fisher,
        "kronecker": js.curvature.kronecker_fisher,
    }
    return make[kind](problems.grads(), damping=problems.DAMPING)


def full(masks, like):
    return {
        k: np.broadcast_to(masks[k]["kernel"], like[k]["kernel"].shape) for k in KERNELS
    }


def bits(x):
    return np.asarray(x).tobytes()


def kept(mask):
    return int(np.asarray(mask).sum())


def assert_pruned(pruned, params, *, removed, pattern=PATTERNS["layer"]):
    """The count in both kernels, exact zeros, the pattern, and nothing else touched."""
    js.patterns.verify(pruned.masks, params, pattern=pattern)
    kept = full(pruned.masks, params)
    assert sum(int((~kept[k]).sum()) for k in KERNELS) == removed
    for k in KERNELS:
        kernel, before = np.asarray(pruned.params[k]["kernel"]), params[k]["kernel"]
        assert (kernel.shape, kernel.dtype) == (before.shape, before.dtype)
        assert not np.signbit(kernel[~kept[k]].astype(np.float32)).any()
        np.testing.assert_array_equal(kernel != 0, kept[k])
        assert pruned.masks[k]["bias"].shape == ()
        assert bits(pruned.params[k]["bias"]) == bits(params[k]["bias"])


# Counts.


@every_pattern
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_the_count_is_exact_zeros_are_zero_and_the_rest_is_not_touched(name, sparsity):
    pattern = PATTERNS[name]
    params = problems.params()
    params["b"]["bias"] = np.array([np.nan, -0.0, np.inf, 1e-42] * 2, "float32")
    pruned = js.solvers.obs(params, fisher_of(name), sparsity, pattern=pattern)
    one = np.zeros(problems.SHAPE)
    like = (
        selection.global_masks([one, one], sparsity, pattern)
        if getattr(pattern, "scope", "") == "global"
        else [selection.mask(one, sparsity, pattern)] * 2
    )
    obeyed = js.NM(3, 4) if (name, sparsity) == ("nm", 0.3) else pattern
    assert_pruned(pruned, params, removed=sum((~m).sum() for m in like), pattern=obeyed)


def test_every_kernel_may_have_its_own_sparsity():
    params = problems.params()
    sparsities = js.allocations.uniform(params, 0.5, exceptions={"a": 0.25})
    pruned = js.solvers.obs(params, fisher_of(), sparsities, steps=2)
    assert [kept(pruned.masks[k]["kernel"]) for k in KERNELS] == [72, 24]


@pytest.mark.parametrize("kind", ["mfac", "mfac, blocks", "diagonal", "kronecker"])
@pytest.mark.parametrize("name", ["layer", "tile"])
def test_the_other_approximations_count_as_well(kind, name):
    params, pattern = problems.params(), PATTERNS[name]
    update = "independent" if kind == "kronecker" else "joint"
    pruned = js.solvers.obs(
        params, other_fisher(kind), 0.5, pattern=pattern, update=update, steps=2
    )
    assert_pruned(pruned, params, removed=96, pattern=pattern)


@pytest.mark.parametrize("update", ["joint", "independent", "none"])
def test_bf16_in_bf16_out(update):
    params = problems.params(dtype="bfloat16")
    for name in ("layer", "column of 4"):
        pattern = PATTERNS[name]
        pruned = js.solvers.obs(
            params, fisher_of(name), 0.5, pattern=pattern, update=update
        )
        assert_pruned(pruned, params, removed=96, pattern=pattern)


def test_the_order_of_bf16_weights_is_that_of_their_scores_in_float32():
    params = problems.params(dtype="bfloat16")
    wide = jax.tree.map(lambda w: np.asarray(w, np.float32), params)
    masks = [js.solvers.obs(p, fisher_of(), 0.5).masks for p in (params, wide)]
    jax.tree.map(np.testing.assert_array_equal, *masks)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(("sparsity", "kept"), [(None, 2), (0.5, 2), (0.25, 3)])
def test_nm_keeps_as_many_of_every_group(greedy, sparsity, kept):
    params = problems.params()
    pruned = js.solvers.obs(
        params, fisher_of("nm"), sparsity, pattern=js.NM(2, 4), greedy=greedy
    )
    for k in KERNELS:
        groups = np.asarray(pruned.masks[k]["kernel"]).T.reshape(-1, 4)
        assert set(groups.sum(1)) == {kept}
        np.testing.assert_array_equal(
            np.asarray(pruned.params[k]["kernel"]) != 0, pruned.masks[k]["kernel"]
        )


def test_a_state_of_nnx_with_dropout_is_pruned():
    class Net(nnx.Module):
        def __init__(self, rngs):
            kernel = lambda *_: problems.params()["a"]["kernel"]
            self.linear = nnx.Linear(12, 8, kernel_init=kernel, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    net = Net(nnx.Rngs(0))
    state = nnx.state(net)
    keep = lambda path, w: w if path.endswith("kernel") else None
    kernels = js.tree.map_with_path(keep, state)
    grads = jax.tree.map(lambda _: problems.grads()["a"]["kernel"], kernels)
    fisher = js.curvature.mfac(grads, damping=1.0)
    nnx.update(net, js.solvers.obs(state, fisher, 0.5).params)
    assert (np.asarray(net.linear.kernel[...]) == 0).sum() == 48


# What takes no part.


def test_a_wider_fisher_matrix_does_not_move_what_is_not_selected():
    params = problems.params()
    grads = problems.grads(biases=True)
    fisher = js.curvature.mfac(grads, damping=problems.DAMPING)
    pruned = {
        update: js.solvers.obs(params, fisher, 0.5, where="a/kernel", update=update)
        for update in ("joint", "independent")
    }
    for got in pruned.values():
        assert bits(got.params["b"]["kernel"]) == bits(params["b"]["kernel"])
        assert bits(got.params["a"]["bias"]) == bits(params["a"]["bias"])
    # And it is the best change without them: that of a matrix that never knew them.
    alone = {k: {"kernel": None, "bias": None} for k in KERNELS}
    alone["a"]["kernel"] = grads["a"]["kernel"]
    narrow = js.curvature.mfac(alone, damping=problems.DAMPING)
    got, masks = pruned["joint"]
    removed = jax.tree.map(
        lambda m, w: jnp.asarray(np.broadcast_to(~np.asarray(m), w.shape)),
        masks,
        params,
    )
    change = js.curvature.eliminate(narrow, params, removed)["a"]["kernel"]
    np.testing.assert_allclose(
        got["a"]["kernel"],
        params["a"]["kernel"] + np.asarray(change),
        atol=1e-5 * np.abs(change).max(),
    )


def test_where_looks_at_the_parameters_and_not_at_their_scores():
    params = problems.params()
    params["a"] = problems.params(dtype="bfloat16")["a"]
    coarse = lambda path, w: w.dtype == jnp.bfloat16 and w.ndim == 2
    masks = js.solvers.obs(params, fisher_of(), 0.5, where=coarse).masks
    assert kept(masks["a"]["kernel"]) == 48
    assert masks["b"]["kernel"].shape == ()


# Masks that are there already.


@every_pattern
def test_what_was_pruned_stays_pruned_and_counts(name):
    params, pattern = problems.params(), PATTERNS[name]
    fisher = fisher_of(name)
    before = js.prune(params, 0.25, pattern=pattern).masks
    for steps in (1, 2):
        pruned = js.solvers.obs(
            params, fisher, 0.5, pattern=pattern, masks=before, steps=steps
        )
        assert_pruned(pruned, params, removed=96, pattern=pattern)
        old, new = full(before, params), full(pruned.masks, params)
        assert not any((new[k] & ~old[k]).any() for k in KERNELS)


def test_to_prune_again_to_the_same_sparsity_changes_nothing():
    params = problems.params()
    once = js.solvers.obs(params, fisher_of(), 0.32)  # 30.72 of 96, so 31
    again = js.solvers.obs(once.params, fisher_of(), 0.32, masks=once.masks, steps=3)
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_units_that_lost_a_part_of_their_weights_compete_with_the_others():
    """Not first to go, as their number of zeros says nothing."""
    params = problems.params()
    kernel = np.array(params["a"]["kernel"])
    kernel[:, 0] *= 100
    mask = np.ones(kernel.shape, bool)
    mask[0, 0] = False
    params["a"]["kernel"] = jnp.asarray(kernel)
    masks = jax.tree.map(lambda w: jnp.asarray(np.ones(w.shape, bool)), params)
    masks["a"]["kernel"] = jnp.asarray(mask)
    for name in ("channel", "column of 4"):
        pattern = PATTERNS[name]
        pruned = js.solvers.obs(
            params, fisher_of(name), 0.25, pattern=pattern, masks=masks
        )
        kept, new = (np.asarray(tree["a"]["kernel"]) for tree in pruned[::-1])
        assert kept[4:, 0].all()
        assert not kept[0, 0]
        assert new[0, 0] == 0


def test_channels_of_different_sizes_are_counted_as_channels():
    """7 of 16 are gone, but 75 % of the weights."""
    rng = np.random.default_rng(0)
    shapes = {"small": (2, 8), "large": problems.SHAPE}
    draw = lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    params = {k: draw(s) for k, s in shapes.items()}
    grads = {k: draw((problems.M, *s)) for k, s in shapes.items()}
    fisher = js.curvature.diagonal_fisher(grads, damping=1e-3)
    pattern = js.Channel(scope="global")
    masks = {
        "small": jnp.asarray(np.ones((1, 8), bool)),
        "large": jnp.asarray(np.arange(8).reshape(1, 8) >= 7),
    }
    count = lambda masks: sum(map(kept, jax.tree.leaves(masks)))
    seen = []
    refresh = lambda params, masks: seen.append(count(masks)) or fisher
    pruned = js.solvers.obs(
        params, fisher, 0.75, pattern=pattern, masks=masks, steps=2, refresh=refresh
    )
    assert (count(masks), *seen, count(pruned.masks)) == (9, 6, 4)


@pytest.mark.parametrize("name", ["layer", "global", "nm", "tile", "channel"])
def test_masks_that_remove_more_than_asked_for_are_refused(name):
    params, pattern = problems.params(), PATTERNS[name]
    before = js.prune(params, 0.5, pattern=pattern).masks
    with pytest.raises(ValueError, match=r"a/kernel: `masks` already remove more than"):
        js.solvers.obs(params, fisher_of(name), 0.25, pattern=pattern, masks=before)


def test_a_single_column_that_has_lost_too_many_is_refused():
    params = problems.params()
    before = js.prune(params, 0.5).masks
    with pytest.raises(ValueError, match="in one of its groups"):
        js.solvers.obs(
            params, fisher_of(), 0.5, pattern=PATTERNS["output"], masks=before
        )


# Steps.


def test_refresh_sees_the_pruned_network_before_every_cut_but_the_first():
    params, seen = problems.params(), []

    def refresh(params, masks):
        kept = full(masks, params)
        for k in KERNELS:
            np.testing.assert_array_equal(np.asarray(params[k]["kernel"]) != 0, kept[k])
        seen.append(sum(int(kept[k].sum()) for k in KERNELS))
        return fisher_of()

    js.solvers.obs(params, fisher_of(), 15 / 16, steps=4, refresh=refresh)
    assert seen == [96, 48, 24]  # of 192; then 12
    js.solvers.obs(params, fisher_of(), 0.5, refresh=refresh)
    assert len(seen) == 3


def test_steps_go_on_from_the_density_that_is_there():
    params, seen = problems.params(), []

    def refresh(params, masks):
        seen.append(kept(masks["a"]["kernel"]))
        return fisher_of()

    half = js.prune(params, 0.5)
    js.solvers.obs(
        half.params, fisher_of(), 7 / 8, masks=half.masks, steps=2, refresh=refresh
    )
    assert seen == [24]  # 48, 24, 12


def test_fresh_gradients_count():
    params = problems.params()
    other = js.solvers.obs(
        params, fisher_of(), 0.6, steps=2, refresh=lambda p, m: fisher_of(seed=7)
    )
    same = js.solvers.obs(
        params, fisher_of(), 0.6, steps=2, refresh=lambda p, m: fisher_of()
    )
    without = js.solvers.obs(params, fisher_of(), 0.6, steps=2)
    jax.tree.map(np.testing.assert_array_equal, same, without)
    kept, fresh = (np.asarray(x.masks["a"]["kernel"]) for x in (same, other))
    assert (kept != fresh).any()


@pytest.mark.parametrize("kind", ["block", "mfac"])
def test_without_refresh_a_step_is_a_call_with_what_is_left_of_the_matrix(kind):
    params = problems.params()
    fisher = fisher_of() if kind == "block" else other_fisher(kind)
    both = js.solvers.obs(params, fisher, 0.75, steps=2)
    first = js.solvers.obs(params, fisher, 0.5)
    left = js.curvature.restrict(fisher, first.masks)
    second = js.solvers.obs(first.params, left, 0.75, masks=first.masks)
    for got, expected in zip(
        jax.tree.leaves(both), jax.tree.leaves(second), strict=True
    ):
        # The second call takes out again what is out: rounding, no more.
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# Eager, jitted, sharded.


def test_tiles_of_all_kernels_are_the_same_under_jit():
    """All that has one scope is in `contracts`."""
    params, fisher = problems.params(), fisher_of("tile, global")
    call = functools.partial(
        js.solvers.obs, sparsity=0.5, pattern=PATTERNS["tile, global"]
    )
    eager, jitted = call(params, fisher), jax.jit(call)(params, fisher)
    jax.tree.map(np.testing.assert_array_equal, jitted.masks, eager.masks)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jitted.params, eager.params)


def test_masks_and_the_sparsity_may_be_traced_too():
    params, fisher = problems.params(), other_fisher("diagonal")
    before = js.prune(params, 0.25).masks
    call = lambda masks, s: js.solvers.obs(params, fisher, s, masks=masks, steps=2)
    jitted, eager = jax.jit(call)(before, 0.9), call(before, 0.9)
    jax.tree.map(np.testing.assert_array_equal, jitted.masks, eager.masks)


@pytest.mark.parametrize(("name", "greedy"), [("layer", True), ("tile", False)])
def test_many_devices_give_the_masks_of_one(name, greedy):
    """Here the inputs are cut too, and tiles; `contracts` cuts the outputs alone."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    pattern = PATTERNS[name]
    call = functools.partial(
        js.solvers.obs, sparsity=0.5, pattern=pattern, greedy=greedy
    )
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    params, grads = problems.params(), problems.grads()
    spread = jax.tree.map(lambda w: put(w, *("x", "y")[-w.ndim :]), params)
    fisher = js.curvature.block_fisher(
        jax.tree.map(lambda g: put(g, None, "x", "y"), grads),
        block_size=problems.BLOCK,
        damping=problems.DAMPING,
        pattern=pattern,
    )
    one, many = call(params, fisher_of(name)), call(spread, fisher)
    jax.tree.map(np.testing.assert_array_equal, many.masks, one.masks)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, many.params, one.params)
    score = js.curvature.greedy_scores if greedy else js.curvature.group_scores
    jax.tree.map(close, score(fisher, spread), score(fisher_of(name), params))
    for w, before in zip(
        jax.tree.leaves(many.params), jax.tree.leaves(spread), strict=True
    ):
        assert w.sharding.is_equivalent_to(before.sharding, w.ndim)


# Errors.


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
        js.solvers.obs(*args, **kwargs)


def test_a_fisher_matrix_made_with_another_where():
    only_a = {k: dict(v) for k, v in problems.grads().items()}
    only_a["b"]["kernel"] = None
    fisher = js.curvature.mfac(only_a, damping=1e-3)
    refused(
        ValueError,
        r"b/kernel: selected by `where`.*with the same `where`",
        problems.params(),
        fisher,
        0.5,
    )


@pytest.mark.parametrize(
    ("made_for", "pattern", "greedy"),
    [
        ("layer", js.Block((4, 1)), False),
        ("column of 4", js.Block((2, 2)), False),  # as many weights, but others
        ("layer", js.NM(2, 4), True),
    ],
)
def test_a_fisher_matrix_made_for_other_units(made_for, pattern, greedy):
    refused(
        ValueError,
        r"a/kernel: the Fisher matrix was made for units of .*Make it with",
        problems.params(),
        fisher_of(made_for),
        0.5,
        pattern=pattern,
        greedy=greedy,
    )


def test_blocks_that_cut_units():
    refused(
        ValueError,
        "Choose a block_size that 8 divides",
        problems.params(),
        fisher_of(),
        0.5,
        pattern=js.Block((4, 2)),
    )


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("mfac", {"greedy": True}, "greedy=True works inside the blocks"),
        ("kronecker", {}, "has no joint update"),
    ],
)
def test_an_approximation_that_cannot_do_it(kind, options, match):
    refused(TypeError, match, problems.params(), other_fisher(kind), 0.5, **options)


def test_greedy_channels():
    refused(
        TypeError,
        "js.Unstructured and js.NM",
        problems.params(),
        fisher_of(),
        0.5,
        pattern=js.Channel(),
        greedy=True,
    )


def test_no_fisher_matrix_but_gradients():
    refused(TypeError, "block_fisher, mfac", problems.params(), problems.grads(), 0.5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"update": "x"}, ValueError, "update must be one of .*'x'"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"sparsity": None}, ValueError, "needs a sparsity"),
        ({"sparsity": 1.0}, ValueError, r"sparsity must lie in \[0, 1\)"),
        ({"sparsity": 90, "steps": 2}, ValueError, "For 90 % write 0.9"),
        ({"sparsity": 0.75, "pattern": js.NM(2, 4)}, ValueError, "at most 2 of 4"),
        ({"where": "kernal"}, ValueError, "matches none"),
        ({"masks": {"a": jnp.ones((), bool)}}, ValueError, "masks must have exactly"),
    ],
)
def test_options_out_of_range(options, error, match):
    options = {"sparsity": 0.5} | options
    refused(error, match, problems.params(), fisher_of(), **options)


def test_masks_of_another_shape():
    params = problems.params()
    masks = jax.tree.map(lambda w: jnp.ones((), bool), params)
    masks["a"]["kernel"] = np.ones((8, 12), bool)
    refused(
        ValueError, "a/kernel: a mask of shape", params, fisher_of(), 0.5, masks=masks
    )


def test_a_fisher_matrix_of_another_shape():
    params = problems.params()
    params["a"]["kernel"] = np.asarray(params["a"]["kernel"])[:8]
    refused(ValueError, "a/kernel: .*another model", params, fisher_of(), 0.5)


def test_a_fisher_matrix_of_more_parameters():
    refused(
        ValueError,
        r"params lacks \['b/kernel'\].*another model",
        {"a": problems.params()["a"]},
        fisher_of(),
        0.5,
    )


def test_nan_in_the_weights():
    params = problems.params()
    kernel = np.array(params["b"]["kernel"])
    kernel[0, 0] = np.nan
    params["b"]["kernel"] = kernel
    refused(ValueError, "b/kernel: 1 of 96 scores are NaN", params, fisher_of(), 0.5)
