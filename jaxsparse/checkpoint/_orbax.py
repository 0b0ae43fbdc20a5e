"""`save` and `restore`: parameters, optimizer state and masks, through orbax."""

import contextlib
import errno
import os
import pathlib
import re
import warnings
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxsparse import _bits, _checks, patterns
from jaxsparse._text import shown
from jaxsparse._typing import PyTree
from jaxsparse.checkpoint import _files, _leaves, _lock, _reading, _stamp, _steps
from jaxsparse.checkpoint._many import by_the_first
from jaxsparse.transforms import masks_of

_FILE_BYTES = 1 << 24
"""Up to how much is held until it is written: orbax holds what a file takes."""

_WRITTEN_BYTES = 1 << 24
"""How much is written at once, but at least one array: orbax packs it in a copy."""


class Restored(NamedTuple):
    """The result of `restore`.

    Attributes:
      step: the step of the checkpoint.
      params: the parameters, in the containers of the template.
      opt_state: the optimizer state, likewise; None if no template was given.
      masks: a tree of bools like `params`, True = kept: the saved masks, else those in
        `opt_state`, else None.
      extra: the dictionary that was saved.
    """

    step: int
    params: Any
    opt_state: Any
    masks: Any
    extra: dict[str, Any]


def save(
    directory: _steps.Directory,
    *,
    step: Any,
    params: PyTree,
    opt_state: PyTree = None,
    masks: PyTree = None,
    extra: dict[str, Any] | None = None,
    keep: int | None = None,
) -> pathlib.Path:
    """Write a checkpoint, whole or not at all.

    The checkpoint is written beside its place and renamed when it is complete. A
    process killed at any moment leaves earlier checkpoints unchanged; `restore` ignores
    what it left half-written, and the next `save` removes it. Nothing is overwritten or
    deleted before its replacement is complete: a step that is saved again is first
    written aside.

    Arrays of bools, so all masks, take one bit a weight. Sharded arrays are written
    shard by shard. Typed random keys, weak types and Python numbers in a state come
    back as they were, so that a training that is resumed ends with the same bits.

    The stamp holds the CRC-32 of each leaf. That takes one more pass over the arrays,
    and no copy of those on the host.

    The directory belongs to one run. The first `save` writes a file `.lock` into it,
    with the host and the process; another run gets an error at its own first `save`.
    The lock is removed when the process ends, and taken over from a process that was
    killed. A killed process on another host cannot be seen: where jobs are restarted on
    another machine, delete the lock before they begin.

    With many processes each of them calls `save`, and all see the directory. Where each
    process has its own copy of an array, the first process writes its copy.
    A crash of the machine, not of the process, may lose what its file
    system had not yet written.

    Args:
      directory: where the checkpoints go, each in a directory with its step as name. It
        is made if it does not exist.
      step: which step it is: an integer, or an integer array.
      params: the parameters, any pytree: arrays, typed keys, Python numbers, text.
      opt_state: the optimizer state, of any optax transformation or `nnx.Optimizer`.
        Masks of a pruning transformation are in it.
      masks: masks that are in no optimizer state, such as the masks of `js.prune`.
      extra: a small dictionary that JSON can hold, such as the position in the data or
        a seed.
      keep: how many checkpoints to keep; older ones are deleted once this one is
        complete. None keeps all. Newer ones (after going back to an older step) are
        kept and not counted.

    Returns:
      The path of the checkpoint, `directory/<step>`.

    Raises:
      ValueError: a negative step, masks that do not fit `params`, a directory that is
        an address.
      TypeError: a leaf, a step or an `extra` that cannot be saved.
      OSError: the directory cannot be made or written to, is full, belongs to another
        run, or holds another file under the step's name.

    Example:
      >>> import tempfile, jax.numpy as jnp, optax, jaxsparse as js
      >>> tx = js.prune_schedule(0.5, every=1).wrap(optax.adam(1e-3))
      >>> params, opt_state = js.init_sparse(tx, {"w": jnp.array([[3.0, 1.0]])})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = js.checkpoint.save(
      ...         directory, step=100, params=params, opt_state=opt_state, keep=3)
      ...     restored = js.checkpoint.restore(
      ...         directory, params=params, opt_state=tx.init(params))
      >>> path.name, restored.step, restored.masks
      ('100', 100, {'w': Array([[ True, False]], dtype=bool)})
    """
    directory = _steps.as_directory(directory)
    step = _steps.as_step(step)
    if keep is not None:
        _checks.check_positive_int(keep, name="keep")
    trees = {"params": params, "opt_state": opt_state, "masks": masks}
    trees = {item: tree for item, tree in trees.items() if tree is not None}
    leaves = {item: _leaves.named_leaves(tree) for item, tree in trees.items()}
    if masks is not None:
        # Of arrays, and of the Python numbers that a stamp keeps.
        shape_of = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.bool_)
        plain = lambda x: x.stand_in() if isinstance(x, _bits.Packed) else x
        patterns.check_masks(
            jax.tree.map(plain, leaves["masks"]),
            jax.tree.map(shape_of, leaves["params"]),
        )
    encode = lambda item, name, x: _leaves.encode(shown(f"{item} {name}"), x)
    encoded = _leaves.map_items(encode, leaves)
    _stamp.check_extra(extra)
    records = _leaves.map_items(lambda _, __, both: both[0], encoded)
    arrays = _leaves.map_items(lambda _, __, both: both[1], encoded)
    arrays = _leaves.where_written(arrays, records)
    stamp = _stamp.make(
        step=step,
        checksums=_reading.checksums_of(arrays),
        records=records,
        opt_state=opt_state,
        extra=extra,
    )

    with _lock.SAVING:
        by_the_first(lambda: _steps.open_for_writing(directory), "save")
        path = _steps.path_to_write(directory, step)
        with _whole_or_nothing(path), _writer(arrays) as writer:
            writer.save(
                path,
                args=ocp.args.Composite(
                    **{_files.STAMP: ocp.args.JsonSave(stamp)},
                    **{
                        item: ocp.args.PyTreeSave(
                            named, ocdbt_target_data_file_size=_FILE_BYTES
                        )
                        for item, named in arrays.items()
                        if named
                    },
                ),
            )

        def finish() -> None:
            with _whole_or_nothing(path):
                _files.check(path, stamp, up_to=None)
                _files.list_files(path)
            _steps.put_in_place(path)
            if keep is not None:
                _steps.remove_older(directory, step, keep)

        by_the_first(finish, "save")
    return directory / str(step)


def restore(
    directory: _steps.Directory,
    *,
    params: PyTree,
    opt_state: PyTree = None,
    step: Any = None,
) -> Restored:
    """Read a checkpoint into the containers, and onto the devices, of its templates.

    An array is placed like its template (`.sharding`), whatever devices it was saved
    from. An array whose template has no sharding goes to the default device. Types and
    shapes must be those that were saved: nothing is cast, cut or left out silently.

    Args:
      directory: where `save` put the checkpoints.
      params: a template of the parameters: arrays, whose values are not read, or
        `jax.ShapeDtypeStruct`s, for instance from `jax.eval_shape`.
      opt_state: a template of the optimizer state, for instance `tx.init(params)` or
        `jax.eval_shape(tx.init, params)`. None leaves it on disk.
      step: which step. None is the newest one. If it is damaged, that is an error,
        which names an older one: skipping it would lose work silently.

    Returns:
      The step, the parameters, the optimizer state, the masks and `extra`.

    Raises:
      FileNotFoundError: no whole checkpoint there, or none of this step.
      ValueError: a checkpoint of another model (the message names the paths), one of a
        dense run for a sparse template or the reverse, one written by a later version
        of jaxsparse; a template whose sharding names no devices; a checkpoint that is
        damaged (the message names the file, the parameter, and the newest older step
        that is whole): all that is read is checked against the CRC-32 in the stamp, on
        whatever devices it was saved from. (Older checkpoints without checksums are
        read unchecked.)
      TypeError: a template with a leaf that cannot have been saved.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, jaxsparse as js
      >>> params, masks = js.prune({"w": jnp.array([[3.0, 1.0]])}, 0.5)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     _ = js.checkpoint.save(
      ...         directory, step=7, params=params, masks=masks, extra={"epoch": 2})
      ...     js.checkpoint.restore(directory, params=jax.eval_shape(lambda: params))
      Restored(step=7, params={'w': Array([[3., 0.]], dtype=float32)}, opt_state=None,
               masks={'w': Array([[ True, False]], dtype=bool)}, extra={'epoch': 2})
    """
    directory = _steps.as_directory(directory)
    step, path = _find(directory, step)
    fault: Exception | None = None
    try:
        stamp = _files.read_stamp(path)
        _stamp.check_version(stamp, path=path)
        _files.check_stamp(stamp)
        templates = _templates(stamp, params, opt_state, path=path)
        fault = _fault(path, stamp)
        alone = fault is not None and jax.process_count() == 1
        read = _reading.read(path, stamp, templates, alone=alone)
    # Of damaged files orbax makes errors of every kind.
    except Exception as error:
        if fault is None and not isinstance(error, _files.Damaged):
            raise
        said = shown(str(error) if fault is None else f"{fault}; {error}")
        raise ValueError(
            f"{path} is damaged: {said}. {_what_is_left(directory, step)}"
        ) from error
    if fault is not None:
        warnings.warn(
            f"{path}: {shown(str(fault))}. All that was asked for is as it was saved; "
            "the rest of this checkpoint may not be. Save it again.",
            stacklevel=2,
        )

    if opt_state is None and stamp["opt_state_has_masks"] and "masks" not in read:
        warnings.warn(
            f"{path} holds the optimizer state of a sparse run, whose masks are not "
            "restored without it. To train on, pass its template, as opt_state="
            "tx.init(params): else pruned weights grow back. To run the model as it "
            "is, ignore this.",
            stacklevel=2,
        )

    fill = lambda tree, item: jax.tree.unflatten(
        jax.tree.structure(tree), list(read[item].values())
    )
    if opt_state is not None:
        opt_state = fill(opt_state, "opt_state")
    return Restored(
        step=step,
        params=fill(params, "params"),
        opt_state=opt_state,
        masks=fill(params, "masks") if "masks" in read else _masks_in(opt_state),
        extra=stamp["extra"],
    )


def _writer(arrays: _leaves.Items) -> ocp.Checkpointer:
    """Orbax, with few arrays in flight: else it packs all of them at once."""

    def handler(named: dict[str, Any]) -> ocp.PyTreeCheckpointHandler:
        most = max([_WRITTEN_BYTES, *(x.nbytes for x in named.values())])
        # It waits until more is free than an array takes.
        limited = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=most + 1)
        return ocp.PyTreeCheckpointHandler(handler_impl=limited)

    handlers: dict[str, Any] = {i: handler(named) for i, named in arrays.items()}
    handlers[_files.STAMP] = ocp.JsonCheckpointHandler()
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


@contextlib.contextmanager
def _whole_or_nothing(path: pathlib.Path) -> Generator[None]:
    """Where writing a checkpoint fails, nothing of it is left."""
    try:
        yield
    except Exception as error:
        if jax.process_index() == 0:
            _steps.clear(path)
        code = _system_error(error)
        if code is None:
            raise
        raise OSError(
            code,
            f"{os.strerror(code)}: this checkpoint could not be written. Nothing is "
            "left of it, and those before it are as they were. Make room, or save into "
            "another directory",
            os.fspath(path),
        ) from error


def _system_error(error: BaseException | None) -> int | None:
    """The number of what the system refused, which orbax says in words of its own."""
    if isinstance(error, _files.Damaged):  # by others, while it was written
        return errno.EIO
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        found = re.search(r"os_error_code='(\d+)'", str(error))
        if found:
            return int(found[1])
        if "RESOURCE_EXHAUSTED" in str(error):
            return errno.ENOSPC
        error = error.__cause__
    return None


def _find(directory: pathlib.Path, step: Any) -> tuple[int, pathlib.Path]:
    found = _steps.present(directory)
    if not found:
        raise FileNotFoundError(
            errno.ENOENT,
            "no whole checkpoint in this directory (js.checkpoint.latest_step is None "
            "then, and the training begins at its beginning)",
            os.fspath(directory),
        )
    step = max(found) if step is None else _steps.as_step(step)
    if step not in found:
        there = ", ".join(map(str, sorted(found)[-4:]))
        raise FileNotFoundError(
            errno.ENOENT,
            f"no whole checkpoint of step {step}; the newest are of {there}",
            os.fspath(directory),
        )
    return step, found[step]


def _templates(
    stamp: dict[str, Any], params: PyTree, opt_state: PyTree, *, path: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """The leaves to read, by item and name; an error where the stamp has others."""
    templates = {"params": _leaves.named_leaves(params)}
    _stamp.check_leaves(stamp, "params", templates["params"], path=path)
    if opt_state is not None:
        templates["opt_state"] = _leaves.named_leaves(opt_state)
        if "opt_state" in stamp["leaves"]:
            _stamp.check_sparse(stamp, opt_state, path=path)
        _stamp.check_leaves(stamp, "opt_state", templates["opt_state"], path=path)
    if "masks" in stamp["leaves"]:
        _stamp.check_masks(stamp, path=path)
        templates["masks"] = _mask_templates(stamp, templates["params"])
    return templates


def _fault(path: pathlib.Path, stamp: dict[str, Any]) -> Exception | None:
    """What is wrong with the files. It matters where what is read is concerned."""
    try:
        _files.check(path, stamp, up_to=None)
    except _files.Damaged as error:
        return error
    return None


def _what_is_left(directory: pathlib.Path, step: int) -> str:
    """The newest older step of which every array can be read, as advice."""
    found = _steps.whole(directory)
    for older in sorted((s for s in found if s < step), reverse=True):
        # Of many processes none may read alone.
        if jax.process_count() == 1:
            try:
                stamp = _files.read_stamp(found[older])
                _reading.check_arrays(found[older], stamp)
            except _files.Damaged:
                continue
        return (
            f"The newest older step that is whole is {older}: restore it with "
            f"step={older}, or put a copy of this one in its place."
        )
    return "There is no older step that is whole: put a copy of it in its place."


def _mask_templates(stamp: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    # A mask lies as its parameter does, where it is not of size 1.
    records = stamp["leaves"]["masks"]
    templates = {}
    for name, template in params.items():
        shape = tuple(records[name]["shape"])
        place = _leaves.place_of(shown(f"params {name}"), template)
        if isinstance(place, jax.sharding.NamedSharding) and shape != template.shape:
            axes = zip(place.spec, shape, strict=False)  # none for a scalar
            spec = [None if size == 1 else axis for axis, size in axes]
            place = jax.sharding.NamedSharding(
                place.mesh, jax.sharding.PartitionSpec(*spec)
            )
        templates[name] = jax.ShapeDtypeStruct(shape, bool, sharding=place)
    return templates


def _masks_in(opt_state: PyTree) -> PyTree:
    try:
        return masks_of(opt_state)
    except ValueError:  # none, or in a state of one's own that hides their structure
        return None
