#!/usr/bin/env bash
# Versions: jax 0.10.2, jaxlib 0.10.2, on CPU.
#
# One would guess: a persistent compilation cache is its files; copied to another folder
# (a CI artifact, another user's home) it is as good as before.
#
# What happens: on CPU every entry is a miss in the new folder. With a cache JAX also
# sets XLA's `xla_gpu_per_fusion_autotune_cache_dir` to a folder within it, and that path
# is part of the compile options, which are hashed into each key, on CPUs too. With
# jax_persistent_cache_enable_xla_caches="none" the copy is read.
#
# Where it is documented: the guide "Persistent compilation cache" has the option, for
# GPUs; that without it keys depend on the folder is not said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat > "$folder/program.py" <<'PYTHON'
import jax, jax.numpy as jnp

hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
jax.jit(lambda x: jnp.tanh(x) + 1)(jnp.ones(3)).block_until_ready()
print(len(hits))
PYTHON
export JAX_PLATFORMS=cpu JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
run() { JAX_COMPILATION_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" "$folder/program.py"; }

run first > /dev/null
same=$(run first)
cp -r "$folder/first" "$folder/second"
moved=$(run second)
export JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES=none
run third > /dev/null
cp -r "$folder/third" "$folder/fourth"
without=$(run fourth)
echo "hits in the same folder: $same; in a copy: $moved; in a copy, without XLA's caches: $without"
(( same > 0 && moved == 0 && without > 0 ))
