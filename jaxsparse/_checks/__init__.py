"""Checks of what callers pass, with messages that say what to do instead."""

from jaxsparse._checks._kinds import check_axes as check_axes
from jaxsparse._checks._kinds import check_batches as check_batches
from jaxsparse._checks._kinds import check_bool as check_bool
from jaxsparse._checks._kinds import check_callable as check_callable
from jaxsparse._checks._kinds import check_choice as check_choice
from jaxsparse._checks._kinds import check_expression as check_expression
from jaxsparse._checks._kinds import check_is as check_is
from jaxsparse._checks._kinds import check_key as check_key
from jaxsparse._checks._kinds import check_mapping as check_mapping
from jaxsparse._checks._kinds import check_numbers as check_numbers
from jaxsparse._checks._kinds import check_pattern as check_pattern
from jaxsparse._checks._kinds import check_where as check_where
from jaxsparse._checks._kinds import explained as explained
from jaxsparse._checks._trees import check_arrays as check_arrays
from jaxsparse._checks._trees import check_bools as check_bools
from jaxsparse._checks._trees import check_like as check_like
from jaxsparse._checks._trees import same_structure as same_structure
from jaxsparse._checks._values import check_all_numbers as check_all_numbers
from jaxsparse._checks._values import check_floating as check_floating
from jaxsparse._checks._values import check_no_nan as check_no_nan
from jaxsparse._checks._values import check_number as check_number
from jaxsparse._checks._values import check_positive_int as check_positive_int
from jaxsparse._checks._values import check_scalar as check_scalar
from jaxsparse._checks._values import check_sparsity as check_sparsity
from jaxsparse._checks._values import is_concrete as is_concrete
from jaxsparse._checks._values import shown as shown
