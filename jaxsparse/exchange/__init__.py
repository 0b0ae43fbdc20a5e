"""Exchange of a few entries of each gradient between workers."""

from jaxsparse.exchange._ef21 import EF21State as EF21State
from jaxsparse.exchange._ef21 import ef21 as ef21
from jaxsparse.exchange._feedback import FeedbackState as FeedbackState
from jaxsparse.exchange._feedback import dgc as dgc
from jaxsparse.exchange._feedback import top_k as top_k
from jaxsparse.exchange._largest import largest as largest
from jaxsparse.exchange._workers import specs as specs

__all__ = ["EF21State", "FeedbackState", "dgc", "ef21", "largest", "specs", "top_k"]
