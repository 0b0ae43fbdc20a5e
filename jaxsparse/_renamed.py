"""Old names of what is public: they work in this version, and warn."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

_STRUCTURED = {
    "coupling": "Drop Group Groups Member Reason groups",
    "narrowing": "Cost Narrowed cost narrow narrow_like widen",
    "channels": (
        "Selected bn_scale dropped_fraction flap_compensation fpgm gate_scores lamp "
        "normalize_max normalize_mean normalize_norm normalize_quantile "
        "normalize_range per_parameter standardize zero_indices"
    ),
    "depth": (
        "block_similarity gated knapsack nm_gates nm_options output_losses "
        "remove_blocks share_blocks"
    ),
    "experts": (
        "Grouping align_experts group_experts merge_experts merge_gates "
        "router_similarity"
    ),
    "contrib": (
        "AtomicSums GatePenalty MergedExperts atomic_init atomic_merge atomic_scores "
        "atomic_update atomic_update_ragged cluster_experts expert_distances "
        "gate_penalty medoids merge_clusters"
    ),
}
_TRANSFORMS = {
    "penalties": (
        "Criteria GrowingRegularizationState HessoState PenaltyState dropped "
        "group_lasso group_norm_decay growing_regularization hesso prox_group_lasso"
    ),
    "contrib": "Redundancy cric wgsef_prox",
    "masking": "straight_through",
}


def _moved(packages: dict[str, str]) -> dict[str, str]:
    pairs = ((p, name) for p, names in packages.items() for name in names.split())
    return {name: f"{p}.{name}" for p, name in pairs}


RENAMED = {
    "jaxsparse.structured": {
        **_moved(_STRUCTURED),
        "Block": "depth.ResidualBlock",
        "blocks": "depth.residual_blocks",
        "flap": "channels.flap_scores",
        "group_scores": "channels.channel_scores",
        "masks": "narrowing.drop_masks",
        "select": "channels.drop_lowest",
        "select_to": "channels.drop_to_budget",
    },
    "jaxsparse": {"check": "transforms.assert_sparse"},
    "jaxsparse.transforms": {
        **_moved(_TRANSFORMS),
        "check": "transforms.assert_sparse",
    },
    "jaxsparse.allocations": {
        **_moved({"contrib": "als"}),
        "global_": "allocations.from_global_scores",
    },
    "jaxsparse.oneshot": {
        "channel_errors": "channels.obs_errors",
        "greedy_channels": "channels.obs_greedy",
        "refit_channels": "channels.obs_refit",
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
            f"{module}.{name} is now jaxsparse.{package}.{new}; the old name goes with "
            "the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(f"jaxsparse.{package}"), new)

    return look_up
