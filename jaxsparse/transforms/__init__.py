"""Pruning while a model trains, as optax gradient transformations."""

from jaxsparse import _renamed
from jaxsparse.transforms._cram import cram as cram
from jaxsparse.transforms._drop_and_grow import drop_and_grow as drop_and_grow
from jaxsparse.transforms._dynamic import explored as explored
from jaxsparse.transforms._dynamic import rigl as rigl
from jaxsparse.transforms._dynamic import set_ as set_
from jaxsparse.transforms._dynamic import snfs as snfs
from jaxsparse.transforms._dynamic import static as static
from jaxsparse.transforms._enforce import enforce as enforce
from jaxsparse.transforms._keep_sparse import keep_sparse as keep_sparse
from jaxsparse.transforms._learned import init_scores as init_scores
from jaxsparse.transforms._learned import masked_by_scores as masked_by_scores
from jaxsparse.transforms._learned import soft_threshold as soft_threshold
from jaxsparse.transforms._maskllm import init_mask_logits as init_mask_logits
from jaxsparse.transforms._maskllm import masked_by_logits as masked_by_logits
from jaxsparse.transforms._maskllm import masks_of_logits as masks_of_logits
from jaxsparse.transforms._mfac import ScaleByMFacState as ScaleByMFacState
from jaxsparse.transforms._mfac import mfac as mfac
from jaxsparse.transforms._mfac import scale_by_mfac as scale_by_mfac
from jaxsparse.transforms._project import apply_updates as apply_updates
from jaxsparse.transforms._project import init_sparse as init_sparse
from jaxsparse.transforms._prune_schedule import PruneSchedule as PruneSchedule
from jaxsparse.transforms._prune_schedule import prune_schedule as prune_schedule
from jaxsparse.transforms._state import DropAndGrowState as DropAndGrowState
from jaxsparse.transforms._state import PruneScheduleState as PruneScheduleState
from jaxsparse.transforms._state import assert_sparse as assert_sparse
from jaxsparse.transforms._state import find_states as find_states
from jaxsparse.transforms._state import masks_of as masks_of
from jaxsparse.transforms._straight_through import straight_through as straight_through
from jaxsparse.transforms._windowed_obs import GradientSums as GradientSums
from jaxsparse.transforms._windowed_obs import GradientWindow as GradientWindow
from jaxsparse.transforms._windowed_obs import windowed_obs as windowed_obs

__getattr__ = _renamed.old_names(__name__)
