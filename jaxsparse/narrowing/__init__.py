"""The model at other sizes: narrower, as wide again, or masked as if it were."""

from jaxsparse.narrowing._cost import Cost as Cost
from jaxsparse.narrowing._cost import cost as cost
from jaxsparse.narrowing._narrow import Narrowed as Narrowed
from jaxsparse.narrowing._narrow import drop_masks as drop_masks
from jaxsparse.narrowing._narrow import narrow as narrow
from jaxsparse.narrowing._narrow import widen as widen
from jaxsparse.narrowing._share import flops_share as flops_share
from jaxsparse.narrowing._state import narrow_like as narrow_like

__all__ = [
    "Cost",
    "Narrowed",
    "cost",
    "drop_masks",
    "flops_share",
    "narrow",
    "narrow_like",
    "widen",
]
