"""Pruning after training, in one call."""

from jaxsparse.oneshot._channels import channel_errors as channel_errors
from jaxsparse.oneshot._channels import greedy_channels as greedy_channels
from jaxsparse.oneshot._channels import refit_channels as refit_channels
from jaxsparse.oneshot._layerwise import layerwise as layerwise
from jaxsparse.oneshot._prune import prune as prune
from jaxsparse.oneshot._results import LayerInfo as LayerInfo
from jaxsparse.oneshot._results import Layerwise as Layerwise
from jaxsparse.patterns import Pruned as Pruned
