"""Masks that are applied within the loss to dense weights that continue to learn."""

from jaxsparse.masking._adapters import Adapter as Adapter
from jaxsparse.masking._adapters import adapter_importance as adapter_importance
from jaxsparse.masking._adapters import init_adapters as init_adapters
from jaxsparse.masking._adapters import with_adapters as with_adapters
from jaxsparse.masking._bip import bip as bip
from jaxsparse.masking._cram import cram as cram
from jaxsparse.masking._logits import init_mask_logits as init_mask_logits
from jaxsparse.masking._logits import masked_by_logits as masked_by_logits
from jaxsparse.masking._logits import masks_of_logits as masks_of_logits
from jaxsparse.masking._pst import LowRank as LowRank
from jaxsparse.masking._pst import init_low_rank as init_low_rank
from jaxsparse.masking._pst import masked_by_low_rank as masked_by_low_rank
from jaxsparse.masking._scores import init_scores as init_scores
from jaxsparse.masking._scores import masked_by_scores as masked_by_scores
from jaxsparse.masking._scores import soft_threshold as soft_threshold
from jaxsparse.masking._straight_through import straight_through as straight_through
from jaxsparse.masking._widths import Gates as Gates
from jaxsparse.masking._widths import SoftToHard as SoftToHard
from jaxsparse.masking._widths import init_width_logits as init_width_logits
from jaxsparse.masking._widths import soft_to_hard as soft_to_hard
from jaxsparse.masking._widths import width_gates as width_gates

__all__ = [
    "Adapter",
    "Gates",
    "LowRank",
    "SoftToHard",
    "adapter_importance",
    "bip",
    "cram",
    "init_adapters",
    "init_low_rank",
    "init_mask_logits",
    "init_scores",
    "init_width_logits",
    "masked_by_logits",
    "masked_by_low_rank",
    "masked_by_scores",
    "masks_of_logits",
    "soft_threshold",
    "soft_to_hard",
    "straight_through",
    "width_gates",
    "with_adapters",
]
