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
