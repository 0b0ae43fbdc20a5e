import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.conftest import compilations as compilations
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import allocations_outlier as oracle

import jaxsparse as js

SHAPES = {
    "block_1/up": (16, 16),
    "block_1/down": (16, 8),
    "block_2/up": (16, 8),
    "block_10/up": (16, 16),
    "block_10/down": (16, 8),
}  # two shapes, for each is compiled
SIZES = {k: math.prod(s) for k, s in SHAPES.items()}
TOTAL = sum(SIZES.values())
by_block = lambda path: path.split("/")[0]


@functools.cache
def scores():
    rng = np.random.default_rng(0)
    tails = dict(zip(SHAPES, (0.3, 0.5, 1.0, 1.5, 2.0), strict=True))
    return {
        k: jnp.asarray(np.exp(tails[k] * rng.standard_normal(s)), jnp.float32)
        for k, s in SHAPES.items()
    } | {"bias": jnp.asarray(np.ones(4, np.float32))}


@functools.cache
def zeros(dtype="float32"):
    return {k: jnp.asarray(np.zeros(s), dtype) for k, s in SHAPES.items()}


def assert_same_to_the_weight(found, expected):
    """A sum in another order may move the last weight of a layer."""
    for k, size in SIZES.items():
        assert abs(found[k] - expected[k]) <= 1.001 / size


def loss(params, batch):
    slopes = {"block_1/up": 3.0, "block_10/down": 1.0, "block_2/up": 0.1}
    return batch * sum(s * jnp.sum(params[k]) for k, s in slopes.items())


REDUNDANCY = dict(zip(SHAPES, (0.2, 0.5, 0.9, 0.5, 0.1), strict=True))
ALLOCATE = {
    "owl": js.allocations.owl,
    "dsa": js.allocations.dsa,
    "als": lambda p, s, groups=None: js.contrib.als(
        p,
        {k if groups is None else groups(k): r for k, r in REDUNDANCY.items()},
        s,
        lower=0.5 * s,
        upper=(1 + s) / 2,
        groups=groups,
    ),
    "arithmetic_progression": functools.partial(
        js.allocations.arithmetic_progression, difference=0.05
    ),
    "ecoflap": lambda p, s, groups=None: js.allocations.ecoflap(
        loss, p, [1.0, 2.0], s, key=jax.random.key(0), groups=groups
    ),
}
every_allocation = pytest.mark.parametrize("name", ALLOCATE)


def counts(sparsities):
    return {k: js.patterns.removed_count(sparsities[k], n) for k, n in SIZES.items()}


@every_allocation
@pytest.mark.parametrize("groups", [None, by_block], ids=["each", "blocks"])
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.777, 0.95, 0.999])
def test_the_total_is_met_to_the_weight(name, groups, sparsity):
    found = ALLOCATE[name](scores(), sparsity, groups=groups)
    assert jax.tree.structure(found) == jax.tree.structure(scores())
    assert sum(counts(found).values()) == js.patterns.removed_count(sparsity, TOTAL)
    assert all(0 <= s < 1 for s in found.values())
    assert found["bias"] == 0.0


@every_allocation
def test_the_masks_have_that_many(name):
    found = ALLOCATE[name](scores(), 0.7, groups=by_block)
    masks = js.patterns.masks(scores(), found)
    removed = sum((~np.asarray(masks[k])).sum() for k in SHAPES)
    assert removed == js.patterns.removed_count(0.7, TOTAL)


@every_allocation
def test_a_block_shares_one_sparsity_to_the_weight(name):
    found = ALLOCATE[name](scores(), 0.7, groups=by_block)
    for block in ("block_1", "block_10"):
        up, down = (f"{block}/{part}" for part in ("up", "down"))
        between = 1 / SIZES[up] + 1 / SIZES[down]
        assert abs(found[up] - found[down]) <= between
    assert len({round(found[k], 1) for k in SHAPES}) > 1


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=6),
    st.floats(0, 0.999),
    st.floats(0.001, 0.999),
)
def test_totals_are_exact_on_any_tree(layers, sparsity, difference):
    params = {f"w{i}": np.ones((1, n)) for i, (n, _) in enumerate(layers)}
    redundancy = {f"w{i}": r for i, (_, r) in enumerate(layers)}
    upper = min(0.9999, sparsity + 0.2)
    for found in (
        js.allocations.arithmetic_progression(params, sparsity, difference=difference),
        js.contrib.als(params, redundancy, sparsity, lower=0.0, upper=upper),
    ):
        removed = {
            k: js.patterns.removed_count(found[k], w.size) for k, w in params.items()
        }
        total = sum(w.size for w in params.values())
        assert sum(removed.values()) == js.patterns.removed_count(sparsity, total)
        assert all(0 <= s < 1 for s in found.values())


@pytest.mark.parametrize("sparsity", [0.1, 0.7, 0.97])
def test_owl_s_densities_follow_the_outliers(sparsity):
    found = js.allocations.owl(scores(), sparsity, outlier=3.0, spread=0.1)
    shares = oracle.outlier_shares([[scores()[k]] for k in SHAPES], 3.0)
    removed = js.patterns.removed_count(sparsity, TOTAL)
    wanted = -0.2 * oracle.min_max(shares)
    expected = oracle.shifted(wanted, list(SIZES.values()), removed)
    for k, s in zip(SHAPES, expected, strict=True):
        assert abs(found[k] - s) <= 1.001 / SIZES[k]


def test_owl_s_mean_and_outliers_are_over_a_block():
    found = js.allocations.owl(scores(), 0.6, groups=by_block, outlier=2.0)
    names = list(dict.fromkeys(map(by_block, SHAPES)))
    blocks = [[scores()[k] for k in SHAPES if by_block(k) == b] for b in names]
    sizes = [sum(x.size for x in b) for b in blocks]
    wanted = -0.16 * oracle.min_max(oracle.outlier_shares(blocks, 2.0))
    removed = js.patterns.removed_count(0.6, TOTAL)
    expected = dict(zip(names, oracle.shifted(wanted, sizes, removed), strict=True))
    for k in SHAPES:
        assert abs(found[k] - expected[by_block(k)]) <= 1.001 / SIZES[k]


@pytest.mark.parametrize("allocate", [js.allocations.owl, js.allocations.dsa])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_blocks_that_are_alike_get_the_same(allocate, value):
    alike = {k: jnp.asarray(np.full(s, value, "f4")) for k, s in SHAPES.items()}
    found = allocate(alike, 0.75)
    assert found == dict.fromkeys(SHAPES, 0.75)


@pytest.mark.parametrize("name", ["owl", "dsa"])
def test_the_scale_of_scores_does_not_matter(name):
    scaled = jax.tree.map(lambda s: jnp.asarray(1024 * np.asarray(s)), scores())
    assert ALLOCATE[name](scaled, 0.6) == ALLOCATE[name](scores(), 0.6)


@pytest.mark.parametrize("name", ["owl", "dsa"])
def test_bf16_scores_are_added_up_in_float32(name):
    short = jax.tree.map(lambda s: np.asarray(s).astype(jnp.bfloat16), scores())
    wide = jax.tree.map(lambda s: s.astype(np.float32), short)
    assert_same_to_the_weight(*(ALLOCATE[name](s, 0.6) for s in (short, wide)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["owl", "dsa"])
def test_sharded_scores_give_the_same(name, kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    put = lambda k: jax.device_put(scores()[k], NamedSharding(mesh, P(None, "x")))
    assert_same_to_the_weight(
        ALLOCATE[name]({k: put(k) for k in SHAPES}, 0.6), ALLOCATE[name](scores(), 0.6)
    )


def test_dsa_s_sparsities_follow_the_spread_of_logarithms():
    found = js.allocations.dsa(scores(), 0.6, spread=0.1)
    importance = oracle.dsa_importance([[scores()[k]] for k in SHAPES])
    removed = js.patterns.removed_count(0.6, TOTAL)
    wanted = 0.2 * oracle.min_max(importance)
    expected = oracle.shifted(wanted, list(SIZES.values()), removed)
    for k, s in zip(SHAPES, expected, strict=True):
        assert abs(found[k] - s) <= 1.001 / SIZES[k]


def test_dsa_s_variance_is_that_of_the_few_scores_that_are_not_zero():
    spread = {"a": [1.0, 1.1], "b": [1.0, 2.0, 1.0, 1.0], "c": [1.0, 3.0]}
    pad = lambda v: jnp.asarray(np.array([v + [0.0] * (4000 - len(v))], np.float32))
    few = {k: pad(v) for k, v in spread.items()}
    found = js.allocations.dsa(few, 0.5, spread=0.25)
    wanted = 0.5 * oracle.min_max(oracle.dsa_importance([[few[k]] for k in "abc"]))
    expected = oracle.shifted(wanted, [4000] * 3, 6000)
    np.testing.assert_allclose(list(found.values()), expected, atol=1 / 2000)


def test_zeros_and_many_decades_leave_dsa_finite():
    wild = np.array([[0.0, 1e-30, 1e30, 1.0]], np.float32)
    wild = {"a": jnp.asarray(wild), "b": jnp.asarray(0 * wild)}
    found = js.allocations.dsa(wild, 0.5, spread=0.25)
    assert found == {"a": 0.75, "b": 0.25}


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from([0.1, 0.3, 0.5, 0.9])),
        min_size=1,
        max_size=5,
    ),
    st.floats(0.2, 0.8),
)
def test_als_solves_its_linear_programme(layers, sparsity):
    # So many weights that rounding to whole ones does not matter.
    sizes = [1000 * n for n, _ in layers]
    params = {
        f"w{i}": jax.ShapeDtypeStruct((1, n), jnp.float32) for i, n in enumerate(sizes)
    }
    redundancy = {f"w{i}": r for i, (_, r) in enumerate(layers)}
    found = js.contrib.als(params, redundancy, sparsity, lower=0.1, upper=0.9)
    x = np.array(list(found.values())) * sizes
    worth = np.array(list(redundancy.values()))
    best = oracle.linear_programme(
        worth, sizes, js.patterns.removed_count(sparsity, sum(sizes)), 0.1, 0.9
    )
    assert abs(np.dot(worth, x) - best) <= len(layers)
    assert all(0.1 - 1e-3 <= s <= 0.9 + 1e-3 for s in found.values())


def test_equally_redundant_layers_share():
    params = {k: np.ones((1, n)) for k, n in {"a": 100, "b": 300, "c": 100}.items()}
    found = js.contrib.als(
        params, {"a": 0.5, "b": 0.5, "c": 0.1}, 0.6, lower=0.2, upper=0.8
    )
    assert found == {"a": 0.7, "b": 0.7, "c": 0.2}


def test_a_progression_goes_by_the_natural_order_of_names():
    params = {f"block_{i}/w": np.ones((10, 10)) for i in (1, 2, 9, 10, 11)}
    found = js.allocations.arithmetic_progression(params, 0.5, difference=0.1)
    by_depth = [found[f"block_{i}/w"] for i in (1, 2, 9, 10, 11)]
    assert by_depth == [0.3, 0.4, 0.5, 0.6, 0.7]
    falling = js.allocations.arithmetic_progression(params, 0.5, difference=-0.1)
    assert [falling[k] for k in found] == [round(1 - s, 2) for s in found.values()]


def test_a_progression_that_leaves_its_range_stops_there_and_meets_the_total():
    params = {f"w{i}": np.ones((10, 10)) for i in range(4)}
    found = js.allocations.arithmetic_progression(params, 0.9, difference=0.2)
    values = list(found.values())
    expected = oracle.shifted([0, 0.2, 0.4, 0.6], [100] * 4, 360)
    np.testing.assert_allclose(values, expected, atol=1e-9)
    assert values[-1] == math.nextafter(1.0, 0.0)


@pytest.mark.parametrize("most", [None, 0.75, 0.99])
def test_ecoflap_shares_out_by_how_much_the_loss_moves(most):
    params, key = zeros(), jax.random.key(7)
    found = js.allocations.ecoflap(
        loss, params, iter([1.0, 2.0]), 0.7, key=key, most=most
    )
    moved = np.zeros(len(SHAPES))
    slopes = {"block_1/up": 3.0, "block_10/down": 1.0, "block_2/up": 0.1}
    for i, batch in enumerate([1.0, 2.0]):
        keys = js.tree.keys_like(jax.random.fold_in(key, i), params)
        for j, k in enumerate(SHAPES):
            z = np.asarray(jax.random.normal(keys[k], SHAPES[k]), np.float64)
            moved[j] += abs(slopes.get(k, 0) * batch * z.sum()) / 2
    kept = TOTAL - js.patterns.removed_count(0.7, TOTAL)
    least = 1 - (0.8 if most is None else most)
    density = oracle.shared_out(moved + 1e-6, list(SIZES.values()), kept, least)
    for k, d in zip(SHAPES, density, strict=True):
        assert abs(1 - found[k] - d) <= 0.02 + 1 / SIZES[k]


def test_ecoflap_compiles_once_for_all_blocks_and_batches(compilations):
    params = zeros()

    def fresh(params, batch):
        return loss(params, batch)

    with compilations() as found:
        js.allocations.ecoflap(fresh, params, [1.0, 2.0], 0.7, key=jax.random.key(0))
    assert found.of("_loss") == 1


def test_ecoflap_depends_on_its_key_alone_and_leaves_other_types():
    params = zeros("bfloat16") | {"steps": jnp.int32(1)}
    wide = lambda p, b: loss({k: p[k].astype(jnp.float32) for k in SHAPES}, b)
    run = lambda seed: js.allocations.ecoflap(
        wide, params, [1.0], 0.7, key=jax.random.key(seed)
    )
    assert run(0) == run(0)
    assert run(0) != run(1)


def test_a_loss_that_nothing_moves_gives_uniform():
    flat = lambda params, batch: jnp.float32(1)
    found = js.allocations.ecoflap(flat, zeros(), [1.0], 0.75, key=jax.random.key(0))
    assert found == dict.fromkeys(SHAPES, 0.75)


# Bad input.


@every_allocation
def test_a_sparsity_outside_its_range_is_refused(name):
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        ALLOCATE[name](scores(), 1.0)


@every_allocation
def test_a_block_without_a_name_is_refused(name):
    groups = lambda path: 3 if path.startswith("block_2") else "a"
    with pytest.raises(TypeError, match=r"block_2/up: groups must return the name"):
        ALLOCATE[name](scores(), 0.5, groups=groups)


def test_parameters_without_weights_are_refused():
    with pytest.raises(ValueError, match="hold no weights"):
        js.allocations.owl({"w": np.ones((0, 3))}, 0.5)


@pytest.mark.parametrize("options", [{"outlier": 0.0}, {"spread": -0.1}])
def test_what_has_to_be_positive_is(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be positive"):
        js.allocations.owl(scores(), 0.5, **options)


@pytest.mark.parametrize("allocate", [js.allocations.owl, js.allocations.dsa])
def test_nan_scores_name_their_path(allocate):
    nan = jnp.asarray(np.full((16, 8), np.nan, np.float32))
    bad = scores() | {"block_2/up": nan}
    with pytest.raises(ValueError, match="block_2/up: 128 of 128 scores are NaN"):
        allocate(bad, 0.5)


@pytest.mark.parametrize("bounds", [(0.6, 0.9), (0.1, 0.4)])
def test_als_refuses_bounds_that_the_total_is_not_between(bounds):
    lower, upper = bounds
    with pytest.raises(ValueError, match=r"0\.5 does not lie between the bounds"):
        js.contrib.als(scores(), REDUNDANCY, 0.5, lower=lower, upper=upper)


def test_als_refuses_a_block_without_redundancy():
    some = {k: r for k, r in REDUNDANCY.items() if k != "block_2/up"}
    with pytest.raises(ValueError, match=r"nothing for the blocks \['block_2/up'\]"):
        js.contrib.als(scores(), some, 0.5, lower=0.1, upper=0.9)
    with pytest.raises(ValueError, match="finite number"):
        js.contrib.als(
            scores(), REDUNDANCY | {"block_2/up": math.nan}, 0.5, lower=0.1, upper=0.9
        )


@pytest.mark.parametrize("difference", [1.0, -2.0, math.nan])
def test_a_progression_refuses_a_bad_difference(difference):
    with pytest.raises(ValueError, match=r"difference must lie in \(-1, 1\)"):
        js.allocations.arithmetic_progression(scores(), 0.5, difference=difference)


def test_ecoflap_refuses_what_it_cannot_work_with():
    run = functools.partial(
        js.allocations.ecoflap, loss, scores(), key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match=r"no batches\. Was the iterator"):
        run(iter([]), 0.5)
    with pytest.raises(ValueError, match=r"most=0\.4 is below"):
        run([1.0], 0.5, most=0.4)
    with pytest.raises(ValueError, match="eps must be positive"):
        run([1.0], 0.5, eps=0.0)
    with pytest.raises(ValueError, match="not finite near 'block_1/down'"):
        run([jnp.inf], 0.5)
    with pytest.raises(ValueError, match=r"return a scalar, got \(2,\)"):
        js.allocations.ecoflap(
            lambda p, b: np.ones(2), scores(), [1.0], 0.5, key=jax.random.key(0)
        )
