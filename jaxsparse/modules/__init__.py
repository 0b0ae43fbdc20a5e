"""Layers for flax that are sparse from the start and train only their kept weights."""

from jaxsparse.modules._linen import LinenSparseDense as LinenSparseDense
from jaxsparse.modules._nnx import NNXSparseDense as NNXSparseDense
from jaxsparse.modules._nnx import Structure as Structure

__all__ = ["LinenSparseDense", "NNXSparseDense", "Structure"]
