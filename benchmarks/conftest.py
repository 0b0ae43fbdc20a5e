"""Benchmarks: each measures ours and a reference in turn, in one run.

    pytest benchmarks       # the tables, and benchmarks/results/<device>/<what>.json
    pytest benchmarks --device gpu    # sizes for an accelerator

A shared machine changes its speed within seconds, so what is compared is timed in turn
(A B C A B C ...), and a ratio is the median of the ratios of each turn. Nothing here
fails for being slow; whether results are right is asserted.
"""

import contextlib
import gc
import json
import os
import pathlib
import platform
import time

import jax
import numpy as np
import pytest

# Scripts and references that no test is collected from.
collect_ignore = [
    "_column_sweep.py",
    "_sequential.py",
    "layerwise_quality.py",
    "second_order_quality.py",
    "sparse_training_quality.py",
    "step_scratch.py",
    "structured_quality.py",
]

RESULTS = pathlib.Path(__file__).parent / "results"
_rows: dict[str, list[dict]] = {}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "gpu", "tpu"))
    parser.addoption("--rounds", type=int, default=15)


@pytest.fixture
def large(request) -> bool:
    """Whether sizes are those of an accelerator."""
    return request.config.getoption("--device") != "cpu"


@pytest.fixture
def compare(request):
    """Times functions in turn and records medians and ratios to the first."""
    asked = request.config.getoption("--rounds")
    rows = _rows_of(request)

    def run(
        name: str,
        calls: dict,
        *,
        floor_ms: float | None = None,
        rounds: int | None = None,
    ) -> dict:
        rounds = min(asked, rounds or asked)
        times = {label: [] for label in calls}
        for turn in range(rounds + 2):
            # A full collection takes 0.3 s where a large model was traced. Whose turn
            # it would fall into is chance.
            gc.collect()
            with without_collection():
                for label, call in calls.items():
                    begin = time.perf_counter()
                    jax.block_until_ready(call())
                    if turn >= 2:  # the first turns compile and warm up
                        times[label].append(1e3 * (time.perf_counter() - begin))
        first = np.array(times[next(iter(calls))])
        for label, values in times.items():
            row = {
                "benchmark": name,
                "what": label,
                "median_ms": round(float(np.median(values)), 3),
                "min_ms": round(float(np.min(values)), 3),
                "ratio": round(float(np.median(np.array(values) / first)), 3),
                "speedup": round(float(np.median(first / np.array(values))), 2),
                "floor_ms": floor_ms,
            }
            rows.append(row)
        return times

    return run


@contextlib.contextmanager
def without_collection():
    """Keeps Python's garbage collector from running, as `timeit` does."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def record(request):
    """Adds a row that is no time."""
    return lambda **row: _rows_of(request).append(row)


def _rows_of(request) -> list[dict]:
    """The rows of a file of benchmarks: each file has its own results."""
    return _rows.setdefault(request.path.stem.removeprefix("test_"), [])


def environment(device: str) -> dict:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":")[1].strip() for line in file if "model name" in line
            ]
        cpu = names[0] if names else cpu
    return {
        "device": device,
        "accelerator": jax.devices()[0].device_kind,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "load": [round(x, 2) for x in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }


def pytest_sessionfinish(session):
    device = session.config.getoption("--device")
    folder = RESULTS / device
    for what, rows in _rows.items():
        folder.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(device), "rows": rows}
        target = folder / f"{what}.json"
        aside = target.with_suffix(".tmp")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(aside, target)


def pytest_terminal_summary(terminalreporter):
    for row in (row for rows in _rows.values() for row in rows):
        said = "  ".join(f"{k}={v}" for k, v in row.items() if v is not None)
        terminalreporter.write_line(said)
