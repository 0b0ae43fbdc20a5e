#!/usr/bin/env bash
# Versions: jax 0.12.0.1, jaxlib 0.12.0 (Python 3.12 or newer: PYTHON=python3.13 ...), CPU.
#
# One would guess: `jnp.zeros(shape, out_sharding=s)`, with the sharding `s` of another
# array on a mesh with explicit axes, is an array with that sharding, inside of jit too,
# as it is in jax 0.10.2. Also `device=s`, and `jax.lax.full(..., sharding=s)`.
#
# What happens: without `jax.set_mesh` around it the traced array has no mesh at all, and
# an operation that takes both arrays raises ShardingTypeError ("operand sharding must be
# equal to update sharding"). `jax.sharding.reshard(x, s)` gives it the sharding.
#
# Where it is documented: the guide "Explicit sharding" sets the mesh as a context first;
# that `out_sharding` is dropped without it is not said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.12.0.1
cat > "$folder/program.py" <<'PYTHON'
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
x = jax.device_put(jnp.ones((2, 3)), NamedSharding(mesh, P("x", None)))

@jax.jit
def f(x):
    sharding = jax.typeof(x).sharding
    zeros = jnp.zeros(x.shape, out_sharding=sharding)
    placed = jax.sharding.reshard(zeros, sharding)
    print(jax.typeof(x), jax.typeof(zeros), jax.typeof(placed), sep=" | ")
    return x

f(x)
PYTHON
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2
said=$("$folder/venv/bin/python" "$folder/program.py")
echo "the other array | zeros like it | after reshard: $said"
test "$said" = "float32[2@x,3] | float32[2,3] | float32[2@x,3]"
