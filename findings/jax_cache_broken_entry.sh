#!/usr/bin/env bash
# Versions: jax 0.10.2, jaxlib 0.10.2, on CPU.
#
# One would guess: an entry of the persistent compilation cache that cannot be read (its
# writer was killed; entries are written in place) is replaced by the program that is
# compiled instead.
#
# What happens: each run warns, compiles, and leaves the entry as it is, because an entry
# whose file exists is not written again. The program is never cached any more.
#
# Where it is documented: only in the docstring of the cache's `put`, in JAX's sources:
# an existing key is left alone even if the value is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat > "$folder/program.py" <<'PYTHON'
import warnings

import jax, jax.numpy as jnp

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    jax.jit(lambda x: jnp.tanh(x) + 1)(jnp.ones(3)).block_until_ready()
print(sum("Error reading persistent compilation cache" in str(w.message) for w in caught))
PYTHON
export JAX_PLATFORMS=cpu JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_COMPILATION_CACHE_DIR="$folder/cache"
run() { "$folder/venv/bin/python" "$folder/program.py"; }

whole=$(run)
entry=$(ls "$folder"/cache/jit__lambda*-cache)
truncate --size=40 "$entry"
first=$(run)
second=$(run)
size=$(stat --format=%s "$entry")
echo "warnings before: $whole; after the entry was cut to 40 bytes: $first, then $second; it has $size bytes"
(( whole == 0 && first > 0 && second > 0 && size == 40 ))
