"""Kernels whose parts read different inputs: an axis is cut into equal pieces.

A gated cell multiplies two thirds of one kernel by its state and the last third by what
it resets of it. Each piece is a matrix of its own then, along a batch axis.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_MOST = 16  # each piece has statistics of its own


class Cut(NamedTuple):
    """How one axis falls into pieces.

    Attributes:
      axis: which one of several.
      size: of a piece.
      taken: for each reader the numbers of the pieces that it reads.
    """

    axis: int
    size: int
    taken: tuple[tuple[int, ...], ...]


def cut_of(reads: Sequence[np.ndarray], sizes: Sequence[int]) -> Cut | None:
    """The largest equal pieces that every reader has all of, or nothing of."""
    for axis, size in enumerate(sizes):
        lines = []
        for mask in reads:
            rows = np.moveaxis(mask.reshape(sizes), axis, 0).reshape(size, -1)
            if np.any(rows != rows[:, :1]):
                break
            lines.append(rows[:, 0])
        else:
            ends = [np.flatnonzero(np.diff(line)) + 1 for line in lines]
            piece = math.gcd(size, *np.concatenate(ends).tolist())
            if size // piece > _MOST:
                return None
            taken = tuple(tuple(np.flatnonzero(x[::piece]).tolist()) for x in lines)
            return Cut(axis, piece, taken)
    return None


def piece_of(inputs: np.ndarray, sizes: Sequence[int], cut: Cut, at: int) -> np.ndarray:
    """The places of one piece's inputs."""
    here = range(at * cut.size, (at + 1) * cut.size)
    return np.take(inputs.reshape(sizes), here, axis=cut.axis).reshape(-1)


def with_pieces(
    batch: np.ndarray, sizes: Sequence[int], inserted: Sequence[tuple[int, int, int]]
) -> np.ndarray:
    """Flat batch indices where some batch axes are new."""
    places, sizes = list(np.unravel_index(batch, sizes) if sizes else ()), list(sizes)
    for at, size, index in inserted:
        places.insert(at, np.full(batch.shape, index))
        sizes.insert(at, size)
    if not places:
        return batch
    return np.ravel_multi_index(tuple(places), tuple(sizes))
