"""What a mask has removed stays removed and counts, whatever the solver of a layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solvers.layers import PATTERNS, TWO_OF_FOUR, assert_obeys, layer, single

import jaxsparse as js

SOLVERS = {
    "wanda": js.solvers.wanda,
    "magnitude": js.solvers.magnitude,
    "sparsegpt": functools.partial(js.solvers.sparsegpt, block_size=8),
    "exact_obs": js.solvers.exact_obs,
    "admm": functools.partial(js.solvers.admm, iterations=4, mask_iterations=3),
    "alps": functools.partial(js.solvers.alps, iterations=6, refit_iterations=2),
}


def before_of(pattern, share=0.3):
    """At most half of each group of four, and not all groups alike."""
    rng = np.random.default_rng(1)
    if pattern == TWO_OF_FOUR:
        lost = rng.integers(0, 3, (16, 10, 1))
        order = rng.permuted(np.tile(np.arange(4), (16, 10, 1)), axis=2)
        return (order >= lost).reshape(16, 40)
    return rng.random((16, 40)) > share


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if few else pytest.mark.exhaustive)
        for i, name in enumerate(SOLVERS)
        # Groups of four of each solver are in the next test.
        for kind in PATTERNS
        for few in [kind == ("layer", "output")[i % 2]]
    ],
)
def test_what_is_gone_stays_gone_and_counts(name, kind):
    w, gram = single(*layer(dead=(3,)))
    pattern = PATTERNS[kind]
    before = jnp.asarray(before_of(pattern))
    # Of what is gone the largest weights of all, so that no score would let it go.
    w = jnp.where(before, w, 100 * w)
    found = SOLVERS[name](w, gram, 0.5, pattern=pattern, mask=before)
    assert_obeys(found.mask, 0.5, pattern)
    assert not (found.mask & ~before).any()
    assert not np.asarray(found.w)[~np.asarray(found.mask)].any()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_group_of_four_that_has_lost_three_keeps_one(name):
    w, gram = single(*layer())
    before = np.ones(w.shape, bool)
    before[:, :3] = before[::2, 8:12] = False
    w = jnp.where(before, w, 0)
    solve = functools.partial(
        SOLVERS[name], pattern=TWO_OF_FOUR, mask=jnp.asarray(before)
    )
    mask = np.asarray(solve(w, gram).mask)
    kept = mask.reshape(16, 10, 4).sum(2)
    expected = np.minimum(before.reshape(16, 10, 4).sum(2), 2)
    np.testing.assert_array_equal(kept, expected)
    assert not (mask & ~before).any()
    # 3:4 is what is asked for here, and more is gone.
    with pytest.raises(ValueError, match="mask has removed 4 of a group of 4"):
        solve(w, gram, 0.25)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_mask_that_removes_more_or_is_none_of_w_is_refused(name):
    w, gram = single(*layer())
    solve = functools.partial(SOLVERS[name], w, gram, 0.25)
    options = {"pattern": PATTERNS["layer"]}
    with pytest.raises(ValueError, match=r"mask has removed .* of a group of 640"):
        solve(mask=jnp.asarray(before_of(None, 0.5)), **options)
    with pytest.raises(ValueError, match="mask must have the shape of w"):
        solve(mask=jnp.ones((40, 16), bool), **options)
    with pytest.raises(TypeError, match="mask holds bools"):
        solve(mask=jnp.ones((16, 40)), **options)


def test_exact_obs_goes_on_as_if_it_had_removed_them_itself():
    """The first half of its own steps as a mask leads to the same end."""
    w, gram = single(*layer(8, 16))
    for kind in ("output", "layer"):
        pattern = PATTERNS[kind]
        solve = functools.partial(js.solvers.exact_obs, w, gram, pattern=pattern)
        first, last = solve(0.25), solve(0.5)
        again = solve(0.5, mask=first.mask)
        np.testing.assert_array_equal(again.mask, last.mask)
        np.testing.assert_allclose(again.w, last.w, rtol=1e-4, atol=1e-5)


def test_without_a_mask_nothing_changes():
    w, gram = single(*layer())
    every = jnp.ones(w.shape, bool)
    for solve in SOLVERS.values():
        plain = solve(w, gram, 0.5, pattern=PATTERNS["layer"])
        same = solve(w, gram, 0.5, pattern=PATTERNS["layer"], mask=every)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            (plain.w, plain.mask),
            (same.w, same.mask),
        )
