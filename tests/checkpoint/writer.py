"""Saves until a file is there that says it is enough; run by `test_lock.py`.

`python writer.py DIRECTORY NUMBER START STOP`
"""

import pathlib
import sys
import time

import numpy as np

import jaxsparse as js


def main(directory, number, start, stop):
    params = {"w": np.full((64, 8), number, np.float32)}
    while not start.exists():
        time.sleep(0.001)
    step = 0
    while step < 3 or not stop.exists():
        step += 1
        try:
            js.checkpoint.save(directory, step=step, params=params, keep=3)
        except OSError as error:
            sys.exit(f"refused at step {step}: {error}")
    print("saved", step)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *map(pathlib.Path, sys.argv[3:]))
