"""Scores of coupled channels, and the choice of channels to remove."""

from jaxsparse.channels._budget import Selected as Selected
from jaxsparse.channels._budget import drop_to_budget as drop_to_budget
from jaxsparse.channels._channel_scores import bn_scale as bn_scale
from jaxsparse.channels._channel_scores import fpgm as fpgm
from jaxsparse.channels._channel_scores import gate_scores as gate_scores
from jaxsparse.channels._flap import flap_compensation as flap_compensation
from jaxsparse.channels._flap import flap_scores as flap_scores
from jaxsparse.channels._normalize import lamp as lamp
from jaxsparse.channels._normalize import normalize_max as normalize_max
from jaxsparse.channels._normalize import normalize_mean as normalize_mean
from jaxsparse.channels._normalize import normalize_norm as normalize_norm
from jaxsparse.channels._normalize import normalize_quantile as normalize_quantile
from jaxsparse.channels._normalize import normalize_range as normalize_range
from jaxsparse.channels._normalize import per_parameter as per_parameter
from jaxsparse.channels._normalize import standardize as standardize
from jaxsparse.channels._obs import obs_errors as obs_errors
from jaxsparse.channels._obs import obs_greedy as obs_greedy
from jaxsparse.channels._obs import obs_refit as obs_refit
from jaxsparse.channels._score import channel_scores as channel_scores
from jaxsparse.channels._select import drop_lowest as drop_lowest
from jaxsparse.channels._select import dropped_fraction as dropped_fraction
from jaxsparse.channels._zero_indices import zero_indices as zero_indices
from jaxsparse.channels.gates import drop_closed as drop_closed
from jaxsparse.channels.gates import scale_channels as scale_channels

__all__ = [
    "Selected",
    "bn_scale",
    "channel_scores",
    "drop_closed",
    "drop_lowest",
    "drop_to_budget",
    "dropped_fraction",
    "flap_compensation",
    "flap_scores",
    "fpgm",
    "gate_scores",
    "lamp",
    "normalize_max",
    "normalize_mean",
    "normalize_norm",
    "normalize_quantile",
    "normalize_range",
    "obs_errors",
    "obs_greedy",
    "obs_refit",
    "per_parameter",
    "scale_channels",
    "standardize",
    "zero_indices",
]
