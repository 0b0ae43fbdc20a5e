import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxsparse as js


def model(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return {
        "embed": {"embedding": draw(10, 8)},
        "mlp_0": {"kernel": draw(8, 16), "bias": draw(16)},
        "mlp_1": {"kernel": draw(8, 16), "bias": draw(16)},
    }


def test_by_default_the_smallest_magnitudes_of_each_kernel_go():
    params = model()
    pruned = js.prune(params, 0.75)
    for layer in ("mlp_0", "mlp_1"):
        w, kept = params[layer]["kernel"], pruned.masks[layer]["kernel"]
        assert int(kept.sum()) == 32
        assert jnp.abs(w)[kept].min() > jnp.abs(w)[~kept].max()
        np.testing.assert_array_equal(
            pruned.params[layer]["kernel"], np.where(kept, w, 0)
        )


def test_everything_else_stays_bit_for_bit():
    params = model()
    pruned = js.prune(params, 0.75)
    for layer, name in (("embed", "embedding"), ("mlp_0", "bias"), ("mlp_1", "bias")):
        np.testing.assert_array_equal(pruned.params[layer][name], params[layer][name])
        assert pruned.masks[layer][name].shape == ()


def test_nm_needs_no_sparsity():
    pruned = js.prune(model(), pattern=js.NM(2, 4))
    js.patterns.verify(pruned.masks, pruned.params, pattern=js.NM(2, 4))
    assert int(pruned.masks["mlp_0"]["kernel"].sum()) == 64


def test_an_allocation_gives_each_kernel_its_own_sparsity():
    params = model()
    sparsities = js.allocations.uniform(params, 0.5, exceptions={"mlp_0": 0.25})
    masks = js.prune(params, sparsities).masks
    assert int(masks["mlp_0"]["kernel"].sum()) == 96
    assert int(masks["mlp_1"]["kernel"].sum()) == 32


def test_after_each_cut_the_scores_are_of_what_is_left():
    left = []

    def counting(params):
        left.append(int((params["mlp_0"]["kernel"] != 0).sum()))
        return js.scores.magnitude(params)

    js.prune(model(), 15 / 16, score=counting, steps=4)
    assert left == [128, 64, 32, 16]  # then 8


def test_what_is_removed_stays_removed_whatever_its_new_score():
    def smallest_first(params):
        return jax.tree.map(lambda w: -jnp.abs(w), params)

    params = model()
    once = js.prune(params, 0.5, score=smallest_first)
    more = js.prune(params, 0.75, score=smallest_first, steps=2)
    first, second = (p.masks["mlp_0"]["kernel"] for p in (once, more))
    assert not (second & ~first).any()
    assert int(second.sum()) == 32


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "pattern",
    [
        js.Unstructured(),
        js.Unstructured("global"),
        js.NM(1, 4),
        js.Block((4, 4)),
        js.Channel(),
    ],
    ids=repr,
)
def test_steps_end_at_the_sparsity_and_the_pattern_asked_for(pattern, steps):
    params = model()
    pruned = js.prune(params, 0.75, pattern=pattern, steps=steps)
    js.patterns.verify(pruned.masks, params, pattern=pattern)
    reached = js.patterns.sparsity_of(pruned.masks, params)
    kernels = [reached["mlp_0"]["kernel"], reached["mlp_1"]["kernel"]]
    assert sum(kernels) / 2 == 0.75


def test_it_runs_under_jit_with_a_traced_sparsity():
    params = model()
    jitted = jax.jit(lambda p, s: js.prune(p, s, steps=2))(params, 0.9)
    eager = js.prune(params, 0.9, steps=2)
    for got, expected in zip(
        jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_a_state_of_nnx_with_dropout_is_pruned():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    net = Net(nnx.Rngs(0))
    pruned = js.prune(nnx.state(net), 0.5)
    nnx.update(net, pruned.params)
    assert int((net.linear.kernel[...] == 0).sum()) == 16


@pytest.mark.parametrize("sparsity", [None, 1.0, -0.1, 90])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        js.prune(model(), sparsity)


def test_nan_in_the_weights_raises_with_its_path():
    params = model()
    params["mlp_1"]["kernel"] = params["mlp_1"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="mlp_1/kernel: 1 of 128 scores are NaN"):
        js.prune(params, 0.5)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (1.5, TypeError)])
def test_steps_are_a_positive_integer(steps, error):
    with pytest.raises(error, match="steps"):
        js.prune(model(), 0.5, steps=steps)


def test_a_score_of_gradients_is_told_how_to_get_them():
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(TypeError, match=r"signature \(p, g\).*jax\.grad\(loss_fn\)"):
        js.prune(params, 0.5, score=lambda p, g: p)
