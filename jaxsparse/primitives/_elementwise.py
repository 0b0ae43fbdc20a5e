"""Primitives whose results follow entry by entry from their operands."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse._sharded import fitting
from jaxsparse.primitives import _masking
from jaxsparse.primitives._general import each, elementwise, opaque
from jaxsparse.primitives._row import Primitive, names
from jaxsparse.primitives.dims import Dims, out_shapes

_SAME = names("copy copy_p name optimization_barrier sharding_constraint pvary pcast")
# They change the type, or what is differentiated, and keep the entries.
_CASTS = names("convert_element_type reduce_precision stop_gradient")
_NAMES = names(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj cos cosh digamma div eq eq_to erf erf_inv erfc exp
    exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le
    le_to lgamma log log1p logistic lt lt_to max min mul ne neg nextafter not or
    polygamma population_count pow real regularized_incomplete_beta rem round rsqrt
    select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square sub tan tanh xor zeta
    """
)
_GENTLE = names(
    """
    abs add add_any and asinh atan ceil clamp cos cosh eq erf erfc exp exp2 expm1 floor
    ge gt imag is_finite le logistic lt max min mul ne neg not or real round select_n
    sign sin sinh square sub tan tanh xor
    """
)
_ZEROS = {
    **dict.fromkeys(
        names(
            """
            abs asin asinh atan atanh cbrt ceil conj convert_element_type copy copy_p
            erf erf_inv expm1 floor imag log1p name neg optimization_barrier pcast
            population_count pvary real reduce_precision round sharding_constraint sign
            sin sinh sqrt square stop_gradient tan tanh div rem
            """
        ),
        _masking.first,
    ),
    **dict.fromkeys(("mul", "and"), _masking.any_zero),
    **dict.fromkeys(
        names("add add_any sub or xor complex nextafter"), _masking.all_zero
    ),
    **dict.fromkeys(("max", "min", "clamp"), _masking.bounded),
    "integer_pow": _masking.power,
    "select_n": _masking.cases,
}


def _clamp(low: Any, x: Any, high: Any) -> Any:
    return np.minimum(np.maximum(x, low), high)


_VALUES: Mapping[str, Any] = {
    **{"abs": np.abs, "add": np.add, "add_any": np.add, "sub": np.subtract},
    **{"mul": np.multiply, "div": np.divide, "neg": np.negative, "sign": np.sign},
    **{"max": np.maximum, "min": np.minimum, "clamp": _clamp, "pow": np.power},
    **{"exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log},
    **{"log1p": np.log1p, "sqrt": np.sqrt, "cbrt": np.cbrt, "square": np.square},
    **{"rsqrt": lambda x: 1 / np.sqrt(x), "logistic": lambda x: 1 / (1 + np.exp(-x))},
    **{"sin": np.sin, "cos": np.cos, "tan": np.tan, "tanh": np.tanh},
    **{"sinh": np.sinh, "cosh": np.cosh, "asinh": np.arcsinh, "atan": np.arctan},
    **{"rem": np.fmod, "atan2": np.arctan2, "floor": np.floor, "ceil": np.ceil},
    **{"is_finite": np.isfinite, "eq": np.equal, "ne": np.not_equal, "lt": np.less},
    **{"le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    **{"stop_gradient": np.positive, "copy": np.positive, "name": np.positive},
}


def bitcast(eqn: Any, ins: Sequence[Dims]) -> list[Dims]:
    """Other types of the same width; with another one an axis comes or goes."""
    shapes = [tuple(d.size for d in ins[0])]
    return elementwise(eqn, ins) if shapes == out_shapes(eqn) else opaque(eqn, ins)


def _sharding(eqn: Any, sizes: Any, ins: Sequence[Dims], outs: Sequence[Dims]) -> Any:
    return {"sharding": fitting(eqn.params["sharding"], sizes.shape(outs[0]))}


def _row(name: str) -> Primitive:
    same, cast = name in _SAME, name in _CASTS
    return Primitive(
        each if name == "optimization_barrier" else elementwise,
        entrywise=True,
        keeps_entries=same or cast,
        same=same,
        zeros=_ZEROS.get(name),
        value=_VALUES.get(name),
        gentle=same or cast or name in _GENTLE,
        resize=_sharding if name == "sharding_constraint" else None,
    )


ROWS: Mapping[str, Primitive] = {
    **{name: _row(name) for name in (*_SAME, *_CASTS, *_NAMES)},
    "bitcast_convert_type": Primitive(bitcast),
}
"""The rows by primitive."""
