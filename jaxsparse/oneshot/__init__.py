"""Pruning after training, in one call."""

from jaxsparse.oneshot._prune import prune as prune
from jaxsparse.patterns import Pruned as Pruned
