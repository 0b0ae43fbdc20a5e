"""Checkpoints: a training that is killed goes on from its last whole one."""

from jaxsparse.checkpoint._export import Exported as Exported
from jaxsparse.checkpoint._export import export as export
from jaxsparse.checkpoint._export import load_export as load_export
from jaxsparse.checkpoint._orbax import Restored as Restored
from jaxsparse.checkpoint._orbax import restore as restore
from jaxsparse.checkpoint._orbax import save as save
from jaxsparse.checkpoint._steps import latest_step as latest_step
from jaxsparse.checkpoint._steps import steps as steps

__all__ = [
    "Exported",
    "Restored",
    "export",
    "latest_step",
    "load_export",
    "restore",
    "save",
    "steps",
]
