"""What pruned kernels take in each sparse format, as text."""

from collections.abc import Mapping

from jaxsparse import _checks
from jaxsparse.formats.weights import ROUNDED
from jaxsparse.report._order import natural_order
from jaxsparse.report._tables import size_text


def format_table(sizes: Mapping[str, Mapping[str, int]]) -> str:
    """Format the bytes of pruned kernels in each sparse format as a table.

    The last column is the smallest format of a kernel among those that give back the
    same weights, which `Int8Tiles` does not. The last line are the sums: of the
    smallest formats, and of those that every kernel has.

    Args:
      sizes: what `js.formats.sizes(params, masks)` gives.

    Returns:
      Plain text, a line for each kernel.

    Raises:
      TypeError: anything other than sizes.
      ValueError: no kernels.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> kernel = jnp.arange(4096.0).reshape(64, 64)
      >>> axes = js.Axes((0,), (1,))
      >>> params, masks = js.prune({"kernel": kernel}, 0.9, axes=axes)
      >>> print(js.report.format_table(js.formats.sizes(params, masks, axes=axes)))
      kernel     dense   Bitmap    Csr16  Int8Tiles  smallest
      kernel  16.0 KiB  2.1 KiB  2.7 KiB    1.3 KiB  Bitmap 13.1 %
      total   16.0 KiB  2.1 KiB  2.7 KiB    1.3 KiB  13.1 %
    """
    _checks.check_mapping(Mapping, "js.formats.sizes(params, masks)", sizes=sizes)
    for path, own in sizes.items():
        _checks.check_numbers(**{path: own})
        if not own.get("dense"):
            raise ValueError(f"{path}: sizes say nothing of dense; got {dict(own)}.")
    if not sizes:
        raise ValueError("sizes is empty: no kernel is pruned.")
    names = list(dict.fromkeys(name for own in sizes.values() for name in own))
    rows = [("kernel", *names, "smallest")]
    least = 0
    for path in natural_order(sizes):
        own = sizes[path]
        exact = {name: n for name, n in own.items() if name not in ROUNDED}
        best = min(exact, key=exact.__getitem__)
        least += own[best]
        cells = (size_text(own[name]) if name in own else "-" for name in names)
        rows.append((path, *cells, f"{best} {_share(own[best], own['dense'])}"))
    total = sum(own["dense"] for own in sizes.values())
    sums = (
        size_text(sum(own[name] for own in sizes.values()))
        if all(name in own for own in sizes.values())
        else "-"
        for name in names
    )
    rows.append(("total", *sums, _share(least, total)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 1)]
    lines = []
    for first, *cells, last in rows:
        middle = (c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *middle, last]))
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"
