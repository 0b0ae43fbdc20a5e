"""Plumbing for pytrees: paths as text, selection, kernel axes, keys."""

from jaxsparse.tree._axes import Axes as Axes
from jaxsparse.tree._axes import AxesRule as AxesRule
from jaxsparse.tree._axes import default_axes as default_axes
from jaxsparse.tree._axes import kernel_axes as kernel_axes
from jaxsparse.tree._axes import resolve_axes as resolve_axes
from jaxsparse.tree._defaults import default_where as default_where
from jaxsparse.tree._defaults import has_plain_name as has_plain_name
from jaxsparse.tree._defaults import why_dense as why_dense
from jaxsparse.tree._paths import leaves_with_paths as leaves_with_paths
from jaxsparse.tree._paths import map_with_path as map_with_path
from jaxsparse.tree._paths import path_str as path_str
from jaxsparse.tree._random import keys_like as keys_like
from jaxsparse.tree._rules import by_rules as by_rules
from jaxsparse.tree._rules import is_rules as is_rules
from jaxsparse.tree._rules import matching as matching
from jaxsparse.tree._select import nearest as nearest
from jaxsparse.tree._select import select as select
from jaxsparse.tree._variables import like as like
from jaxsparse.tree._variables import unwrap_variables as unwrap_variables
from jaxsparse.tree._views import MatrixView as MatrixView
from jaxsparse.tree._views import from_matrices as from_matrices
from jaxsparse.tree._views import matrix_view as matrix_view
from jaxsparse.tree._views import to_matrices as to_matrices

__all__ = [
    "Axes",
    "AxesRule",
    "MatrixView",
    "by_rules",
    "default_axes",
    "default_where",
    "from_matrices",
    "has_plain_name",
    "is_rules",
    "kernel_axes",
    "keys_like",
    "leaves_with_paths",
    "like",
    "map_with_path",
    "matching",
    "matrix_view",
    "nearest",
    "path_str",
    "resolve_axes",
    "select",
    "to_matrices",
    "unwrap_variables",
    "why_dense",
]
