"""Compute less for one input: filter gates and early exit."""

from jaxsparse.adaptive._early_exit import Exit as Exit
from jaxsparse.adaptive._early_exit import ExitThreshold as ExitThreshold
from jaxsparse.adaptive._early_exit import choose_exit as choose_exit
from jaxsparse.adaptive._early_exit import exit_threshold as exit_threshold
from jaxsparse.adaptive._early_exit import run_until_confident as run_until_confident
from jaxsparse.adaptive._filter_gates import FilterPredictor as FilterPredictor
from jaxsparse.adaptive._filter_gates import filter_gates as filter_gates
from jaxsparse.adaptive._filter_gates import filter_logits as filter_logits
from jaxsparse.adaptive._filter_gates import (
    init_filter_predictor as init_filter_predictor,
)
from jaxsparse.adaptive._filter_gates import mass_targets as mass_targets

__all__ = [
    "Exit",
    "ExitThreshold",
    "FilterPredictor",
    "choose_exit",
    "exit_threshold",
    "filter_gates",
    "filter_logits",
    "init_filter_predictor",
    "mass_targets",
    "run_until_confident",
]
