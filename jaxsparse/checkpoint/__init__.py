"""Checkpoints: a training that is killed goes on from its last whole one."""

from jaxsparse.checkpoint._orbax import Restored as Restored
from jaxsparse.checkpoint._orbax import restore as restore
from jaxsparse.checkpoint._orbax import save as save
from jaxsparse.checkpoint._steps import latest_step as latest_step
from jaxsparse.checkpoint._steps import steps as steps
