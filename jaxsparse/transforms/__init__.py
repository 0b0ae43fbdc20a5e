"""Pruning while a model trains, as optax gradient transformations."""

from jaxsparse.transforms._cric import Redundancy as Redundancy
from jaxsparse.transforms._cric import cric as cric
from jaxsparse.transforms._enforce import enforce as enforce
from jaxsparse.transforms._group_lasso import PenaltyState as PenaltyState
from jaxsparse.transforms._group_lasso import group_lasso as group_lasso
from jaxsparse.transforms._group_lasso import group_norm_decay as group_norm_decay
from jaxsparse.transforms._group_lasso import prox_group_lasso as prox_group_lasso
from jaxsparse.transforms._growing import (
    GrowingRegularizationState as GrowingRegularizationState,
)
from jaxsparse.transforms._growing import (
    growing_regularization as growing_regularization,
)
from jaxsparse.transforms._hesso import Criteria as Criteria
from jaxsparse.transforms._hesso import HessoState as HessoState
from jaxsparse.transforms._hesso import dropped as dropped
from jaxsparse.transforms._hesso import hesso as hesso
from jaxsparse.transforms._keep_sparse import keep_sparse as keep_sparse
from jaxsparse.transforms._mfac import ScaleByMFacState as ScaleByMFacState
from jaxsparse.transforms._mfac import mfac as mfac
from jaxsparse.transforms._mfac import scale_by_mfac as scale_by_mfac
from jaxsparse.transforms._project import apply_updates as apply_updates
from jaxsparse.transforms._project import init_sparse as init_sparse
from jaxsparse.transforms._prune_schedule import PruneSchedule as PruneSchedule
from jaxsparse.transforms._prune_schedule import prune_schedule as prune_schedule
from jaxsparse.transforms._state import PruneScheduleState as PruneScheduleState
from jaxsparse.transforms._state import check as check
from jaxsparse.transforms._state import find_states as find_states
from jaxsparse.transforms._state import masks_of as masks_of
from jaxsparse.transforms._straight_through import straight_through as straight_through
from jaxsparse.transforms._wgsef import wgsef_prox as wgsef_prox
from jaxsparse.transforms._windowed_obs import GradientSums as GradientSums
from jaxsparse.transforms._windowed_obs import GradientWindow as GradientWindow
from jaxsparse.transforms._windowed_obs import windowed_obs as windowed_obs
