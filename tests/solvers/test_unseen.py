"""Among inputs that are always 0 magnitude decides, in every solver and score."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

D_OUT, D_IN = 16, 24
DEAD = [0, 1, 2, 3, 4, 5, 6, 7, 9, 15, 16, 20, 21, 22, 23]
s = js.solvers
SOLVERS = {
    "sparsegpt": functools.partial(s.sparsegpt, block_size=8),
    "exact_obs": s.exact_obs,
    "admm": s.admm,
    "alps": s.alps,
    "wanda": s.wanda,
}
PATTERNS = [js.Unstructured(), js.Unstructured("output"), js.NM(2, 4)]


@functools.cache
def layer():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((D_OUT, D_IN)).astype(np.float32)
    x = rng.standard_normal((200, D_IN))
    x[:, DEAD] = 0
    return w, (x.T @ x / 200).astype(np.float32)


def smallest_first(w, dead, pattern, sparsity):
    """The mask where dead inputs go first; those of live ones only fill up."""
    order = np.abs(w) + np.where(dead, 0, 1e3)[None]
    if isinstance(pattern, js.NM):
        groups, removed = order.reshape(-1, pattern.of), pattern.of - pattern.keep
    else:
        groups = order.reshape(1 if pattern.scope == "layer" else D_OUT, -1)
        removed = int(np.floor(sparsity * groups.shape[1] + 0.5))
    ranks = np.argsort(np.argsort(groups, axis=1), axis=1)
    return (ranks >= removed).reshape(w.shape)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        pytest.param(name, pattern, marks=[] if few else pytest.mark.exhaustive)
        for i, name in enumerate(SOLVERS)
        for j, pattern in enumerate(PATTERNS)
        # The sweep has code of its own for each pattern.
        for few in [name == "sparsegpt" or j == i % len(PATTERNS)]
    ],
    ids=str,
)
def test_the_smallest_weights_of_dead_inputs_go_first(name, pattern):
    w, gram = layer()
    dead = np.diag(gram) == 0
    for known, flags in ((gram, dead), (np.zeros_like(gram), np.full(D_IN, True))):
        sparsity = None if isinstance(pattern, js.NM) else 0.4
        got = SOLVERS[name](w, known, sparsity, pattern=pattern)
        wanted = smallest_first(w, flags, pattern, sparsity)
        mask = np.asarray(got.mask)
        if isinstance(pattern, js.NM):  # a group may have fewer dead than it loses
            full = flags.reshape(-1, 4).sum(1) >= 2
            rows = np.tile(full, D_OUT).reshape(D_OUT, -1).repeat(4, axis=1)
            mask, wanted = mask[rows], wanted[rows]
        np.testing.assert_array_equal(mask, wanted)
        unseen = flags.all()
        assert np.isnan(got.info.error) == np.isnan(got.info.relative_error) == unseen


@pytest.mark.parametrize("at_once", [1, 2, None])
def test_channels_of_dead_inputs_go_by_their_weights(at_once):
    w, gram = layer()
    sizes = np.sum(w**2, 0)
    for known in (gram, np.zeros_like(gram)):
        cost = np.where(np.diag(known) == 0, sizes, np.inf)
        wanted = np.sort(np.argsort(cost)[:5])
        got = s.remove_channels(w, known, count=5, at_once=at_once)
        np.testing.assert_array_equal(np.flatnonzero(np.asarray(got.step) >= 0), wanted)
        assert float(np.sum(got.errors)) == 0
        if at_once is None:
            errors = np.asarray(s.channel_errors(w, known))
            np.testing.assert_array_equal(np.sort(np.argsort(errors)[:5]), wanted)


@functools.cache
def statistics():
    w, _ = layer()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((30, D_IN)).astype(np.float32)
    x[:, DEAD] = 0
    state = js.calibration.init((), D_IN, gram=False)
    known = js.calibration.finalize(js.calibration.update(state, jnp.asarray(x)))
    view = js.tree.matrix_view(w.shape, js.Axes(input=(1,), output=(0,)))
    return js.calibration.Statistics({"x": known}, (("kernel", "x", view),))


@pytest.mark.parametrize("name", ["wanda", "gblm", "gradient_norm"])
def test_scores_of_dead_inputs_have_the_order_of_their_weights(name):
    w, _ = layer()
    params = {"kernel": jnp.asarray(w)}
    dead = np.isin(np.arange(D_IN), DEAD)
    gradients = {"kernel": jnp.asarray(np.where(dead, 0, np.ones_like(w)))}
    arguments = {
        "wanda": (statistics(),),
        "gblm": (statistics(), gradients),
        "gradient_norm": (gradients,),
    }[name]
    found = np.asarray(getattr(js.scores, name)(params, *arguments)["kernel"])
    unused, used = found[:, dead], found[:, ~dead]
    assert unused.max() < used.min()
    order = np.argsort(unused.ravel())
    np.testing.assert_array_equal(order, np.argsort(np.abs(w[:, dead]).ravel()))


@pytest.mark.parametrize("standardise", [False, True])
def test_channels_that_never_changed_have_the_order_of_their_weights(standardise):
    w, _ = layer()
    params = {"kernel": jnp.asarray(w)}
    found = js.scores.flap(params, statistics(), standardise=standardise)["kernel"]
    channels, dead = np.asarray(found)[0], np.isin(np.arange(D_IN), DEAD)
    assert channels[dead].max() < channels[~dead].min()
    sizes = np.sum(w[:, dead] ** 2, 0)
    np.testing.assert_array_equal(np.argsort(channels[dead]), np.argsort(sizes))
