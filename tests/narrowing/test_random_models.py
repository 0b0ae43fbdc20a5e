"""Masked and narrowed agree for models that nobody wrote.

`SEEDS=1000 pytest tests/narrowing/test_random_models.py -m ""` looks at more of them.
"""

import os

import numpy as np
import pytest
from zoo.checks import assert_narrowed_equals_masked, each_one, half_of_all
from zoo.random_models import random_model

FIRST, COUNT = int(os.environ.get("FIRST", "0")), int(os.environ.get("SEEDS", "200"))
FEW = {0, 3, 163}  # the last one: copies that lie in each other's axes


@pytest.mark.usefixtures("relaxed_promotion", "x64")
@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=[] if seed in FEW else pytest.mark.exhaustive)
        for seed in range(FIRST, FIRST + COUNT)
    ],
)
def test_narrowed_equals_masked(seed):
    rng = np.random.default_rng(seed)
    (apply_fn, params, inputs), log = random_model(seed)
    changes = assert_narrowed_equals_masked(
        apply_fn,
        params,
        inputs,
        drops=lambda found: each_one(found, rng) + half_of_all(found, rng),
        message="\n".join(log),
    )
    if not changes[-1]:  # by all of them together
        pytest.skip("the result of this model does not show what is masked")
