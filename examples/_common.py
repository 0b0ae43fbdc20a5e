"""What the examples share: their options on the command line."""

import argparse
from pathlib import Path


def arguments(
    description: str, *, small: str, out: str | None = None, needs_files: bool = False
) -> argparse.Namespace:
    """The options of an example; a folder for its results is made.

    Args:
      description: what the example does.
      small: what `--small` leaves.
      out: the folder of results, if there are any.
      needs_files: whether it reads files that are not part of jaxsparse.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help=small)
    if needs_files:
        text = "end without an error if files are missing"
        parser.add_argument("--skip-missing", action="store_true", help=text)
    if out is not None:
        parser.add_argument("--out", type=Path, default=Path(out))
    args, _ = parser.parse_known_args()  # a notebook has arguments of its own
    if out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    return args
