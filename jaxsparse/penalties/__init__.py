"""Penalties that empty channels while a network trains."""

from jaxsparse.penalties._group_lasso import group_lasso as group_lasso
from jaxsparse.penalties._group_lasso import group_norm_decay as group_norm_decay
from jaxsparse.penalties._group_lasso import prox_group_lasso as prox_group_lasso
from jaxsparse.penalties._growing_regularization import (
    GrowingRegularizationState as GrowingRegularizationState,
)
from jaxsparse.penalties._growing_regularization import (
    growing_regularization as growing_regularization,
)
from jaxsparse.penalties._hesso import HessoState as HessoState
from jaxsparse.penalties._hesso import dropped as dropped
from jaxsparse.penalties._hesso import hesso as hesso
from jaxsparse.penalties.saliency import Criteria as Criteria
from jaxsparse.penalties.terms import PenaltyState as PenaltyState

__all__ = [
    "Criteria",
    "GrowingRegularizationState",
    "HessoState",
    "PenaltyState",
    "dropped",
    "group_lasso",
    "group_norm_decay",
    "growing_regularization",
    "hesso",
    "prox_group_lasso",
]
