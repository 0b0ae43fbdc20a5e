"""Pruning after training, in one call."""

from jaxsparse.oneshot._prune import Pruned as Pruned
from jaxsparse.oneshot._prune import prune as prune
