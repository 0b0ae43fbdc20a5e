"""Experts of a mixture: scores of their channels, groups of experts, merged experts."""

from jaxsparse.experts._atomic import AtomicSums as AtomicSums
from jaxsparse.experts._atomic import atomic_init as atomic_init
from jaxsparse.experts._atomic import atomic_merge as atomic_merge
from jaxsparse.experts._atomic import atomic_scores as atomic_scores
from jaxsparse.experts._atomic import atomic_update as atomic_update
from jaxsparse.experts._atomic import atomic_update_ragged as atomic_update_ragged
from jaxsparse.experts._clusters import MergedExperts as MergedExperts
from jaxsparse.experts._clusters import cluster_experts as cluster_experts
from jaxsparse.experts._clusters import expert_distances as expert_distances
from jaxsparse.experts._clusters import medoids as medoids
from jaxsparse.experts._clusters import merge_clusters as merge_clusters
from jaxsparse.experts._grouping import Grouping as Grouping
from jaxsparse.experts._grouping import group_experts as group_experts
from jaxsparse.experts._grouping import router_similarity as router_similarity
from jaxsparse.experts._merging import align_experts as align_experts
from jaxsparse.experts._merging import merge_experts as merge_experts
from jaxsparse.experts._merging import merge_gates as merge_gates
