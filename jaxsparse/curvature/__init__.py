"""Estimate the curvature of a loss: Fisher matrices and their inverses."""

from jaxsparse.curvature import _block_inverse as _block_inverse  # what blocks answer
from jaxsparse.curvature._blocks import BlockFisher as BlockFisher
from jaxsparse.curvature._blocks import block_estimator as block_estimator
from jaxsparse.curvature._blocks import block_fisher as block_fisher
from jaxsparse.curvature._diagonal import DiagonalFisher as DiagonalFisher
from jaxsparse.curvature._diagonal import diagonal_estimator as diagonal_estimator
from jaxsparse.curvature._diagonal import diagonal_fisher as diagonal_fisher
from jaxsparse.curvature._estimator import Estimator as Estimator
from jaxsparse.curvature._estimator import Sums as Sums
from jaxsparse.curvature._fisher import apart as apart
from jaxsparse.curvature._fisher import check_covers as check_covers
from jaxsparse.curvature._kronecker import KroneckerFisher as KroneckerFisher
from jaxsparse.curvature._kronecker import kronecker_estimator as kronecker_estimator
from jaxsparse.curvature._kronecker import kronecker_fisher as kronecker_fisher
from jaxsparse.curvature._mfac import MFac as MFac
from jaxsparse.curvature._mfac import mfac as mfac
from jaxsparse.curvature._mfac import span_ihvp as span_ihvp
from jaxsparse.curvature._mfac_blocks import BlockMFac as BlockMFac
from jaxsparse.curvature._mfac_window import MFacWindow as MFacWindow
from jaxsparse.curvature._mfac_window import window_ihvp as window_ihvp
from jaxsparse.curvature._mfac_window import window_init as window_init
from jaxsparse.curvature._mfac_window import window_mask as window_mask
from jaxsparse.curvature._mfac_window import window_update as window_update
from jaxsparse.curvature._mfac_window import (
    window_update_ihvp as window_update_ihvp,
)
from jaxsparse.curvature._operations import eliminate as eliminate
from jaxsparse.curvature._operations import greedy_scores as greedy_scores
from jaxsparse.curvature._operations import group_scores as group_scores
from jaxsparse.curvature._operations import ihvp as ihvp
from jaxsparse.curvature._operations import inverse_blocks as inverse_blocks
from jaxsparse.curvature._operations import inverse_diagonal as inverse_diagonal
from jaxsparse.curvature._operations import restrict as restrict
from jaxsparse.curvature._per_example import collect_grads as collect_grads
from jaxsparse.curvature._per_example import per_example_grads as per_example_grads
from jaxsparse.curvature._per_example import stream_grads as stream_grads
from jaxsparse.curvature._trees import check_one_damping as check_one_damping
from jaxsparse.curvature.dispatch import Fisher as Fisher
from jaxsparse.linalg.gram import GramFactor as GramFactor
from jaxsparse.linalg.gram import damped_inverse as damped_inverse
from jaxsparse.linalg.gram import factor_gram as factor_gram
from jaxsparse.linalg.gram import inverse_upper as inverse_upper

__all__ = [
    "BlockFisher",
    "BlockMFac",
    "DiagonalFisher",
    "Estimator",
    "Fisher",
    "GramFactor",
    "KroneckerFisher",
    "MFac",
    "MFacWindow",
    "Sums",
    "apart",
    "block_estimator",
    "block_fisher",
    "check_covers",
    "check_one_damping",
    "collect_grads",
    "damped_inverse",
    "diagonal_estimator",
    "diagonal_fisher",
    "eliminate",
    "factor_gram",
    "greedy_scores",
    "group_scores",
    "ihvp",
    "inverse_blocks",
    "inverse_diagonal",
    "inverse_upper",
    "kronecker_estimator",
    "kronecker_fisher",
    "mfac",
    "per_example_grads",
    "restrict",
    "span_ihvp",
    "stream_grads",
    "window_ihvp",
    "window_init",
    "window_mask",
    "window_update",
    "window_update_ihvp",
]
