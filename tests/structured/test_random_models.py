"""Masked and narrowed agree for models that nobody wrote.

`SEEDS=200 pytest tests/structured/test_random_models.py` looks at more of them.
"""

import os

import jax
import numpy as np
import pytest
from structured.random_models import random_model

import jaxsparse as js

ALLOW = ("position", "layer")
FIRST, COUNT = int(os.environ.get("FIRST", "0")), int(os.environ.get("SEEDS", "24"))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_narrowed_equals_masked(seed):
    rng = np.random.default_rng(seed)
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        (apply_fn, params, inputs), log = random_model(seed)
        trace = js.trace(apply_fn, params, *inputs)
        found = js.structured.groups(trace, allow=ALLOW).prunable
        whole = apply_fn(params, *inputs)
        assert np.all(np.isfinite(whole))

        def some(group, count):
            copies = int(np.prod(group.copies))
            chosen = [rng.permutation(group.size)[:count] for _ in range(copies)]
            return np.reshape(chosen, (*group.copies, count))

        drops = [{name: some(g, 1)} for name, g in found.items()]
        drops.append({name: some(g, g.size // 2) for name, g in found.items()})
        for drop in drops:
            small = js.structured.narrow(trace, params, drop, allow=ALLOW)
            masks = js.structured.masks(trace, drop, allow=ALLOW)
            got = small.apply_fn(small.params, *inputs)
            want = apply_fn(js.patterns.apply(params, masks), *inputs)
            scale = max(float(np.abs(want).max()), 1e-3)
            np.testing.assert_allclose(
                got / scale, want / scale, atol=1e-12, err_msg="\n".join([*log, *drop])
            )
        if np.allclose(want, whole, rtol=1e-6):  # by all of them together
            pytest.skip("the result of this model does not show what is masked")
