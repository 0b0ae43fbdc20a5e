#!/usr/bin/env bash
# Versions: flax 0.12.8, jax 0.10.2 (Python 3.11 or newer), CPU.
#
# One would guess: `nnx.split` and `nnx.merge` are pure, as `jax.tree.flatten` and
# `unflatten` are. The merged model is another one: it may be called in training mode,
# also in a jitted function that closes over the part of the state that is no parameter.
#
# What happens: the merged model has the very variables of the state, and so those of the
# model that was split. Called in training mode it moves the statistics of that one too,
# and in a jitted function it is a `TraceContextError`, "Cannot mutate BatchStat from a
# different trace level"; likewise dropout, whose keys are counted. With
# `nnx.merge(graphdef, params, rest, copy=True)` it is what one would guess.
#
# Where it is documented: the docstring of `nnx.merge` has the argument `copy`, False by
# default; that without it two models share their statistics is not said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 flax==0.12.8
cat > "$folder/program.py" <<'PYTHON'
import jax, jax.numpy as jnp
from flax import nnx

x = jnp.ones((3, 2))
for options in ({}, {"copy": True}):
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    nnx.merge(graphdef, params, rest, **options)(x)
    print("moved" if model.mean[...].any() else "kept", end=" ")
    try:
        jax.jit(lambda p, x: nnx.merge(graphdef, p, rest, **options)(x))(params, x)
        print("jitted", end=" ")
    except Exception as error:
        print(type(error).__name__, end=" ")
PYTHON
said=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py")
echo "statistics of the split model and what jit says, without a copy and with one: $said"
test "$said" = "moved TraceContextError kept jitted "
