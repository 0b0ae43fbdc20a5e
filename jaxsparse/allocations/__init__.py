"""How a budget is shared out: trees of sparsities that meet the total."""

from jaxsparse import _renamed
from jaxsparse.allocations._ecoflap import ecoflap as ecoflap
from jaxsparse.allocations._global import from_global_scores as from_global_scores
from jaxsparse.allocations._global import round_to_weights as round_to_weights
from jaxsparse.allocations._layerwise import erk as erk
from jaxsparse.allocations._layerwise import uniform as uniform
from jaxsparse.allocations._outlier import (
    arithmetic_progression as arithmetic_progression,
)
from jaxsparse.allocations._outlier import dsa as dsa
from jaxsparse.allocations._outlier import owl as owl
from jaxsparse.allocations._search import evolve as evolve
from jaxsparse.allocations._search import level_sparsities as level_sparsities
from jaxsparse.allocations._sensitivity import Sensitivity as Sensitivity
from jaxsparse.allocations._sensitivity import sensitivity as sensitivity

__all__ = [
    "Sensitivity",
    "arithmetic_progression",
    "dsa",
    "ecoflap",
    "erk",
    "evolve",
    "from_global_scores",
    "level_sparsities",
    "owl",
    "round_to_weights",
    "sensitivity",
    "uniform",
]

__getattr__ = _renamed.old_names(__name__)
