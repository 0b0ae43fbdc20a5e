"""Old names of what is public: they work in this version, and warn."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def _moved(package: str, names: str) -> dict[str, str]:
    return {name: f"{package}.{name}" for name in names.split()}


_STRUCTURED = {
    **_moved(
        "coupling",
        """
        Drop Group Groups Member Reason groups
        """,
    ),
    **_moved(
        "narrowing",
        """
        Cost cost Narrowed narrow widen narrow_like
        """,
    ),
    **_moved(
        "channels",
        """
        Selected bn_scale fpgm gate_scores zero_indices flap_compensation lamp
        normalize_max normalize_mean normalize_norm normalize_quantile
        normalize_range per_parameter standardize dropped_fraction
        """,
    ),
    **_moved(
        "depth",
        """
        knapsack nm_gates nm_options GatePenalty gate_penalty gated
        block_similarity output_losses remove_blocks share_blocks
        """,
    ),
    **_moved(
        "experts",
        """
        AtomicSums atomic_init atomic_merge atomic_scores atomic_update
        atomic_update_ragged MergedExperts cluster_experts expert_distances
        medoids merge_clusters Grouping group_experts router_similarity
        align_experts merge_experts merge_gates
        """,
    ),
    "masks": "narrowing.drop_masks",
    "select_to": "channels.drop_to_budget",
    "flap": "channels.flap_scores",
    "group_scores": "channels.channel_scores",
    "select": "channels.drop_lowest",
    "Block": "depth.ResidualBlock",
    "blocks": "depth.residual_blocks",
}
RENAMED = {
    "jaxsparse.structured": _STRUCTURED,
    "jaxsparse.oneshot": {
        "channel_errors": "channels.obs_errors",
        "refit_channels": "channels.obs_refit",
        "greedy_channels": "channels.obs_greedy",
    },
}
"""By module, what each old name is called now."""


def old_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module with old names, which warn when they are used."""
    names = RENAMED[module]

    def look_up(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        package, new = names[name].split(".")
        warnings.warn(
            f"{module}.{name} is now jaxsparse.{package}.{new}; the old name goes "
            "with the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(f"jaxsparse.{package}"), new)

    return look_up
