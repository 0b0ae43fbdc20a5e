"""Products with packed kernels, computed by several engines."""

from jaxsparse.kernels._compiled import native as native
from jaxsparse.kernels._dense import dense as dense
from jaxsparse.kernels._gathered import gathered as gathered
from jaxsparse.kernels._layers import Layer as Layer
from jaxsparse.kernels._matmul import matmul as matmul
from jaxsparse.kernels._model import packed_apply as packed_apply
from jaxsparse.kernels._pallas import pallas as pallas
from jaxsparse.kernels._product import Engine as Engine
from jaxsparse.kernels._rules import MEASURED as MEASURED
from jaxsparse.kernels._rules import Rule as Rule
from jaxsparse.kernels._rules import Rules as Rules
from jaxsparse.kernels._rules import choose as choose
from jaxsparse.kernels._sparsify import Sparsified as Sparsified
from jaxsparse.kernels._sparsify import sparsify as sparsify

__all__ = [
    "MEASURED",
    "Engine",
    "Layer",
    "Rule",
    "Rules",
    "Sparsified",
    "choose",
    "dense",
    "gathered",
    "matmul",
    "native",
    "packed_apply",
    "pallas",
    "sparsify",
]
