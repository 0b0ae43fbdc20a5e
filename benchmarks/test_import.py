"""What `import jaxsparse` adds to `import jax, flax, optax`."""

import statistics
import subprocess
import sys

BEFORE = "import jax, flax, optax"
TIMED = (
    "import time; t = time.perf_counter(); import jaxsparse; "
    "print(time.perf_counter() - t)"
)


def test_import_time(record):
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", f"{BEFORE}; {TIMED}"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for _ in range(7)
    ]
    record(
        benchmark="import",
        what="import jaxsparse after jax, flax, optax",
        median_ms=round(1e3 * statistics.median(seconds), 1),
    )
