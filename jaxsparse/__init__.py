"""Sparsity for JAX.

Select parameters, choose a pattern, score weights, allocate a budget, and prune: once
(`prune`), or while the model trains (`enforce(optax.chain(prune_schedule(...), ...))`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxsparse import _renamed
from jaxsparse import adaptive as adaptive
from jaxsparse import allocations as allocations
from jaxsparse import calibration as calibration
from jaxsparse import channels as channels
from jaxsparse import contrib as contrib
from jaxsparse import coupling as coupling
from jaxsparse import curvature as curvature
from jaxsparse import depth as depth
from jaxsparse import exchange as exchange
from jaxsparse import experts as experts
from jaxsparse import formats as formats
from jaxsparse import kernels as kernels
from jaxsparse import losses as losses
from jaxsparse import masking as masking
from jaxsparse import narrowing as narrowing
from jaxsparse import oneshot as oneshot
from jaxsparse import patterns as patterns
from jaxsparse import penalties as penalties
from jaxsparse import recipes as recipes
from jaxsparse import schedules as schedules
from jaxsparse import scores as scores
from jaxsparse import solvers as solvers
from jaxsparse import tracing as tracing
from jaxsparse import transforms as transforms
from jaxsparse import tree as tree
from jaxsparse import zeroth_order as zeroth_order
from jaxsparse._version import __version__ as __version__
from jaxsparse.masking import straight_through as straight_through
from jaxsparse.oneshot import Pruned as Pruned
from jaxsparse.oneshot import prune as prune
from jaxsparse.patterns import NM as NM
from jaxsparse.patterns import Balanced as Balanced
from jaxsparse.patterns import Block as Block
from jaxsparse.patterns import Channel as Channel
from jaxsparse.patterns import Unstructured as Unstructured
from jaxsparse.tracing import Trace as Trace
from jaxsparse.tracing import trace as trace
from jaxsparse.transforms import apply_updates as apply_updates
from jaxsparse.transforms import assert_sparse as assert_sparse
from jaxsparse.transforms import enforce as enforce
from jaxsparse.transforms import init_sparse as init_sparse
from jaxsparse.transforms import keep_sparse as keep_sparse
from jaxsparse.transforms import masks_of as masks_of
from jaxsparse.transforms import prune_schedule as prune_schedule
from jaxsparse.tree import Axes as Axes

if TYPE_CHECKING:
    from jaxsparse import checkpoint as checkpoint
    from jaxsparse import modules as modules
    from jaxsparse import report as report

__all__ = [
    "NM",
    "Axes",
    "Balanced",
    "Block",
    "Channel",
    "Pruned",
    "Trace",
    "Unstructured",
    "adaptive",
    "allocations",
    "apply_updates",
    "assert_sparse",
    "calibration",
    "channels",
    "checkpoint",
    "contrib",
    "coupling",
    "curvature",
    "depth",
    "enforce",
    "exchange",
    "experts",
    "formats",
    "init_sparse",
    "keep_sparse",
    "kernels",
    "losses",
    "masking",
    "masks_of",
    "modules",
    "narrowing",
    "oneshot",
    "patterns",
    "penalties",
    "prune",
    "prune_schedule",
    "recipes",
    "report",
    "schedules",
    "scores",
    "solvers",
    "straight_through",
    "trace",
    "tracing",
    "transforms",
    "tree",
    "zeroth_order",
]


def __getattr__(name: str) -> Any:
    # They bring rich, matplotlib, orbax and flax, which not every program needs; the
    # last is a place of old names.
    if name in {"report", "checkpoint", "modules", "structured"}:
        return importlib.import_module(f"jaxsparse.{name}")
    return _renamed.old_names(__name__)(name)


def __dir__() -> list[str]:
    return sorted(__all__)
