"""The order in which layers are shown: block 2 before block 10."""

import re
from collections.abc import Iterable
from typing import Any


def natural_order(paths: Iterable[str]) -> list[str]:
    """Paths as they come, but by their numbers where these are all that differs.

    A tree sorts its keys as text, `block_10` before `block_2`. Names without numbers
    keep the order of the model.
    """
    paths = list(paths)
    seen: dict[Any, int] = {}
    keys: dict[str, list[int]] = {}
    for path in paths:
        before: tuple[Any, ...] = ()
        keys[path] = []
        for i, part in enumerate(re.split(r"(\d+)", path)):
            here = (*before, part)
            # Numbers and text alternate, so that like is compared with like.
            keys[path].append(int(part) if i % 2 else seen.setdefault(here, len(seen)))
            before = here
    return sorted(paths, key=keys.__getitem__)
