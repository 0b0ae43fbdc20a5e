"""AC/DC: sparse and dense phases in turn."""

from jaxsparse import patterns, schedules
from jaxsparse._typing import Where
from jaxsparse.transforms._prune_schedule import PruneSchedule, prune_schedule
from jaxsparse.tree import AxesRule


def acdc(
    sparsity: float,
    *,
    begin: int,
    end: int,
    sparse: int,
    dense: int,
    pattern: patterns.Pattern = patterns.Unstructured("global"),
    where: Where = None,
    axes: AxesRule = None,
    min_keep: int = 1,
    axis_name: patterns.AxisName | None = None,
    total_steps: int | None = None,
) -> PruneSchedule:
    """Train in sparse and dense phases in turn, and end sparse.

    Dense to step `begin`; then `sparse` steps under the masks of the largest magnitudes
    and `dense` steps without masks, in turn; sparse for good from `end` on. Masks are
    chosen when a sparse phase begins and hold for all of it. A weight that comes back
    in a dense phase begins at 0, with its moments reset, under `jaxsparse.enforce`.
    Peste et al. (2021, arXiv:2106.12379): 5 epochs a phase, dense for the first 10, the
    last dense phase twice as long, the last 15 sparse.

    The training gives a dense model too: the parameters after the last dense phase, as
    they are before step `end`. Keep a copy of them, and fine-tune it if you like.

    Differs from the reference implementation, which resets the moments of all weights
    when a dense phase begins. Here only weights that come back lose their moments.

    Args:
      sparsity: of the sparse phases, in (0, 1).
      begin: the first sparse step.
      end: the step from which it stays sparse; if it falls in a sparse phase, that
        phase goes on, and the last dense model is older.
      sparse: the length of a sparse phase in steps.
      dense: the length of a dense phase in steps.
      pattern: which weights are removed together, and which compete. With an `NM` it
        is the 2:4 version of the paper.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      min_keep: the least number of units that each group and each layer keeps.
      axis_name: of shards under `jax.shard_map`, as there.
      total_steps: the length of the training, if known.

    Returns:
      A gradient transformation with the methods `wrap` and `adopt`, like
      `prune_schedule`.

    Raises:
      ValueError: a sparsity outside [0, 1), an empty phase, `end < begin`, or as for
        `prune_schedule`.

    Example:
      >>> import optax, jaxsparse as js
      >>> acdc = js.transforms.acdc(0.9, begin=10, end=85, sparse=5, dense=5)
      >>> tx = acdc.wrap(optax.sgd(0.1, momentum=0.9))
    """
    phases = schedules.alternating(
        sparsity, begin=begin, end=end, sparse=sparse, dense=dense
    )
    period = sparse + dense
    changes = {
        step
        for first in range(begin, end, period)
        for step in (first, first + sparse)
        if step < end
    }
    if not 0 < (end - begin) % period < sparse:  # within a sparse phase it goes on
        changes.add(end)
    return prune_schedule(
        phases,
        every=schedules.at(*sorted(changes)),
        pattern=pattern,
        where=where,
        axes=axes,
        min_keep=min_keep,
        axis_name=axis_name,
        total_steps=total_steps,
    )
