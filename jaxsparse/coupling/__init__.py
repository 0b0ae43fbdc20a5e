"""Which axes of a model's parameters must lose the same indices."""

from jaxsparse.coupling.drop import Drop as Drop
from jaxsparse.coupling.grouping import Group as Group
from jaxsparse.coupling.grouping import Groups as Groups
from jaxsparse.coupling.grouping import Member as Member
from jaxsparse.coupling.grouping import Reason as Reason
from jaxsparse.coupling.grouping import groups as groups

__all__ = [
    "Drop",
    "Group",
    "Groups",
    "Member",
    "Reason",
    "groups",
]
