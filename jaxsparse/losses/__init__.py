"""Losses that repair a pruned network: an example at a time, so that you reduce."""

from jaxsparse.losses._distill import distill as distill
from jaxsparse.losses._divergence import jensen_shannon as jensen_shannon

__all__ = [
    "distill",
    "jensen_shannon",
]
