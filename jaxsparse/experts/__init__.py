"""Experts of a mixture: scores of their channels, groups of experts, merged experts."""

from jaxsparse.experts._grouping import Grouping as Grouping
from jaxsparse.experts._grouping import group_experts as group_experts
from jaxsparse.experts._grouping import router_similarity as router_similarity
from jaxsparse.experts.merging import align_experts as align_experts
from jaxsparse.experts.merging import merge_experts as merge_experts
from jaxsparse.experts.merging import merge_gates as merge_gates

__all__ = [
    "Grouping",
    "align_experts",
    "group_experts",
    "merge_experts",
    "merge_gates",
    "router_similarity",
]
