"""A layer-wise run that goes on from masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js


def normal(seed, *shape):
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(numbers.astype(np.float32))


ROWS = normal(0, 64, 8)
PARAMS = {
    "a": {"kernel": normal(1, 8, 16), "bias": normal(3, 16)},
    "b": {"kernel": normal(2, 2, 16, 8)},  # two experts
}


def apply_fn(params, x):
    h = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.einsum("ebi,eio->ebo", jnp.stack([h, h**2]), params["b"]["kernel"])


run = functools.partial(js.oneshot.layerwise, apply_fn, batches=[ROWS])
KERNELS = ("a", "b")


@pytest.mark.parametrize(
    "solver",
    [
        js.solvers.wanda,
        pytest.param(js.solvers.sparsegpt, marks=pytest.mark.exhaustive),
    ],
    ids=["wanda", "sparsegpt"],
)
def test_what_is_gone_stays_gone_and_counts(solver):
    layer = js.Unstructured()
    half = run(PARAMS, sparsity=0.5, solver=js.solvers.magnitude)
    # Without masks the solver would let them grow: here they are large.
    grown = jax.tree.map(lambda w, m: jnp.where(m, w, 50.0), half.params, half.masks)
    more = run(grown, sparsity=0.75, solver=solver, pattern=layer, masks=half.masks)
    for name in KERNELS:
        old, new = (np.asarray(t.masks[name]["kernel"]) for t in (half, more))
        assert not (new & ~old).any()
        counts = new.reshape(-1, 16 * 8).sum(1)
        np.testing.assert_array_equal(counts, 32)
        assert not np.asarray(more.params[name]["kernel"])[~new].any()
        np.testing.assert_array_equal(more.info[f"{name}/kernel"].sparsity, 0.75)


def test_two_of_four_revives_nothing():
    sparse = js.prune(PARAMS, 0.7)
    found = run(
        sparse.params,
        pattern=js.NM(2, 4),
        solver=js.solvers.magnitude,
        masks=sparse.masks,
    )
    for name in KERNELS:
        old, new = (np.asarray(t.masks[name]["kernel"]) for t in (sparse, found))
        assert not (new & ~old).any()
        groups = lambda m: m.reshape(*m.shape[:-2], -1, 4, m.shape[-1]).sum(-2)
        np.testing.assert_array_equal(groups(new), np.minimum(groups(old), 2))


def test_a_matrix_that_no_row_reached_keeps_its_zeros_too():
    def half_blind(params, x):
        h = x @ params["a"]["kernel"]
        seen = jnp.stack([h, jnp.zeros_like(h)])
        return jnp.einsum("ebi,eio->ebo", seen, params["b"]["kernel"])

    half = js.prune(PARAMS, 0.5, axes={"^b": js.Axes((1,), (2,), (0,))})
    for unseen in ("magnitude", "dense"):
        with pytest.warns(UserWarning, match="no row|its inputs were 0"):
            found = js.oneshot.layerwise(
                half_blind,
                half.params,
                [ROWS],
                sparsity=0.75,
                solver=js.solvers.wanda,
                pattern=js.Unstructured(),
                masks=half.masks,
                unseen=unseen,
            )
        old, new = (np.asarray(t.masks["b"]["kernel"]) for t in (half, found))
        assert not (new & ~old).any()
        assert new[1].sum() == (32 if unseen == "magnitude" else 64)


def test_what_takes_no_part_keeps_its_mask_and_its_zeros():
    half = js.prune(PARAMS, 0.5)
    found = run(
        half.params,
        sparsity={"^a": 0.75},
        solver=js.solvers.magnitude,
        masks=half.masks,
    )
    np.testing.assert_array_equal(found.masks["b"]["kernel"], half.masks["b"]["kernel"])
    np.testing.assert_array_equal(
        found.params["b"]["kernel"], half.params["b"]["kernel"]
    )
    assert int(found.masks["a"]["kernel"].sum()) == 32


def test_a_killed_run_goes_on_with_the_same_masks_only(tmp_path):
    half, quarter = js.prune(PARAMS, 0.5), js.prune(PARAMS, 0.25)
    call = functools.partial(
        run,
        half.params,
        sparsity=0.75,
        solver=js.solvers.magnitude,
        directory=tmp_path,
    )
    first = call(masks=half.masks)
    again = call(masks=half.masks)
    jax.tree.map(np.testing.assert_array_equal, first[:2], again[:2])
    with pytest.raises(ValueError, match=r"another run.* masks"):
        call(masks=quarter.masks)


def test_mistakes_get_a_sentence():
    half = js.prune(PARAMS, 0.5)
    call = functools.partial(run, half.params, sparsity=0.25, masks=half.masks)
    with pytest.raises(ValueError, match=r"a/kernel: `masks` already remove 64 of 128"):
        call(solver=js.solvers.magnitude)
    plain = lambda w, gram, sparsity, *, pattern: js.solvers.magnitude(w, gram)
    with pytest.raises(TypeError, match=r"called with mask=.*no such parameter"):
        call(solver=plain)
    with pytest.raises(ValueError, match="masks must have exactly the structure"):
        run(PARAMS, sparsity=0.5, masks=half.masks["a"])


def test_masks_lie_where_the_parameters_do():
    mesh = Mesh(np.array(jax.devices()), ("model",))
    spread = NamedSharding(mesh, P(None, "model"))
    params = jax.tree.map(lambda w: w, PARAMS)
    params["a"]["kernel"] = jax.device_put(params["a"]["kernel"], spread)
    masks = js.prune(params, 0.25).masks
    found = run(params, sparsity=0.5, solver=js.solvers.magnitude, masks=masks)
    assert found.masks["a"]["kernel"].sharding.is_equivalent_to(spread, 2)


@pytest.mark.parametrize("sparsity", [0.7, {"a/": 0.7, "b/": 0.5}])
def test_more_than_a_pattern_removes_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"a/kernel: NM\(keep=2, of=4\) removes at mo"):
        run(PARAMS, sparsity=sparsity, pattern=js.NM(2, 4), show=False)
