"""Pruning after training, in one call."""

from jaxsparse import _renamed
from jaxsparse.oneshot._layerwise import layerwise as layerwise
from jaxsparse.oneshot._prune import prune as prune
from jaxsparse.oneshot._results import LayerInfo as LayerInfo
from jaxsparse.oneshot._results import Layerwise as Layerwise
from jaxsparse.patterns import Pruned as Pruned

__all__ = [
    "LayerInfo",
    "Layerwise",
    "Pruned",
    "layerwise",
    "prune",
]

__getattr__ = _renamed.old_names(__name__)
