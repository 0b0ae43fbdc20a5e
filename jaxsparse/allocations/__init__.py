"""How a budget is shared out: trees of sparsities that meet the total."""

from jaxsparse.allocations._global import global_ as global_
from jaxsparse.allocations._global import round_to_weights as round_to_weights
from jaxsparse.allocations._layerwise import erk as erk
from jaxsparse.allocations._layerwise import uniform as uniform
