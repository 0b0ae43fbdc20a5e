"""Pruning that changes the weights which remain."""

from jaxsparse.solvers._obs import obs as obs
