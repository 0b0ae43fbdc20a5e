"""One of two processes that save and prune together; run by `test_two_processes.py`.

`python one_of_two.py DIRECTORY PORT RANK`
"""

import json
import pathlib
import shutil
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js


def spread(x, sharding):
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def check(got, expected):
    for shard in got.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])


def main(directory, port, rank):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    mesh = jax.make_mesh((4,), ("d",))
    sharded, everywhere = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    w = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    params = {"w": spread(w, sharded)}
    masks = {"w": spread(w > 0, sharded)}
    # What is local to a process, and a mask whose shards hold no whole bytes.
    state = (jnp.zeros(()), jax.random.key(3), 7, spread(w[:4] > 0, sharded))
    for step in (1, 2, 2, 3):
        js.checkpoint.save(
            directory, step=step, params=params, masks=masks, opt_state=state, keep=2
        )
    assert js.checkpoint.steps(directory) == [2, 3]

    got = js.checkpoint.restore(directory, params=params, opt_state=state)
    assert got.masks["w"].sharding.is_equivalent_to(sharded, 2)
    check(got.masks["w"], w > 0)
    check(got.opt_state[3], w[:4] > 0)
    assert got.opt_state[1:3] == state[1:3]
    shape = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=everywhere)
    got = js.checkpoint.restore(directory, params={"w": shape})
    check(got.params["w"], w)
    check(got.masks["w"], w > 0)
    damaged(pathlib.Path(directory), w, params)
    import of_two  # beside this script

    of_two.main(directory)
    print("as saved")


def damaged(directory, w, params):
    """What each process has seen a part of is refused by both."""
    stamp = json.loads((directory / "3" / "stamp" / "metadata").read_text())
    assert stamp["checksums"]["params"]["w"] == zlib.crc32(w.tobytes())
    js.checkpoint.save(directory, step=4, params={"w": params["w"] + 1})
    if jax.process_index() == 0:
        shutil.rmtree(directory / "4" / "params")
        shutil.copytree(directory / "3" / "params", directory / "4" / "params")
        (directory / "4" / "stamp" / "files.json").unlink()
    multihost_utils.sync_global_devices("changed")
    message = r"params w is not what was saved.*whole is 3"
    with pytest.raises(ValueError, match=message):
        js.checkpoint.restore(directory, params=params)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
