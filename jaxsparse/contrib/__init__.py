"""Experimental methods that nothing else in the library uses yet.

A method is here if nothing else in the library uses it, and it comes from one paper or
in a form that is our own reading of it. It has the same tests and documentation as all
others. It moves up when another method builds on it, or when a second paper or a
published result confirms it; methods that nobody uses are removed, with one release of
notice.
"""

from jaxsparse.contrib._activate import DeadNeurons as DeadNeurons
from jaxsparse.contrib._activate import activate as activate
from jaxsparse.contrib._activate import activation_gains as activation_gains
from jaxsparse.contrib._activate import dead_neurons as dead_neurons
from jaxsparse.contrib._als import als as als
from jaxsparse.contrib._autoflip import guidance as guidance
from jaxsparse.contrib._autoflip import guidance_masks as guidance_masks
from jaxsparse.contrib._cric import Redundancy as Redundancy
from jaxsparse.contrib._cric import cric as cric
from jaxsparse.contrib._gate_penalty import GatePenalty as GatePenalty
from jaxsparse.contrib._gate_penalty import gate_penalty as gate_penalty
from jaxsparse.contrib._heapr import AtomicSums as AtomicSums
from jaxsparse.contrib._heapr import atomic_init as atomic_init
from jaxsparse.contrib._heapr import atomic_merge as atomic_merge
from jaxsparse.contrib._heapr import atomic_scores as atomic_scores
from jaxsparse.contrib._heapr import atomic_update as atomic_update
from jaxsparse.contrib._heapr import atomic_update_ragged as atomic_update_ragged
from jaxsparse.contrib._lapp import init_thresholds as init_thresholds
from jaxsparse.contrib._lapp import threshold_gates as threshold_gates
from jaxsparse.contrib._paser import RecoveryData as RecoveryData
from jaxsparse.contrib._paser import paser as paser
from jaxsparse.contrib._pat import Hybrid as Hybrid
from jaxsparse.contrib._pat import HybridLoss as HybridLoss
from jaxsparse.contrib._pat import fold_hybrid as fold_hybrid
from jaxsparse.contrib._pat import hybrid as hybrid
from jaxsparse.contrib._pat import hybrid_gate as hybrid_gate
from jaxsparse.contrib._pat import hybrid_loss as hybrid_loss
from jaxsparse.contrib._pat import init_hybrid as init_hybrid
from jaxsparse.contrib._self_distillation import SelfDistilled as SelfDistilled
from jaxsparse.contrib._self_distillation import self_distilled as self_distilled
from jaxsparse.contrib._stun import MergedExperts as MergedExperts
from jaxsparse.contrib._stun import cluster_experts as cluster_experts
from jaxsparse.contrib._stun import expert_distances as expert_distances
from jaxsparse.contrib._stun import medoids as medoids
from jaxsparse.contrib._stun import merge_clusters as merge_clusters
from jaxsparse.contrib._wgsef import wgsef_prox as wgsef_prox

__all__ = [
    "AtomicSums",
    "DeadNeurons",
    "GatePenalty",
    "Hybrid",
    "HybridLoss",
    "MergedExperts",
    "RecoveryData",
    "Redundancy",
    "SelfDistilled",
    "activate",
    "activation_gains",
    "als",
    "atomic_init",
    "atomic_merge",
    "atomic_scores",
    "atomic_update",
    "atomic_update_ragged",
    "cluster_experts",
    "cric",
    "dead_neurons",
    "expert_distances",
    "fold_hybrid",
    "gate_penalty",
    "guidance",
    "guidance_masks",
    "hybrid",
    "hybrid_gate",
    "hybrid_loss",
    "init_hybrid",
    "init_thresholds",
    "medoids",
    "merge_clusters",
    "paser",
    "self_distilled",
    "threshold_gates",
    "wgsef_prox",
]
