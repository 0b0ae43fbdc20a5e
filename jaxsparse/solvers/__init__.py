"""Pruning that changes the weights which remain."""

from jaxsparse.solvers._admm import admm as admm
from jaxsparse.solvers._admm import alps as alps
from jaxsparse.solvers._baselines import magnitude as magnitude
from jaxsparse.solvers._baselines import wanda as wanda
from jaxsparse.solvers._channels import RemovedChannels as RemovedChannels
from jaxsparse.solvers._channels import channel_errors as channel_errors
from jaxsparse.solvers._channels import refit_channels as refit_channels
from jaxsparse.solvers._channels import remove_channels as remove_channels
from jaxsparse.solvers._columns import sparsegpt as sparsegpt
from jaxsparse.solvers._exact_obs import exact_obs as exact_obs
from jaxsparse.solvers._obs import obs as obs
from jaxsparse.solvers._refit import refit as refit
from jaxsparse.solvers._solved import Solved as Solved
from jaxsparse.solvers._solved import SolveInfo as SolveInfo

__all__ = [
    "RemovedChannels",
    "SolveInfo",
    "Solved",
    "admm",
    "alps",
    "channel_errors",
    "exact_obs",
    "magnitude",
    "obs",
    "refit",
    "refit_channels",
    "remove_channels",
    "sparsegpt",
    "wanda",
]
