"""Pruning after training, in one call."""

from jaxsparse.oneshot._layerwise import LayerInfo as LayerInfo
from jaxsparse.oneshot._layerwise import Layerwise as Layerwise
from jaxsparse.oneshot._layerwise import layerwise as layerwise
from jaxsparse.oneshot._prune import prune as prune
from jaxsparse.patterns import Pruned as Pruned
