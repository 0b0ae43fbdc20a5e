"""The stamp of a checkpoint: who wrote it, and what it holds, leaf by leaf.

It is a JSON file beside the arrays, so that a checkpoint of another model, or of a
later version, is refused before an array is read.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._text import shown
from jaxsparse._typing import PyTree
from jaxsparse._version import __version__
from jaxsparse.checkpoint._files import sealed
from jaxsparse.checkpoint._leaves import Record, describe
from jaxsparse.transforms import find_states

FORMAT = 1
"""Goes up when a checkpoint could no longer be read by the code before it."""


def make(
    *,
    step: int,
    records: dict[str, dict[str, Record]],
    checksums: dict[str, dict[str, int]],
    opt_state: PyTree,
    extra: dict[str, Any] | None,
) -> dict[str, Any]:
    """The stamp of a new checkpoint."""
    content = {
        "format": FORMAT,
        "jaxsparse": __version__,
        "jax": jax.__version__,
        "step": step,
        "extra": extra or {},
        "opt_state_has_masks": bool(find_states(opt_state)),
        "leaves": records,
        "checksums": checksums,
    }
    return sealed(content)


def check_extra(extra: Any) -> None:
    """Raises for what JSON would not give back as it was."""
    if not isinstance(extra, dict | None):
        raise TypeError(f"extra: expected a dictionary, got {type(extra).__name__}.")
    _check_json("extra", extra)


def _check_json(path: str, x: Any) -> None:
    # JSON turns tuples into lists and keys into text; here all comes back as it was.
    if isinstance(x, dict):
        for key, value in x.items():
            if not isinstance(key, str):
                raise TypeError(f"{path}: the keys must be text, got {key!r}.")
            _check_json(f"{path}/{key}", value)
    elif isinstance(x, list):
        for i, value in enumerate(x):
            _check_json(f"{path}/{i}", value)
    elif not isinstance(x, str | int | float | None):
        raise TypeError(
            f"{path}: expected what JSON holds (text, numbers, bools, None, lists, "
            f"dictionaries), got {type(x).__name__}. Convert it with int(), list() and "
            "the like; arrays belong into params or opt_state."
        )


def check_version(stamp: dict[str, Any], *, path: Any) -> None:
    """Raises for a checkpoint that this version cannot read."""
    got = stamp.get("format")
    if not isinstance(got, int):
        raise ValueError(f"{path} is not a checkpoint of jaxsparse: no format version.")
    if got > FORMAT:
        by = shown(str(stamp.get("jaxsparse")))
        raise ValueError(
            f"{path} has format version {got}, written by jaxsparse {by}; jaxsparse "
            f"{__version__} reads up to version {FORMAT}. Upgrade jaxsparse to read it."
        )


def check_leaves(
    stamp: dict[str, Any], item: str, templates: dict[str, Any], *, path: Any
) -> None:
    """Raises unless the checkpoint holds exactly what the template asks for."""
    records = stamp["leaves"].get(item)
    if records is None:
        raise ValueError(
            f"{path} holds no {item}: it was saved without. Leave {item} out of this "
            "call, and initialize it anew."
        )
    asked = {
        name: describe(shown(f"{item} {name}"), leaf)
        for name, leaf in templates.items()
    }
    differ = [
        name
        for name, leaf in templates.items()
        if name in records and not _fits(records[name], asked[name], leaf)
    ]
    said = [
        f"{name}: got {_text(records[name])}, expected {_text(asked[name])}"
        for name in differ
    ]
    missing = [name for name in templates if name not in records]
    if missing:
        said.append(f"missing in the checkpoint: {_few(missing)}")
    surplus = [name for name in records if name not in templates]
    if surplus:
        said.append(f"not in the template: {_few(surplus)}")
    if not said:
        return
    hint = ""
    if item == "opt_state" and not missing and not surplus:
        # So does inject_hyperparams, whose arrays turn moments of bf16 into float32.
        hint = (
            " If the optimizer itself changes types in its first step, the template is "
            "jax.eval_shape(tx.update, params, tx.init(params), params)[1]."
        )
    raise ValueError(
        f"{path} is a checkpoint of another model: its {item} differ from the "
        f"template. {_few(said, sep='; ')}. Restore into the {item} of the model that "
        f"was saved, or give another directory or step.{hint}"
    )


def check_masks(stamp: dict[str, Any], *, path: Any) -> None:
    """Raises unless the masks of a stamp are masks of its parameters."""
    params, masks = stamp["leaves"]["params"], stamp["leaves"]["masks"]
    said = []
    if set(params) != set(masks):
        differ = sorted(set(params) ^ set(masks))
        said.append(f"only params or only masks have {_few(differ)}")
    for name in params:
        if name not in masks:
            continue
        shape, full = masks[name]["shape"], params[name]["shape"]
        if masks[name]["dtype"] != "bool" or not _checks.broadcasts(shape, full):
            said.append(
                f"{name}: got a mask {_text(masks[name])}, expected a bool mask that "
                f"broadcasts to {_text(params[name])}"
            )
    if said:
        raise ValueError(
            f"{path}: its masks do not fit its params. {_few(said, sep='; ')}. The "
            "stamp was changed after it was written, or not by js.checkpoint.save: "
            "restore another step."
        )


def check_sparse(stamp: dict[str, Any], opt_state: PyTree, *, path: Any) -> None:
    """Raises when a dense optimizer state meets a sparse one."""
    saved, asked = stamp["opt_state_has_masks"], bool(find_states(opt_state))
    if asked and not saved:
        raise ValueError(
            f"{path} holds the opt_state of a dense run, without masks; the template "
            "is that of a sparse one. To begin pruning from it, restore into the state "
            "of the inner optimizer and adopt it: opt_state = "
            "prune_schedule.adopt(restored.opt_state, restored.params)."
        )
    if saved and not asked:
        raise ValueError(
            f"{path} holds the opt_state of a sparse run, with masks; the template is "
            "that of a dense optimizer. Restore into the state of the transformation "
            "that was saved, js.enforce(optax.chain(prune_schedule, ...)). "
            "(prune_schedule.adopt goes the other way, from dense to sparse.)"
        )


def _fits(record: Record, asked: Record, template: Any) -> bool:
    if record["shape"] != asked["shape"]:
        return False
    if "value" in record and "value" not in asked:
        # `jax.eval_shape` makes arrays of Python numbers.
        kinds = {"bool": jnp.bool_, "int": jnp.integer, "float": jnp.floating}
        kind = kinds.get(record["dtype"])
        return kind is not None and jnp.issubdtype(template.dtype, kind)
    return record["dtype"] == asked["dtype"] and ("value" in record) == (
        "value" in asked
    )


def _text(record: Record) -> str:
    if "value" in record:
        return f"a Python {record['dtype']}"
    return f"{record['dtype']}{record['shape']}"


def _few(words: list[str], most: int = 4, sep: str = ", ") -> str:
    first = shown(sep.join(words[:most]))
    return first if len(words) <= most else f"{first} and {len(words) - most} more"
