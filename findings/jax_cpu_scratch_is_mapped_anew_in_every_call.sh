#!/usr/bin/env bash
# Versions: jax 0.10.2, jaxlib 0.10.2, on CPU under Linux with glibc.
#
# One would guess: the scratch memory of a compiled program costs nothing from its second
# call on, and a program with a little more scratch is a little slower.
#
# What happens: XLA's CPU runtime takes all scratch of a program from the C allocator in
# each call and gives it back. glibc serves blocks of more than 32 MiB by fresh mappings,
# whatever a program does: each page faults in each call and is cleared by the kernel. A
# training step whose scratch grows from 31 to 34 MiB takes 8,000 more page faults a call
# (several milliseconds). MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the
# environment end it.
#
# Where it is documented: mallopt(3), M_MMAP_THRESHOLD, has the allocator's side. JAX's
# and XLA's documentation do not say where scratch memory comes from.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat > "$folder/program.py" <<'PYTHON'
import resource, sys

import jax, jax.numpy as jnp

mib = int(sys.argv[1])
x = jnp.ones((mib * 64, 4096))  # of 4 bytes: mib MiB
narrow = jnp.ones((4096, 1))


@jax.jit
def step(x, narrow):
    # One array of x's size is held between its maker and its two readers.
    held = jnp.sort(x, axis=1)
    return held @ narrow, jnp.sum(held)


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


scratch = step.lower(x, narrow).compile().memory_analysis().temp_size_in_bytes / 2**20
for _ in range(5):
    jax.block_until_ready(step(x, narrow))
before = faults()
for _ in range(5):
    jax.block_until_ready(step(x, narrow))
print(f"{scratch:.0f} {(faults() - before) // 5}")
PYTHON
export JAX_PLATFORMS=cpu
run() { "$folder/venv/bin/python" "$folder/program.py" "$1"; }
read -r small few < <(run 24)
read -r large many < <(run 40)
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
read -r _ kept < <(run 40)
echo "page faults a call: $few with $small MiB of scratch, $many with $large MiB; $kept with thresholds of 4 GiB"
(( few < many / 4 && many > 5000 && kept < many / 4 ))
