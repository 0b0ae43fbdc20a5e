"""Iterative magnitude pruning with rewinding: lottery tickets."""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _checks, patterns, scores
from jaxsparse._together import each
from jaxsparse._typing import Array, PyTree, Where
from jaxsparse._zeros import nonzero
from jaxsparse.tree import AxesRule, leaves_with_paths, resolve_axes, select


class Ticket(NamedTuple):
    """The result of one round of `lottery_tickets`.

    Attributes:
      round: 0 for the dense training.
      sparsity: the fraction removed in this round's training.
      masks: the masks of the training.
      params: the trained parameters, zero where masked.
    """

    round: int
    sparsity: float
    masks: PyTree
    params: PyTree


def lottery_tickets(
    train: Callable[[PyTree, PyTree, int], PyTree],
    params: PyTree,
    *,
    rounds: int,
    rewind_to: PyTree = None,
    fraction: float = 0.2,
    score: Callable[..., PyTree] = scores.magnitude,
    pattern: patterns.Pattern = patterns.Unstructured("global"),
    where: Where = None,
    axes: AxesRule = None,
    directory: str | os.PathLike[str] | None = None,
) -> Iterator[Ticket]:
    """Train, prune a part of what is left, rewind, and train again.

    After each round a `fraction` of the weights that are left is removed, the lowest
    scores first, so that `1 - (1 - fraction) ** k` are gone in round `k`; what stays
    begins again from `rewind_to`:

    - the initial parameters: Frankle & Carbin (2019, arXiv:1803.03635);
    - the parameters of an early step, from which `train` goes on: Frankle et al. (2020,
      arXiv:1912.05671);
    - None: the trained parameters, so that only the learning rate is rewound, by a
      `train` that begins its schedule anew: Renda et al. (2020, arXiv:2003.02389).

    With a `directory` each round is saved when it is done. A run that was killed and is
    called again, with the same arguments, yields the newest round that was saved, and
    goes on.

    Args:
      train: `train(params, masks, round) -> params`, a whole training that keeps the
        masks, as `optax.chain(optimizer, js.keep_sparse(masks))` does.
      params: the parameters of the first, dense round.
      rounds: how many times to prune; the dense training comes before them.
      rewind_to: as above, with the structure of `params`; or None.
      fraction: of the weights that are left, in (0, 1).
      score: a function of the trained parameters, larger = keep.
      pattern: which weights are removed together, and which compete.
      where: which parameters take part; see `jaxsparse.tree.select`.
      axes: as for `jaxsparse.patterns.masks`.
      directory: where rounds are saved; see `jaxsparse.checkpoint.save`.

    Yields:
      A `Ticket` for each round, as soon as it is trained.

    Raises:
      ValueError: arguments out of range, a `rewind_to` of another model, trained
        parameters that are not zero under the masks, a directory of a run with other
        arguments.
      TypeError: a `train` that is not a function of three arguments.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> train = lambda params, masks, round: js.patterns.apply(params, masks)
      >>> params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> tickets = js.recipes.lottery_tickets(
      ...     train, params, rounds=2, rewind_to=params, fraction=0.5)
      >>> [(ticket.round, ticket.sparsity) for ticket in tickets]
      [(0, 0.0), (1, 0.5), (2, 0.75)]
    """
    _checks.check_callable(3, train=train)
    _checks.check_arrays(params=params)
    _checks.check_positive_int(rounds, name="rounds", least=0)
    _checks.check_number(above=0, below=1, fraction=fraction)
    _checks.check_score(score)
    _checks.check_pattern(patterns.Pattern, pattern)
    if isinstance(pattern, patterns.NM):
        raise ValueError(
            f"{pattern} has one sparsity, and nothing to remove in rounds."
        )
    select(params, where), resolve_axes(params, axes)  # what is wrong is said now
    if rewind_to is not None:
        _checks.check_like(params, rewind_to=rewind_to)

    def prune(ticket: Ticket, sparsity: float) -> PyTree:
        return patterns.masks(
            score(ticket.params),
            sparsity,
            pattern=pattern,
            where=where,
            axes=axes,
            masks=ticket.masks,
        )

    about = {
        "fraction": fraction,
        "pattern": repr(pattern),
        "rewinds": rewind_to is not None,
    }
    return _rounds(train, params, rounds, rewind_to, fraction, prune, directory, about)


def _rounds(
    train: Any,
    params: PyTree,
    rounds: int,
    rewind_to: PyTree,
    fraction: float,
    prune: Callable[[Ticket, float], PyTree],
    directory: Any,
    about: dict[str, Any],
) -> Iterator[Ticket]:
    ticket = None if directory is None else _saved(directory, params, about)
    if ticket is not None:
        yield ticket
    for number in range(0 if ticket is None else ticket.round + 1, rounds + 1):
        sparsity = 1 - (1 - fraction) ** number
        if ticket is None:
            start, masks = params, jax.tree.map(lambda _: jnp.ones((), bool), params)
        else:
            masks = prune(ticket, sparsity)
            begin = ticket.params if rewind_to is None else rewind_to
            start = patterns.apply(begin, masks)
        trained = train(start, masks, number)
        _checks.check_like(params, **{"what train returns": trained})
        _check_zero(trained, masks)
        ticket = Ticket(number, sparsity, masks, trained)
        if directory is not None:
            from jaxsparse import checkpoint

            checkpoint.save(
                directory, step=number, params=trained, masks=masks, extra=about, keep=2
            )
        yield ticket


def _check_zero(params: PyTree, masks: PyTree) -> None:
    """Raises where a training has brought weights back."""
    leaked = each(_leaked, jax.tree.leaves(params), jax.tree.leaves(masks))
    for (path, _), count in zip(leaves_with_paths(params), leaked, strict=True):
        if int(count):
            raise ValueError(
                f"{path}: train returned {int(count)} weights that are not zero where "
                "they are masked. Keep the masks: optax.chain(optimizer, "
                "js.keep_sparse(masks))."
            )


def _leaked(w: Array, mask: Array) -> Array:
    return jnp.sum(nonzero(w) & ~mask)


def _saved(directory: Any, params: PyTree, about: dict[str, Any]) -> Ticket | None:
    """The newest round in a directory; None if there is none."""
    from jaxsparse import checkpoint

    if checkpoint.latest_step(directory) is None:
        return None
    found = checkpoint.restore(directory, params=jax.eval_shape(lambda: params))
    if found.extra != about:
        raise ValueError(
            f"{directory} holds the rounds of another run, {found.extra}; this one is "
            f"{about}. Give it another directory."
        )
    sparsity = 1 - (1 - about["fraction"]) ** found.step
    return Ticket(found.step, sparsity, found.masks, found.params)
