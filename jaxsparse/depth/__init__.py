"""Residual blocks: their importance, gates before them, models without some of them."""

from jaxsparse.depth._blocks import ResidualBlock as ResidualBlock
from jaxsparse.depth._blocks import residual_blocks as residual_blocks
from jaxsparse.depth._depth import knapsack as knapsack
from jaxsparse.depth._depth import nm_gates as nm_gates
from jaxsparse.depth._depth import nm_options as nm_options
from jaxsparse.depth._gates import gated as gated
from jaxsparse.depth._importance import block_similarity as block_similarity
from jaxsparse.depth._importance import output_losses as output_losses
from jaxsparse.depth._remove import remove_blocks as remove_blocks
from jaxsparse.depth._remove import share_blocks as share_blocks

__all__ = [
    "ResidualBlock",
    "block_similarity",
    "gated",
    "knapsack",
    "nm_gates",
    "nm_options",
    "output_losses",
    "remove_blocks",
    "residual_blocks",
    "share_blocks",
]
