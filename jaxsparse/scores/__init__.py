"""How much each weight matters: trees of arrays, larger = keep."""

from jaxsparse.scores._activation import flap as flap
from jaxsparse.scores._activation import gblm as gblm
from jaxsparse.scores._activation import gradient_norm as gradient_norm
from jaxsparse.scores._activation import wanda as wanda
from jaxsparse.scores._bias import bias_compensation as bias_compensation
from jaxsparse.scores._gradient import grasp as grasp
from jaxsparse.scores._gradient import snip as snip
from jaxsparse.scores._gradient import taylor as taylor
from jaxsparse.scores._magnitude import magnitude as magnitude
from jaxsparse.scores._magnitude import random as random
from jaxsparse.scores._score import Score as Score
from jaxsparse.scores._score import as_score as as_score
from jaxsparse.scores._score import moving_average as moving_average
from jaxsparse.scores._second_order import obd as obd
from jaxsparse.scores._second_order import obs as obs
from jaxsparse.scores._synflow import synflow as synflow

__all__ = [
    "Score",
    "as_score",
    "bias_compensation",
    "flap",
    "gblm",
    "gradient_norm",
    "grasp",
    "magnitude",
    "moving_average",
    "obd",
    "obs",
    "random",
    "snip",
    "synflow",
    "taylor",
    "wanda",
]
