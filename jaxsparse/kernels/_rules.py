"""Which engine multiplies which kernel: a measured table that can be replaced."""

import dataclasses
import math
from typing import NamedTuple

import jax

from jaxsparse import _checks
from jaxsparse.formats import Condensed, Csr16, Int8Tiles, PackedArray, Tiles
from jaxsparse.kernels import _native
from jaxsparse.kernels._compiled import has_native, native
from jaxsparse.kernels._dense import dense
from jaxsparse.kernels._gathered import gathered
from jaxsparse.kernels._product import Engine, batch_of, check_packed


class Rule(NamedTuple):
    """When an engine is quicker than a dense product.

    Attributes:
      engine: `js.kernels.native`, `gathered` or another function of `x` and a packed
        kernel.
      format: the class of packed arrays.
      platform: `"cpu"`, `"gpu"`, `"tpu"`; "" for each of them.
      sparsity: the least sparsity.
      outputs: of `Tiles` the least number of outputs of a tile.
      rows: the largest number of rows of `x`, such as tokens.
    """

    engine: Engine
    format: type
    platform: str = ""
    sparsity: float = 0.0
    outputs: int = 1
    rows: float = math.inf

    def __str__(self) -> str:
        name = getattr(self.engine, "__name__", str(self.engine))
        tile = f" of {self.outputs} outputs or more" if self.outputs > 1 else ""
        rows = f", up to {self.rows:g} rows" if self.rows < math.inf else ""
        where = self.platform or "everywhere"
        least = f"from {100 * self.sparsity:g} %"
        return f"{where:10}  {self.format.__name__}{tile} {least}{rows}: {name}"


@dataclasses.dataclass(frozen=True)
class Rules:
    """A table of engines: the first rule that matches applies, or `dense` if none does.

    `print(js.kernels.MEASURED)` shows the default one. For another machine, measure and
    pass your own rules, `rules=js.kernels.Rules((rule, ...))`.

    Attributes:
      rules: in order.

    Example:
      >>> import jaxsparse as js
      >>> from jaxsparse import formats, kernels
      >>> print(kernels.Rules((kernels.Rule(kernels.gathered, formats.Tiles),)))
      everywhere  Tiles from 0 %: gathered
      else dense
    """

    rules: tuple[Rule, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            _checks.check_is(Rule, "js.kernels.Rule(engine, format)", rules=rule)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.rules), "else dense"])


MEASURED = Rules((
    Rule(gathered, Condensed, sparsity=0.25),
    Rule(native, Csr16, "cpu", sparsity=0.8),
    Rule(native, Int8Tiles, "cpu", sparsity=0.5),
    Rule(gathered, Tiles, "cpu", sparsity=0.75, outputs=64),
    Rule(native, Tiles, "cpu", sparsity=0.7),
    Rule(gathered, Tiles, "cpu", sparsity=0.75, outputs=8, rows=4),
    Rule(gathered, Tiles, "cpu", sparsity=0.85, outputs=16),
    Rule(gathered, Tiles, "cpu", sparsity=0.9, outputs=8),
    Rule(gathered, Tiles, "cpu", sparsity=0.9, outputs=4, rows=16),
    Rule(gathered, Tiles, "cpu", sparsity=0.95, outputs=4),
    Rule(gathered, Tiles, "gpu", sparsity=0.9, outputs=64),
    Rule(gathered, Tiles, "tpu", sparsity=0.9, outputs=64),
))
"""The default rules, measured on two cores of a processor with AVX-512 against jitted
dense products. Those for accelerators have not been measured: they are guesses.
"""


def choose(
    packed: PackedArray,
    *,
    rows: int,
    rules: Rules = MEASURED,
    platform: str | None = None,
) -> Engine:
    """Return the engine that multiplies a packed kernel.

    Args:
      packed: a kernel from `js.formats.pack`.
      rows: the number of rows of `x`, such as tokens.
      rules: the table to look in.
      platform: `"cpu"`, `"gpu"` or `"tpu"`; by default JAX's.

    Returns:
      `js.kernels.dense`, `gathered`, `native`, or an engine of the caller's rules.

    Raises:
      TypeError: anything other than a packed kernel or rules.
      ValueError: a negative number of rows, another platform.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> kernel, pattern = jnp.arange(8192.0).reshape(64, 128), js.Balanced((1, 128))
      >>> params, masks = js.prune({"w": kernel}, 0.9, pattern=pattern)
      >>> packed = js.formats.pack(params, masks, format=pattern)["w"]
      >>> js.kernels.choose(packed, rows=1, platform="cpu") is js.kernels.gathered
      True
    """
    check_packed(packed)
    _checks.check_positive_int(rows, name="rows", least=0)
    _checks.check_is(Rules, "js.kernels.Rules(...)", rules=rules)
    if platform is None:
        platform = jax.default_backend()
    _checks.check_choice(("cpu", "gpu", "tpu"), platform=platform)
    for rule in rules.rules:
        if _fits(rule, packed, rows, platform):
            return rule.engine
    return dense


def _fits(rule: Rule, packed: PackedArray, rows: int, platform: str) -> bool:
    if not isinstance(packed, rule.format) or rule.platform not in ("", platform):
        return False
    if rule.engine is native and not _has_native_here(packed, platform):
        return False
    tile = packed.tile[1] if isinstance(packed, Tiles) else 1
    # What is a rounding error short of a sparsity has it.
    enough = sparsity_of(packed) >= rule.sparsity - 1e-3
    return enough and tile >= rule.outputs and rows <= rule.rows


def engines_of(packed: PackedArray, rules: Rules) -> list[Engine]:
    """All engines that rules name for a packed kernel on this platform."""
    platform, found = jax.default_backend(), {}
    for rule in rules.rules:
        fits = isinstance(packed, rule.format) and rule.platform in ("", platform)
        if rule.engine is native and not _has_native_here(packed, platform):
            continue
        if fits:
            found[rule.engine] = None
    return list(found)


def _has_native_here(packed: PackedArray, platform: str) -> bool:
    whole = packed.values.shape[len(batch_of(packed))] == 1
    balanced = isinstance(packed, Tiles) and packed.offsets is None
    fits = has_native(packed) and (whole or balanced)
    return fits and platform == "cpu" and _native.available()


def sparsity_of(packed: PackedArray) -> float:
    """The fraction of weights that are not stored; 0 where what fills up outweighs."""
    view, layers = packed.view, math.prod(batch_of(packed))
    share = packed.values.size / max(1, layers * view.d_in * view.d_out)
    return max(0.0, 1 - share)
