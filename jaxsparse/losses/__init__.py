"""Losses that repair a pruned network: an example at a time, so that you reduce."""

from jaxsparse.losses._distill import distill as distill

__all__ = [
    "distill",
]
