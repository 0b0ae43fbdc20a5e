"""Runs a script in a process of its own, which finds its libraries imported already.

A server imports them once and is forked for each script, which saves some seconds each.
JAX starts its threads when it first computes: in the fork.
"""

import multiprocessing
import os
import pathlib
import runpy
import sys
import traceback
import warnings

_LIBRARIES = (
    "flax.linen",
    "flax.nnx",
    "jaxsparse.report",
    "matplotlib.pyplot",
    "orbax.checkpoint",
    "sklearn.datasets",
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(_LIBRARIES))


def start(
    script: pathlib.Path,
    *arguments: str,
    environment: dict[str, str],
    output: pathlib.Path,
) -> multiprocessing.process.BaseProcess:
    """Starts a script; what it prints goes to a file."""
    process = _context.Process(
        target=_main, args=(script, arguments, environment, output)
    )
    process.start()
    return process


def finish(process: multiprocessing.process.BaseProcess) -> int | None:
    """Waits, ten minutes at most, and gives the exit code."""
    process.join(timeout=600)
    process.kill()
    process.join()
    return process.exitcode


def _main(script, arguments, environment, output):
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(script.parent)
    sys.path.insert(0, str(script.parent))
    sys.argv = [script.name, *arguments]
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    warnings.simplefilter("error", DeprecationWarning)
    try:
        runpy.run_path(script.name, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
