import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import selection

from jaxsparse.patterns import removed_count

SPARSITIES = [0, 0.1, 0.35, 0.5, 0.55, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99, 0.999999]
SIZES = [*range(1, 61), 100, 145, 200, 999, 4096, 10**6, 12_345_678, 10**8]

traced_counts = jax.jit(lambda s: [removed_count(s, n) for n in SIZES])


@pytest.mark.parametrize(
    ("sparsity", "n", "removed"),
    [
        (0.5, 1, 1),  # a half rounds up
        (0.5, 3, 2),
        (0.95, 10, 10),  # 9.5: the rule may remove all of a small group
        (0.9, 55, 50),  # 49.5
        (0.7, 45, 31),  # 31.499999999999996 in float64
        (0.49, 1, 0),
        (0.0, 7, 0),
        (0.9, 10**8, 90_000_000),
        (0.99, 10**8, 99_000_000),
    ],
)
def test_the_rule_by_hand(sparsity, n, removed):
    assert removed_count(sparsity, n) == removed


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_traced_float32_counts_as_the_python_number_does(sparsity):
    exact = [selection.removed_count(sparsity, n) for n in SIZES]
    assert [removed_count(sparsity, n) for n in SIZES] == exact
    assert [int(c) for c in traced_counts(jnp.float32(sparsity))] == exact


def test_a_traced_float64_counts_as_the_python_number_does(x64):
    counts = jax.jit(lambda s: [removed_count(s, n) for n in SIZES])
    for sparsity in SPARSITIES:
        expected = [selection.removed_count(sparsity, n) for n in SIZES]
        assert [int(c) for c in counts(jnp.float64(sparsity))] == expected


def test_a_number_that_is_no_short_decimal_is_multiplied_in_float64():
    assert removed_count(1 / 3, 10**8) == 33_333_333
    assert removed_count(1 / 3, 3) == 1


@pytest.mark.parametrize("scalar", [np.float32, np.float64, jnp.float32, np.asarray])
def test_scalars_of_numpy_and_jax_count_as_the_python_number_does(scalar):
    assert int(removed_count(scalar(0.9), 10**8)) == 90_000_000


def test_a_value_that_is_no_short_decimal_counts_as_it_stands():
    third = np.float32(1 / 3)
    n = 10**8
    expected = int(np.floor(np.float64(third) * n + 0.5))
    assert expected == 33_333_334
    assert int(removed_count(jnp.asarray(third), n)) == expected


def test_counts_are_integers_also_under_vmap():
    counts = jax.vmap(lambda s: removed_count(s, 10**8))(jnp.array([0.0, 0.5, 0.9]))
    assert counts.dtype == jnp.int32
    assert counts.tolist() == [0, 50_000_000, 90_000_000]


def test_counting_leaves_64_bit_mode_as_it_was():
    removed_count(jnp.float32(0.9), 10)
    assert jnp.ones(()).dtype == jnp.float32


def test_a_group_past_int32_asks_for_64_bits():
    with pytest.raises(ValueError, match="jax_enable_x64"):
        removed_count(jnp.float32(0.5), 2**31)


def test_a_group_past_int32_is_counted_with_64_bits(x64):
    assert int(removed_count(jnp.float32(0.5), 2**33)) == 2**32


@pytest.mark.parametrize("sparsity", [1.0, 1, -0.1, 90, float("nan"), float("inf")])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        removed_count(sparsity, 10)


@pytest.mark.parametrize("sparsity", ["0.9", True, None, 1j])
def test_what_is_no_number_is_refused(sparsity):
    with pytest.raises(TypeError, match="must be a number"):
        removed_count(sparsity, 10)


def test_a_percentage_is_recognised():
    with pytest.raises(ValueError, match=r"For 90 % write 0\.9"):
        removed_count(90, 10)


@pytest.mark.parametrize("wild", [-0.5, 1.5])
def test_a_traced_sparsity_outside_its_range_is_cut_to_it(wild):
    count = jax.jit(lambda s: removed_count(s, 10))(wild)
    assert int(count) == (0 if wild < 0 else 10)
