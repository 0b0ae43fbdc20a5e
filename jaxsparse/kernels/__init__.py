"""Products with packed kernels: one meaning, several engines."""

from jaxsparse.kernels._compiled import native as native
from jaxsparse.kernels._dense import dense as dense
from jaxsparse.kernels._gathered import gathered as gathered
from jaxsparse.kernels._matmul import matmul as matmul
from jaxsparse.kernels._product import Engine as Engine
from jaxsparse.kernels._rules import MEASURED as MEASURED
from jaxsparse.kernels._rules import Rule as Rule
from jaxsparse.kernels._rules import Rules as Rules
from jaxsparse.kernels._rules import choose as choose

__all__ = [
    "MEASURED",
    "Engine",
    "Rule",
    "Rules",
    "choose",
    "dense",
    "gathered",
    "matmul",
    "native",
]
