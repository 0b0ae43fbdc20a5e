"""Gradients and scores that are estimated from values of the loss alone."""

from jaxsparse.zeroth_order._coordinates import coordinate_grads as coordinate_grads
from jaxsparse.zeroth_order._random import grasp as grasp
from jaxsparse.zeroth_order._random import random_grads as random_grads

__all__ = [
    "coordinate_grads",
    "grasp",
    "random_grads",
]
