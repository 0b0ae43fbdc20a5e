"""Pruning while a model trains, as optax gradient transformations."""

from jaxsparse import _renamed
from jaxsparse.transforms._acdc import acdc as acdc
from jaxsparse.transforms._drop_and_grow import drop_and_grow as drop_and_grow
from jaxsparse.transforms._dynamic import explored as explored
from jaxsparse.transforms._dynamic import rigl as rigl
from jaxsparse.transforms._dynamic import set_ as set_
from jaxsparse.transforms._dynamic import snfs as snfs
from jaxsparse.transforms._dynamic import static as static
from jaxsparse.transforms._enforce import enforce as enforce
from jaxsparse.transforms._frugal import FrugalState as FrugalState
from jaxsparse.transforms._frugal import frugal as frugal
from jaxsparse.transforms._keep_sparse import keep_sparse as keep_sparse
from jaxsparse.transforms._mfac import ScaleByMFacState as ScaleByMFacState
from jaxsparse.transforms._mfac import mfac as mfac
from jaxsparse.transforms._mfac import scale_by_mfac as scale_by_mfac
from jaxsparse.transforms._project import apply_updates as apply_updates
from jaxsparse.transforms._project import init_sparse as init_sparse
from jaxsparse.transforms._prune_schedule import PruneSchedule as PruneSchedule
from jaxsparse.transforms._prune_schedule import prune_schedule as prune_schedule
from jaxsparse.transforms._soft_shrink import soft_shrink as soft_shrink
from jaxsparse.transforms._state import DropAndGrowState as DropAndGrowState
from jaxsparse.transforms._state import PruneScheduleState as PruneScheduleState
from jaxsparse.transforms._state import assert_sparse as assert_sparse
from jaxsparse.transforms._state import find_states as find_states
from jaxsparse.transforms._state import masks_of as masks_of
from jaxsparse.transforms._windowed_obs import GradientSums as GradientSums
from jaxsparse.transforms._windowed_obs import GradientWindow as GradientWindow
from jaxsparse.transforms._windowed_obs import windowed_obs as windowed_obs

__all__ = [
    "DropAndGrowState",
    "FrugalState",
    "GradientSums",
    "GradientWindow",
    "PruneSchedule",
    "PruneScheduleState",
    "ScaleByMFacState",
    "acdc",
    "apply_updates",
    "assert_sparse",
    "drop_and_grow",
    "enforce",
    "explored",
    "find_states",
    "frugal",
    "init_sparse",
    "keep_sparse",
    "masks_of",
    "mfac",
    "prune_schedule",
    "rigl",
    "scale_by_mfac",
    "set_",
    "snfs",
    "soft_shrink",
    "static",
    "windowed_obs",
]

__getattr__ = _renamed.old_names(__name__)
