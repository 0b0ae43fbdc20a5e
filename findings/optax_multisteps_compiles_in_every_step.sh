#!/usr/bin/env bash
# Versions: optax 0.2.8, jax 0.10.2 (Python 3.11 or newer), CPU.
#
# One would guess: an update without jit compiles its operations in the first steps and
# nothing after them, as that of `optax.adam` does, and so does the same optimizer within
# `optax.MultiSteps`.
#
# What happens: `MultiSteps` compiles one program in every step, for ever. Its update
# calls `lax.cond` with functions that it makes anew each time, and without jit a branch
# is compiled for each new function.
#
# Where it is documented: JAX's "JIT compilation" page says that jit's cache goes by the
# function's identity; that an update of MultiSteps has to be jitted is not said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 optax==0.2.8
cat > "$folder/program.py" <<'PYTHON'
import jax, jax.numpy as jnp, optax

compiled = []
event = "/jax/core/compile/backend_compile_duration"
listen = lambda name, seconds, **_: compiled.append(seconds) if name == event else None
jax.monitoring.register_event_duration_secs_listener(listen)
params = {"w": jnp.ones((4, 4))}
adam = optax.adam(1e-3)
for tx in (adam, optax.MultiSteps(adam, every_k_schedule=2).gradient_transformation()):
    state = tx.init(params)
    for step in range(8):
        if step == 4:
            compiled.clear()
        _, state = tx.update(params, state, params)
    print(len(compiled), end=" ")
PYTHON
said=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py")
echo "programs compiled in steps 5 to 8, adam and MultiSteps(adam): $said"
test "$said" = "0 4 "
