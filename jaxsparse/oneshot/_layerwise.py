"""`layerwise`: each layer is solved with the inputs that the pruned ones give."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax

from jaxsparse import _checks, patterns, solvers
from jaxsparse._host import give_back_memory
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse.calibration import InputStats
from jaxsparse.calibration.first_nan import check_params
from jaxsparse.calibration.selection import selected_kernels
from jaxsparse.curvature import factor_gram
from jaxsparse.oneshot._before import check_takes_mask, masks_before
from jaxsparse.oneshot._effective import (
    unsolvable,
)
from jaxsparse.oneshot._fingerprint import fingerprint
from jaxsparse.oneshot._pass import solvable_pass
from jaxsparse.oneshot._progress import RunState, result_of
from jaxsparse.oneshot._results import Layerwise
from jaxsparse.oneshot._resume import load_state, save_state
from jaxsparse.oneshot._solve import How, Solver, solve_bundle
from jaxsparse.oneshot._unseen import (
    over_places,
)
from jaxsparse.patterns.nm import check_removable
from jaxsparse.tracing import Kernel, trace
from jaxsparse.tree import is_rules, leaves_with_paths, like, matching

# `sparsegpt`'s own default, once for all kernels that share a gram matrix.
_factored = functools.partial(factor_gram, rel_damping=0.01)

_LARGE = 1 << 22  # bytes of kernels, from which on freed memory is worth a call


def _root(gram: Array) -> Any:
    factor: Any = _factored(gram)
    return factor._replace(gram=None)


def layerwise(
    apply_fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    sparsity: float | Mapping[str, float] | PyTree = None,
    solver: Solver = solvers.sparsegpt,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: Where = None,
    masks: PyTree = None,
    share: Callable[[Array], Any] | None = None,
    gram: bool = True,
    sequential: bool = True,
    weight: Callable[..., Array] | None = None,
    host: bool = False,
    unseen: Literal["magnitude", "dense"] = "magnitude",
    rules: Mapping[str, str] | None = None,
    directory: Any = None,
    show: bool | None = None,
) -> Layerwise:
    """Prune a trained model layer by layer, from calibration data alone.

    The model's jaxpr is evaluated once over all batches. Layers are processed in
    execution order. For each kernel the pass accumulates the second moments of its
    inputs (computed with all earlier layers already pruned), prunes the kernel, and
    continues. Frantar & Alistarh (2023, SparseGPT, arXiv:2301.00774) call it sequential
    calibration and stop at decoder blocks; here the pass stops at every kernel, of any
    model. Kernels that read the same numbers (query, key and value) share statistics
    and factor. Layers that are stacked for a scan are pruned turn by turn, experts side
    by side. A kernel that is read more than once (tied weights, a recurrent cell) is
    solved with the inputs of all places. One that the model multiplies by something
    that does not depend on it (a mask, a scale of each output) is solved as that
    product. A kernel that the model standardizes, divides by its norm or quantizes
    cannot be solved, nor one that the trace cannot follow. By default it stays dense,
    and the result's `left_dense` says why; if `where` names it, that is an error.

    Equal blocks share the compiled programs between stops. The device holds the
    parameters, one input's statistics and the activations of one batch; without `host`
    it also holds those of the other batches.

    With `directory` a checkpoint is written after each stop. The same call continues
    from the last one, in another process too, and ends with the same bits. The
    checkpoint holds a fingerprint of weights, data and settings; a call with others
    raises an error.

    Args:
      apply_fn: `apply_fn(params, *inputs)`; see `jaxsparse.trace`.
      params: the parameters.
      batches: the calibration data: for each batch the model's inputs, a tuple where it
        takes several. They are kept until the end. Batches of one shape compile once.
      sparsity: the total fraction to remove, including earlier removals (`masks`). A
        number, a tree of numbers like `params` (see `jaxsparse.allocations`), or a
        mapping from paths or regular expressions to numbers; the first that matches
        counts, and a kernel that none matches stays as it is. May be left out for `NM`.
      solver: `solver(w, evidence, sparsity, pattern=pattern) -> Solved` for a matrix
        `[d_out, d_in]`, such as those of `jaxsparse.solvers`, or a
        `functools.partial` of one.
      pattern: the weights that are pruned together.
      where: which parameters take part; by default those of `Trace.where`: kernels that
        are contracted with data, but not tied embeddings.
      masks: the masks of earlier pruning. Removed weights stay removed with any solver,
        and count toward the sparsity; the solver is called with `mask=`, too.
        Parameters that take no part keep their masks.
      share: applied once to each Gram matrix before it is passed to the solver, e.g. a
        factorization. By default `js.curvature.factor_gram` for `sparsegpt` as it is,
        and nothing for others.
      gram: False for solvers that only need the second moment of each input, `[d_in]`.
      sequential: False takes all statistics from the dense model.
      weight: `weight(*inputs)` returns a weight of at least 0 for each sample of a
        batch (the first axis of its first input), for instance 0 for a sample that does
        not count. It may have more leading axes: for padded sequences `weight=lambda
        ids, mask: mask`, `[batch, tokens]`.
      host: keeps activations in host memory.
      unseen: how to treat a matrix (an expert) that no rows or only zeros reached, of
        which no solver knows anything: "magnitude" prunes it by magnitude, "dense"
        keeps it dense. Either way a warning names it, and its errors are NaN.
      rules: for foreign primitives, as for `jaxsparse.trace`.
      directory: where to write checkpoints.
      show: whether to show a progress bar and a table at the end; by default in a
        terminal.

    Returns:
      The parameters, masks and infos; `left_dense` lists the parameters left out, with
      the reason.

    Raises:
      ValueError: no batches or an empty one; a parameter that `where` names and the
        trace could not follow, or the model changes other than by a product; NaN or Inf
        in a parameter, a batch or an activation, with the first place; a factorization
        that fails, with the parameter's path; a sparsity out of range, or less than
        `masks` have removed of a matrix (or of a group of it); a `directory` with a
        checkpoint of another run, with what differs.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"in": jax.random.normal(keys[0], (8, 16)),
      ...           "out": jax.random.normal(keys[1], (16, 4))}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
      >>> x = jax.random.normal(keys[2], (64, 8))
      >>> pruned = js.oneshot.layerwise(apply_fn, params, [x], sparsity=0.5)
      >>> list(pruned.info), int(pruned.masks["in"].sum())
      (['in', 'out'], 64)
    """
    from jaxsparse import report  # brings rich, which not every program needs

    _checks.check_callable(None, apply_fn=apply_fn)
    _checks.check_arrays(params=params)
    _checks.check_batches(batches)
    _checks.check_callable(3, "pattern", solver=solver)
    for name, function in (("share", share), ("weight", weight)):
        if function is not None:
            _checks.check_callable(None, **{name: function})
    _checks.check_pattern(patterns.Pattern, pattern)
    _checks.check_choice(("magnitude", "dense"), unseen=unseen)
    data = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    _checks.check_known("js.oneshot.layerwise", params=params, batches=data)
    if not data:
        raise ValueError("batches: there are none. Was the iterator used up before?")
    if masks is not None:
        masks = like(masks, params, name="masks")
        patterns.check_masks(masks, params)
        check_takes_mask(solver)
        params = patterns.apply(params, masks)
    traced = trace(apply_fn, params, *data[0], rules=rules)
    kernels, left_dense = selected_kernels(traced, params, where, unsolvable)
    wanted = _sparsities(sparsity, params, kernels, pattern)
    kernels = {path: kernel for path, kernel in kernels.items() if path in wanted}
    _check_groups(kernels, pattern)
    check_params(traced.paths, jax.tree.leaves(params), kernels)
    if share is None and solver is solvers.sparsegpt and gram:
        share = _factored
    before = {}
    if masks is not None:
        before = masks_before(masks, params, kernels, wanted, pattern)
    how = How(kernels, wanted, before, solver, pattern, dense=unseen == "dense")
    left_out = left_dense if where is None else None  # an error where it is named
    options = {"gram": gram, "host": host, "weight": weight}
    walk = solvable_pass(traced, kernels, params, data, left_out, **options)
    state = RunState(0, dict(walk.leaves), {}, {})
    if directory is not None:
        run = fingerprint(
            traced,
            walk.leaves,
            data,
            wanted,
            weight=weight,
            pattern=pattern,
            solver=solver,
            share=share,
            gram=gram,
            sequential=sequential,
            unseen=unseen,
            rules=rules,
            **({"masks": before} if before else {}),
        )
        state = state._replace(run=run)
        state = load_state(directory, state, traced, walk.stages)
        walk.leaves.update(state.leaves)
    dense = None if sequential else walk.all_statistics()
    bar = report.progress(walk.stages, description="layerwise", show=show)
    for index, stage in enumerate(bar):
        if index >= state.stage:
            found = walk.statistics(stage) if dense is None else dense[index]
            for bundle in stage.bundles:
                stats = found.pop(0)
                evidence = _evidence(stats, share, gram)
                for path, info in solve_bundle(
                    bundle, walk, stats, evidence, state, how
                ):
                    error = report.mean_of_known(info.relative_error)
                    bar.say(f"{path}: relative error {error:.2e}")
                del stats, evidence
            units = [unit.path for bundle in stage.bundles for unit in bundle.units]
            large = sum(walk.leaves[path].nbytes for path in units) >= _LARGE
            if large:
                give_back_memory()
            state = state._replace(stage=index + 1, leaves=dict(walk.leaves))
            if directory is not None:
                save_state(directory, state, traced)
                if large:
                    give_back_memory()
        if dense is None:
            walk.advance(index)
    del walk
    result = result_of(state, params, masks, traced, kernels, left_dense)
    give_back_memory()
    if bar.shown:
        print(report.layer_table(result.info, left_dense=result.left_dense))
    return result


def _sparsities(
    sparsity: Any, params: PyTree, kernels: Iterable[str], pattern: patterns.Pattern
) -> dict[str, float | None]:
    """One number for each kernel, but for those that no rule matches."""
    if sparsity is None:
        if not isinstance(pattern, patterns.NM):
            raise ValueError(f"{pattern} needs a sparsity, the fraction to remove.")
        return dict.fromkeys(kernels)
    wanted: dict[str, Any]
    if isinstance(sparsity, Mapping) and set(sparsity) >= set(kernels):
        wanted = {path: sparsity[path] for path in kernels}
    elif jax.tree_util.all_leaves([sparsity]):
        wanted = dict.fromkeys(kernels, sparsity)
    elif is_rules(params, sparsity):
        none = "none of the kernels that take part"
        wanted = matching(sparsity, kernels, name="sparsity", none=none)
    else:
        sparsity = like(sparsity, params, name="sparsity")
        by_path = dict(leaves_with_paths(sparsity))
        wanted = {path: by_path[path] for path in kernels}
    for path, s in wanted.items():
        _checks.check_sparsity(s, name=f"sparsity of {path}")
        if isinstance(pattern, patterns.NM):  # under jit the solvers cannot see it
            check_removable(pattern, s, path=path)
    return {path: float(s) for path, s in wanted.items()}


def _check_groups(kernels: Mapping[str, Kernel], pattern: patterns.Pattern) -> None:
    for path, kernel in kernels.items():
        d_in = kernel.view.d_in
        if isinstance(pattern, patterns.NM) and d_in % pattern.of:
            raise ValueError(
                f"{path}: {pattern} takes groups of {pattern.of} inputs, which do not "
                f"divide its {d_in}. Leave it out with `where`, or choose another "
                "pattern for it."
            )
        if isinstance(pattern, patterns.Balanced):
            sizes = (d_in, kernel.view.d_out)
            for side, size in zip(pattern.shape, sizes, strict=True):
                if size % side:
                    raise ValueError(
                        f"{path}: {pattern} has tiles that do not divide its {d_in} "
                        f"inputs and {kernel.view.d_out} outputs. Leave it out with "
                        "`where`, or choose another pattern for it."
                    )


def _evidence(stats: InputStats, share: Any, gram: bool) -> Any:
    if not gram:
        return stats.square
    assert stats.gram is not None, "asked for"
    if share is None:
        return stats.gram
    if share is _factored:  # the same gram matrix, and no copy of it
        return _shared(stats.gram, _root)._replace(gram=stats.gram)
    return _shared(stats.gram, share)


@functools.partial(jax.jit, static_argnames="share")
def _shared(gram: Array, share: Callable[[Array], Any]) -> Any:
    return over_places(share, gram)
