"""Published trainings, each one value: schedules, optimizer and loss."""

from jaxsparse.recipes._gmp_star import gmp_star as gmp_star
from jaxsparse.recipes._lottery import Ticket as Ticket
from jaxsparse.recipes._lottery import lottery_tickets as lottery_tickets
from jaxsparse.recipes._magnitude import gmp as gmp
from jaxsparse.recipes._magnitude import one_shot as one_shot
from jaxsparse.recipes._obert import obert_downstream as obert_downstream
from jaxsparse.recipes._obert import obert_upstream as obert_upstream
from jaxsparse.recipes._recipe import Recipe as Recipe

__all__ = [
    "Recipe",
    "Ticket",
    "gmp",
    "gmp_star",
    "lottery_tickets",
    "obert_downstream",
    "obert_upstream",
    "one_shot",
]
