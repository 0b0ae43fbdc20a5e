"""The data of the examples: digits from scikit-learn, larger files from a folder."""

import io
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits


class Digits(NamedTuple):
    """1,797 images of digits, 8 x 8 pixels, split once and for all."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def digits() -> Digits:
    """1,347 images to train and 450 to test, standardised by the training images."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype(np.float32), y[order].astype(np.int32)
    x = (x - x[:1347].mean()) / x[:1347].std()
    x = x.reshape(-1, 8, 8, 1)
    return Digits(x[:1347], y[:1347], x[1347:], y[1347:])


def folder() -> Path:
    """Where larger files are looked for: `JAXSPARSE_DATA`, or `../shared/data`."""
    named = os.environ.get("JAXSPARSE_DATA")
    if named:
        return Path(named)
    return Path(__file__).resolve().parents[2] / "shared" / "data"


def find(*names: str, skip_missing: bool = False) -> list[Path]:
    """The paths of files in `folder()`; says what is missing and leaves, if any is.

    Args:
      *names: paths within the folder.
      skip_missing: leave with exit code 0 and not with 2.

    Returns:
      One path for each name.
    """
    paths = [folder() / name for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        print("This example needs files that are not part of jaxsparse. Missing:")
        for path in missing:
            print(f"  {path}")
        if "JAXSPARSE_DATA" in os.environ:
            print("Looked in the folder that JAXSPARSE_DATA names.")
        else:
            print("Looked in the folder shared/data beside the checkout.")
        print(
            "To look elsewhere, set JAXSPARSE_DATA to a folder that holds "
            f"{', '.join(names)}."
        )
        print("Nothing was run." + (" (--skip-missing)" if skip_missing else ""))
        sys.exit(0 if skip_missing else 2)
    return paths


def decode(file: Mapping[str, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of a `*_jpeg_*.npz` file, and their labels. It needs pillow.

    Args:
      file: what `np.load` gave.
      count: how many.

    Returns:
      Images, uint8 [count, height, width, 3], and labels.
    """
    from PIL import Image

    cuts = file["offsets"][: count + 1]
    stream = file["jpeg"][: cuts[-1]].tobytes()
    opened = (
        Image.open(io.BytesIO(stream[i:j])).convert("RGB")
        for i, j in itertools.pairwise(cuts)
    )
    return np.stack([np.asarray(image) for image in opened]), file["y"][:count]


def augmented(
    x: np.ndarray, y: np.ndarray, size: int, *, shift: int = 4
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random batches without end: each shifted, every other image mirrored.

    Args:
      x: images [n, side, side, 3].
      y: labels.
      size: of a batch.
      shift: by at most so many pixels; what comes in is black.
    """
    rng, side = np.random.default_rng(0), x.shape[1]
    while True:
        rows = rng.integers(0, len(x), size)
        images = np.pad(x[rows], [(0, 0), (shift, shift), (shift, shift), (0, 0)])
        i, j = rng.integers(0, 2 * shift + 1, 2)
        images = images[:, i : i + side, j : j + side]
        images[::2] = images[::2, :, ::-1]
        yield images, y[rows].astype(np.int32)
