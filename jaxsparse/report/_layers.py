"""How well each layer was solved, as text."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsparse import _checks

_HEAD = ("kernel", "sparsity", "relative error", "masked only", "dead", "rows", "s")


def layer_table(
    info: Mapping[str, Any], *, left_dense: Mapping[str, str] | None = None
) -> str:
    """Format the result of `js.oneshot.layerwise` as a table.

    The relative error is that of a kernel's outputs on the calibration data: 1 for a
    kernel of zeros. "Masked only" is the error with the same mask and unchanged
    remaining weights. For several matrices (experts, stacked layers) the table shows
    the mean of the known errors; the error of an expert that no row reached is unknown.

    Args:
      info: the infos by path.
      left_dense: the result's, by path why a parameter stayed dense.

    Returns:
      Plain text, a line for each kernel, then for each that stayed dense.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> x = jnp.array([[1.0, 1.0], [1.0, -1.0]])
      >>> pruned = js.oneshot.layerwise(
      ...     lambda p, x: x @ p["w"], {"w": jnp.array([[1.0], [2.0]])}, [x],
      ...     sparsity=0.5, show=False)
      >>> js.report.layer_table(pruned.info).splitlines()[1].split()[:3]
      ['w', '0.500', '2.00e-01']
    """
    check_info(info)
    rows: list[tuple[str, ...]] = [_HEAD]
    for path, layer in info.items():
        mean = lambda x: float(np.mean(x))
        rows.append((
            path,
            f"{mean(layer.sparsity):.3f}",
            f"{mean_of_known(layer.relative_error):.2e}",
            f"{mean_of_known(layer.masked_error):.2e}",
            f"{mean(layer.dead):.4g}",
            f"{mean(layer.rows):.4g}",
            f"{layer.seconds:.2f}",
        ))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    line = lambda row: "  ".join(
        [row[0].ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    )
    rest = [f"Left dense: {reason}" for reason in (left_dense or {}).values()]
    return "\n".join([*map(line, rows), *rest])


def check_info(info: Mapping[str, Any]) -> None:
    """Raises unless these are infos by path."""
    _checks.check_mapping(made_by="js.oneshot.layerwise(...).info", info=info)
    for path, layer in info.items():
        if not hasattr(layer, "relative_error"):
            raise TypeError(
                f"{path}: info must hold what js.oneshot.layerwise gives, got "
                f"{_checks.shown(layer)}."
            )


def mean_of_known(errors: np.ndarray) -> float:
    """Return the mean of the errors that are not NaN.

    Args:
      errors: the errors of a kernel's matrices.

    Returns:
      A number, NaN if none is known.

    Example:
      >>> import numpy as np, jaxsparse as js
      >>> js.report.mean_of_known(np.array([0.25, np.nan]))
      0.25
    """
    _checks.check_arrays(errors=errors)
    known = np.asarray(errors)
    known = known[~np.isnan(known)]
    return float(np.mean(known)) if known.size else float("nan")
