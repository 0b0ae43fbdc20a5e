"""A narrowed model beside the masked one: all drops of a model in one compilation."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxsparse as js

ALLOW = ("position", "layer")


def choose(group, count, rng):
    """Other indices in each copy."""
    copies = int(np.prod(group.copies))
    chosen = [rng.permutation(group.size)[:count] for _ in range(copies)]
    return np.reshape(chosen, (*group.copies, count))


def each_one(found, rng):
    """One index of each group alone."""
    return [{name: choose(group, 1, rng)} for name, group in found.items()]


def half_of_all(found, rng):
    return [{name: choose(g, g.size // 2, rng) for name, g in found.items()}]


def close(got, want, message=""):
    """To 1e-12 of the largest entry."""
    scale = max(float(np.max(np.abs(want))), 1e-3)
    got, want = np.asarray(got) / scale, np.asarray(want) / scale
    np.testing.assert_allclose(got, want, atol=1e-12, err_msg=message)


def masked(trace, params, drop, allow=ALLOW):
    return js.patterns.apply(params, js.narrowing.drop_masks(trace, drop, allow=allow))


def assert_narrowed_equals_masked(
    apply_fn, params, inputs, *, drops, gradients=False, message=""
):
    """Outputs, parameters, sizes and gradients; to be called where x64 is on.

    Args:
      apply_fn: the model.
      params: its parameters.
      inputs: what else it takes.
      drops: from the prunable groups by name to the drops to be looked at.
      gradients: whether those of a loss are compared too.
      message: what a failure says of the model.

    Returns:
      For each drop whether it changes the outputs: else nothing has been shown.
    """
    trace = js.trace(apply_fn, params, *inputs)
    chosen = drops(js.coupling.groups(trace, allow=ALLOW).prunable)
    narrow = lambda p, drop: js.narrowing.narrow(trace, p, drop, allow=ALLOW)
    loss = lambda f: lambda p: jnp.sum(jnp.sin(f(p, *inputs)))
    sizes = []

    def both(params, drop):
        small, zeroed = narrow(params, drop), masked(trace, params, drop)
        sizes.append(small.sizes)
        back = js.narrowing.widen(trace, small.params, drop, allow=ALLOW)
        got, want = small.apply_fn(small.params, *inputs), apply_fn(zeroed, *inputs)
        slopes = ()
        if gradients:
            whole = jax.grad(loss(apply_fn))(zeroed)
            slopes = jax.grad(loss(small.apply_fn))(small.params)
            slopes = slopes, narrow(whole, drop).params
        return got, want, small.params, back, zeroed, slopes

    whole, found = jax.device_get(
        jax.jit(lambda p: (apply_fn(p, *inputs), [both(p, d) for d in chosen]))(params)
    )
    assert np.all(np.isfinite(whole))
    assert len(found) > 0
    changes = []
    for drop, size_of, (got, want, small, back, zeroed, slopes) in zip(
        chosen, sizes, found, strict=True
    ):
        close(got, want, "\n".join([message, *drop]))
        jax.tree.map(np.testing.assert_array_equal, back, zeroed)
        leaves = dict(js.tree.leaves_with_paths(small))
        for (path, axis), size in size_of.items():
            assert leaves[path].shape[axis] == size
        if gradients:
            jax.tree.map(close, *slopes)
        changes.append(not np.allclose(want, whole, rtol=1e-6))
    return changes
