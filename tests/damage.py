"""Flips single bits of files, at seeded places."""

import contextlib
import pathlib
import random
import warnings


@contextlib.contextmanager
def flipped(file: pathlib.Path, bit: int):
    """The file with one bit changed, and after it as it was."""
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    file.write_bytes(changed)
    try:
        yield
    finally:
        file.write_bytes(whole)


def places(files, count, seed=0):
    """`count` bits of some files: each file as often as another, whatever its size."""
    draw, files = random.Random(seed), sorted(files)
    chosen = (files[i % len(files)] for i in range(count))
    return [(file, draw.randrange(8 * file.stat().st_size)) for file in chosen]


def error_of(action):
    """What an action's ValueError says; None where it has none.

    Warnings of what is damaged and was not asked for are no error.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*asked for is as it was", UserWarning)
        try:
            action()
        except ValueError as error:
            return str(error)
    return None
