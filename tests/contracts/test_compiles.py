"""How many programs a first call compiles; a second one compiles none.

The numbers may only fall. They are counted in a process of their own, in this order:
what an earlier case has compiled, a later one need not.
"""

import functools
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import preloaded
import pytest

import jaxsparse as js

MOST = {
    "prune 40 shapes": 6,
    "prune 5 larger shapes": 4,
    "prune": 4,
    "prune globally": 1,
    "prune 2:4": 3,
    "prune tiles": 1,
    "prune channels": 2,
    "prune by outputs": 3,
    "init of enforce": 18,
    "update of enforce": 70,
    "assert_sparse": 2,
    "calibration": 7,
    "wanda": 49,
    "layerwise": 24,
    "group_scores": 30,
    "sparsity_of": 0,
    "init of rigl": 11,
    "update of rigl": 22,
    "init of frugal": 9,
    "update of frugal": 48,
    "jitted cram": 1,
    "init_mask_logits": 6,
    "jitted masked_by_logits": 1,
    "jitted coordinate_grads": 1,
    "jitted random_grads": 1,
    "jitted grasp": 1,
    "guidance": 5,
    "guidance_masks": 13,
}


def cases() -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    n = lambda *s: jax.device_put(rng.standard_normal(s).astype(np.float32))
    kernel = lambda *s: {"kernel": n(*s)}
    many = {f"l{i}": kernel(8 + i, 8 + 2 * i) for i in range(40)}
    larger = {f"l{i}": kernel(256, 260 + 8 * i) for i in range(5)}
    params = {"a": kernel(8, 16), "b": kernel(16, 16), "c": kernel(16, 8)}
    copies = jax.device_put(jax.device_get(params))
    prune = functools.partial(js.prune, params, axes=js.Axes(input=(0,), output=(1,)))

    def model(p, x):
        x = jnp.tanh(jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"])
        return x @ p["c"]["kernel"]

    batches = [n(8, 8) for _ in range(2)]
    trace = js.trace(model, params, batches[0])
    tx = js.enforce(optax.chain(js.prune_schedule(0.5, every=1), optax.adam(1e-3)))
    state = functools.cache(lambda: tx.init(params))
    statistics = functools.cache(lambda: js.calibration.run(trace, params, batches))
    groups = js.coupling.groups(trace).prunable
    key = jax.random.key(0)
    moving = js.transforms.rigl(0.5, every=2, key=key).wrap(optax.adam(1e-3))
    split = js.transforms.frugal(
        *(optax.scale_by_adam(), optax.scale_by_sign()),
        density=0.5,
        every=2,
        key=key,
    )
    loss = lambda p, x: jnp.mean(model(p, x) ** 2)
    crammed = jax.jit(js.masking.cram(loss, sparsities=(0.5, 0.75)))
    pattern, axes = js.NM(2, 4), js.Axes(input=(0,), output=(1,))
    of_rigl = functools.cache(lambda: moving.init(params))
    of_frugal = functools.cache(lambda: split.init(params))
    logits = functools.cache(
        lambda: js.masking.init_mask_logits(params, pattern=pattern, axes=axes, key=key)
    )
    masked = jax.jit(
        functools.partial(js.masking.masked_by_logits, pattern=pattern, axes=axes)
    )
    zeroth = {
        name: jax.jit(
            functools.partial(getattr(js.zeroth_order, name), loss, **options)
        )
        for name, options in {
            "coordinate_grads": {},
            "random_grads": {"count": 2},
            "grasp": {"count": 2},
        }.items()
    }
    indices = {k: {"kernel": np.arange(3, dtype=np.int32)} for k in params}
    return {
        "prune 40 shapes": lambda: js.prune(many, 0.9),
        "prune 5 larger shapes": lambda: js.prune(larger, 0.9),
        "prune": lambda: prune(0.5),
        "prune globally": lambda: prune(0.5, pattern=js.Unstructured("global")),
        "prune 2:4": lambda: prune(pattern=js.NM(2, 4)),
        "prune tiles": lambda: prune(0.5, pattern=js.Block((4, 4))),
        "prune channels": lambda: prune(0.5, pattern=js.Channel()),
        "prune by outputs": lambda: prune(0.5, pattern=js.Unstructured("output")),
        "init of enforce": lambda: tx.init(params),
        "update of enforce": lambda: tx.update(copies, state(), params),
        "assert_sparse": lambda: js.assert_sparse(
            state(), js.patterns.apply(params, prune(0.5).masks)
        ),
        "calibration": lambda: js.calibration.run(trace, params, batches),
        "wanda": lambda: js.scores.wanda(params, statistics()),
        "layerwise": lambda: js.oneshot.layerwise(model, params, batches, sparsity=0.5),
        "group_scores": lambda: js.channels.channel_scores(
            groups, js.scores.magnitude(params)
        ),
        "sparsity_of": lambda: js.patterns.sparsity_of(prune(0.5).masks, params),
        "init of rigl": lambda: moving.init(params),
        "update of rigl": lambda: moving.update(copies, of_rigl(), params),
        "init of frugal": lambda: split.init(params),
        "update of frugal": lambda: split.update(copies, of_frugal(), params),
        "jitted cram": lambda: crammed(params, batches[0], key=key),
        "init_mask_logits": logits.__wrapped__,
        "jitted masked_by_logits": lambda: masked(params, logits(), key=key),
        "jitted coordinate_grads": lambda: zeroth["coordinate_grads"](
            params, batches[0], indices=indices
        ),
        "jitted random_grads": lambda: zeroth["random_grads"](
            params, batches[0], key=key
        ),
        "jitted grasp": lambda: zeroth["grasp"](params, batches[0], key=key),
        "guidance": lambda: js.contrib.guidance(params, [copies, copies]),
        "guidance_masks": lambda: js.contrib.guidance_masks(
            js.scores.magnitude(params), threshold=0.5
        ),
    }


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, list[int]]:
    said = tmp_path_factory.mktemp("compiles") / "said.txt"
    script = pathlib.Path(__file__).resolve()
    process = preloaded.start(script, environment={}, output=said)
    assert preloaded.finish(process) == 0, said.read_text()
    return json.loads(said.read_text())


@pytest.mark.parametrize("name", MOST)
def test_the_first_call_compiles_no_more_than_before(counted, name):
    assert counted[name][0] <= MOST[name]


@pytest.mark.parametrize("name", MOST)
def test_the_second_call_compiles_nothing(counted, name):
    assert counted[name][1] == 0


def main() -> None:
    programs = 0

    def count(event: str, duration: float, **_: Any) -> None:
        nonlocal programs
        programs += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    warnings.simplefilter("ignore")
    found: dict[str, list[int]] = {}
    for name, call in cases().items():
        found[name] = []
        for _ in range(2):
            before = programs
            call()
            found[name].append(programs - before)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
