"""Coupled channels of any model, and a model that is really smaller."""

from jaxsparse.structured._drop import Drop as Drop
from jaxsparse.structured._groups import Group as Group
from jaxsparse.structured._groups import Groups as Groups
from jaxsparse.structured._groups import Member as Member
from jaxsparse.structured._groups import Reason as Reason
from jaxsparse.structured._groups import groups as groups
from jaxsparse.structured._narrow import Narrowed as Narrowed
from jaxsparse.structured._narrow import masks as masks
from jaxsparse.structured._narrow import narrow as narrow
from jaxsparse.structured._narrow import widen as widen
