"""Losses that repair a pruned network."""

from jaxsparse.losses._distill import distill as distill
from jaxsparse.losses._divergence import jensen_shannon as jensen_shannon
from jaxsparse.losses._square_head import square_head as square_head

__all__ = [
    "distill",
    "jensen_shannon",
    "square_head",
]
