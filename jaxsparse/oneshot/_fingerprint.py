"""What decides the result of a layer-wise run, as text that another process compares.

Nothing in it depends on the process: no `id`, no salted hash, no address. Arrays are
their shape, type and CRC-32; a function is its module and qualified name, its defaults
and what it closes over; one without a name of its own (a lambda, a function within
another) is its bytecode too. Of `where` and `weight` it holds what they chose: the
kernels and the numbers.
"""

import dataclasses
import functools
import re
import types
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._checksums import checksums
from jaxsparse.tracing import Trace
from jaxsparse.tree import leaves_with_paths

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(
    trace: Trace,
    leaves: Mapping[str, Any],
    batches: list[tuple[Any, ...]],
    wanted: Mapping[str, float | None],
    *,
    weight: Callable[..., Any] | None,
    **settings: Any,
) -> dict[str, str]:
    """What decides the result of a run, by name.

    The bytes of the parameters and of the batches are read once, where they are.
    """
    found = {name: text_of(x) for name, x in settings.items()}
    found |= {f"sparsity of {path}": repr(s) for path, s in wanted.items()}
    found["the model's program"] = _text_of_program(trace.program)
    arrays: dict[str, Any] = {}
    for i, batch in enumerate(batches):
        for path, x in leaves_with_paths(batch):
            arrays[f"batch {i}, input {path}"] = x
        if weight is not None:
            arrays[f"weight of batch {i}"] = weight(*jax.tree.map(jnp.asarray, batch))
    arrays |= {f"parameter {path}": x for path, x in leaves.items()}
    return found | _texts_of_arrays(arrays)


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What differs between two runs."""
    names = [*here, *(name for name in there if name not in here)]
    return [
        f"{name}: there {there.get(name, 'nothing')}, here {here.get(name, 'nothing')}"
        for name in names
        if there.get(name) != here.get(name)
    ]


def text_of(x: Any) -> str:
    """A setting as text, the same in every process."""
    return _text(x, ())


def _text(x: Any, within: tuple[Any, ...]) -> str:
    if x is None or type(x) in {bool, int, float, complex, str, bytes}:
        return repr(x)
    if any(x is outer for outer in within):  # a function that calls itself
        return "..."
    text = functools.partial(_text, within=(*within, x))
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        if x.ndim == 0 and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return f"{x.dtype}({x.item()!r})"
        return _texts_of_arrays({"": x})[""]
    if isinstance(x, functools.partial):
        return f"{text(x.func)}({_arguments(x.args, x.keywords, text)})"
    if isinstance(x, types.MethodType):
        return f"{text(x.__func__)} of {text(x.__self__)}"
    if isinstance(x, types.FunctionType):
        return _name(x) + _inside(x, text)
    if isinstance(x, type | types.BuiltinFunctionType):
        return _name(x)
    if isinstance(x, types.ModuleType):
        return x.__name__
    if callable(getattr(x, "__wrapped__", None)):  # of jax.jit and the like
        return text(x.__wrapped__)
    if isinstance(x, Mapping):
        items = sorted((text(k), text(v)) for k, v in x.items())
        return "{" + ", ".join(f"{k}: {v}" for k, v in items) + "}"
    if isinstance(x, set | frozenset):
        return "{" + ", ".join(sorted(map(text, x))) + "}"
    if isinstance(x, list | tuple) and not hasattr(x, "_fields"):
        return "[" + ", ".join(map(text, x)) + "]"
    fields = _fields(x)
    if fields is None:
        return _ADDRESS.sub("", repr(x))
    return f"{_name(type(x))}({_arguments((), fields, text)})"


def _name(x: Any) -> str:
    return f"{x.__module__}.{x.__qualname__}"


def _arguments(
    positional: Any, named: Mapping[str, Any], text: Callable[[Any], str]
) -> str:
    said = [f"{name}={text(value)}" for name, value in sorted(named.items())]
    return ", ".join([*map(text, positional), *said])


def _fields(x: Any) -> dict[str, Any] | None:
    if dataclasses.is_dataclass(x):
        return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    if hasattr(x, "_asdict"):
        return x._asdict()
    return dict(vars(x)) if hasattr(x, "__dict__") else None


def _inside(f: types.FunctionType, text: Callable[[Any], str]) -> str:
    """What of a function its name does not say."""
    said = []
    if f.__defaults__ or f.__kwdefaults__:
        said.append(_arguments(f.__defaults__ or (), f.__kwdefaults__ or {}, text))
    cells = zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)
    closed = {name: _content(cell) for name, cell in cells}
    if closed:
        said.append(f"closes over {_arguments((), closed, text)}")
    if "<" in f.__qualname__:
        said.append(f"code {zlib.crc32(_text_of_code(f.__code__).encode())}")
    return f"[{'; '.join(said)}]" if said else ""


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _text_of_code(code: types.CodeType) -> str:
    constants = [
        _text_of_code(c) if isinstance(c, types.CodeType) else text_of(c)
        for c in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _texts_of_arrays(arrays: Mapping[str, Any]) -> dict[str, str]:
    said, data = {}, {}
    for name, x in arrays.items():
        x = x if hasattr(x, "dtype") else np.asarray(x)
        said[name] = f"{x.dtype}{list(x.shape)}"
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        data[name] = np.asarray(x) if isinstance(x, np.generic) else x
    crcs = checksums(data)
    return {name: f"{text} with CRC-32 {crcs[name]}" for name, text in said.items()}


def _text_of_program(program: Any) -> str:
    """Its equations, without what only tells where they come from."""
    count, crc = 0, 0
    todo = [program]
    while todo:
        jaxpr = todo.pop()
        for x in getattr(jaxpr, "consts", ()):
            crc = zlib.crc32(text_of(x).encode(), crc)
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            operands = [
                f"{v.aval} {v.val}" if hasattr(v, "val") else f"{v.aval}"
                for v in eqn.invars
            ]
            plain = {k: str(v) for k, v in eqn.params.items() if _is_plain(v)}
            line = f"{eqn.primitive.name} {operands} {sorted(plain.items())}"
            count, crc = count + 1, zlib.crc32(_ADDRESS.sub("", line).encode(), crc)
            todo += [
                y
                for x in eqn.params.values()
                for y in (x if isinstance(x, list | tuple) else [x])
                if hasattr(y, "eqns")
            ]
    return f"{count} equations with CRC-32 {crc}"


def _is_plain(x: Any) -> bool:
    if isinstance(x, list | tuple):
        return all(map(_is_plain, x))
    return x is None or type(x) in {bool, int, float, str}
