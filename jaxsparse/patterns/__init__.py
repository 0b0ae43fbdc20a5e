"""Which weights live or die together, who competes, and the masks that follow."""

from jaxsparse.patterns._algebra import Overlap as Overlap
from jaxsparse.patterns._algebra import count as count
from jaxsparse.patterns._algebra import indices as indices
from jaxsparse.patterns._algebra import intersection as intersection
from jaxsparse.patterns._algebra import overlap as overlap
from jaxsparse.patterns._algebra import transfer as transfer
from jaxsparse.patterns._algebra import union as union
from jaxsparse.patterns._counts import removed_count as removed_count
from jaxsparse.patterns._masks import Packed as Packed
from jaxsparse.patterns._masks import Pruned as Pruned
from jaxsparse.patterns._masks import apply as apply
from jaxsparse.patterns._masks import check_masks as check_masks
from jaxsparse.patterns._masks import kept_count as kept_count
from jaxsparse.patterns._masks import pack as pack
from jaxsparse.patterns._masks import unpack as unpack
from jaxsparse.patterns._shards import AxisName as AxisName
from jaxsparse.patterns._spec import NM as NM
from jaxsparse.patterns._spec import Balanced as Balanced
from jaxsparse.patterns._spec import Block as Block
from jaxsparse.patterns._spec import Channel as Channel
from jaxsparse.patterns._spec import Pattern as Pattern
from jaxsparse.patterns._spec import Unstructured as Unstructured
from jaxsparse.patterns._verify import sparsity_of as sparsity_of
from jaxsparse.patterns._verify import verify as verify
from jaxsparse.patterns.selection import masks as masks

__all__ = [
    "NM",
    "AxisName",
    "Balanced",
    "Block",
    "Channel",
    "Overlap",
    "Packed",
    "Pattern",
    "Pruned",
    "Unstructured",
    "apply",
    "check_masks",
    "count",
    "indices",
    "intersection",
    "kept_count",
    "masks",
    "overlap",
    "pack",
    "removed_count",
    "sparsity_of",
    "transfer",
    "union",
    "unpack",
    "verify",
]
