"""PASER: which data to recover a pruned model with, for a budget."""

import itertools
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse import _checks
from jaxsparse._typing import Array
from jaxsparse.contrib._spectral import spectral_labels


class RecoveryData(NamedTuple):
    """The result of `paser`.

    Attributes:
      indices: of the chosen samples, in the order of choice, int64.
      labels: the cluster of each sample, `[samples]`.
      degradations: the mean divergence of each cluster, `[clusters]`.
      budgets: how many samples each cluster may have; it adds up to the budget.
      rejected: indices of samples that were left out for a conflict.
    """

    indices: np.ndarray
    labels: np.ndarray
    degradations: np.ndarray
    budgets: np.ndarray
    rejected: np.ndarray


def paser(
    embeddings: Any,
    divergences: Any,
    costs: Any,
    *,
    budget: int,
    clusters: int,
    key: Array,
    concepts: Sequence[Collection[Hashable]] | None = None,
) -> RecoveryData:
    """Choose, within a budget, the data that best recover a pruned model (PASER).

    He et al. (2025, PASER, arXiv:2502.12594), in three steps:

    1. Embeddings of the samples are clustered in their spectral embedding, so that a
       cluster stands for a capability.
    2. A cluster's degradation is its mean divergence, and its budget `n_k` the share of
       that in the sum over clusters. Within a cluster samples come in falling order of
       `divergence / log(cost)`.
    3. A sample is rejected when it links two concepts that have both been seen in
       chosen samples, and never together. Then the next one takes its place.

    Differs from the paper, which rounds `n_k` down: here they add up to the budget, by
    largest remainder, and small clusters leave their unused budget to the others.
    Clusters come in falling order of degradation. The paper takes a diffusion kernel,
    non-negative factors and their number from the data; here the kernel's eigenvectors
    and k-means, of a given number, through 1,024 landmarks where there are more samples
    (`O(samples * 1024 * (d + 1024))`, on the host). The details are our reading.

    Args:
      embeddings: `[samples, d]`, of any sentence encoder.
      divergences: `[samples]`, 0 or more: how far the pruned model's answers are from
        the dense one's, the mean of `jaxsparse.losses.jensen_shannon` over tokens.
      costs: `[samples]`, above 1: what a sample costs to train on, such as its squared
        number of tokens.
      budget: how many samples to choose.
      clusters: how many clusters.
      key: a typed key, `jax.random.key(seed)`.
      concepts: for each sample the concepts in it, such as its key phrases; None for no
        conflicts.

    Returns:
      A `RecoveryData`; fewer samples than the budget where conflicts leave no others.

    Raises:
      ValueError: arrays that do not fit each other, NaN, negative divergences or none
        above 0, costs of 1 or less, a budget or a number of clusters above that of
        samples.
      TypeError: arguments that are not arrays of numbers, a key that is not a random
        key.

    Example:
      >>> import jax, numpy as np, jaxsparse as js
      >>> embeddings = np.array([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]])
      >>> found = js.contrib.paser(
      ...     embeddings, [0.1, 0.1, 0.1, 0.1, 0.3, 0.2], [16.0] * 6,
      ...     budget=3, clusters=2, key=jax.random.key(0))
      >>> found.indices.tolist(), sorted(found.budgets.tolist())
      ([4, 5, 0], [1, 2])
    """
    _checks.check_key(key)
    x = _numbers("embeddings", embeddings, 2)
    samples = len(x)
    damage = _numbers("divergences", divergences, 1, samples)
    cost = _numbers("costs", costs, 1, samples)
    for name, number in {"budget": budget, "clusters": clusters}.items():
        _checks.check_positive_int(number, name=name)
        if number > samples:
            raise ValueError(f"{name} is {number}, and there are {samples} samples.")
    _check_values(damage, cost)
    if concepts is not None:
        _check_concepts(concepts, samples)
    seed = int(jax.random.bits(key, dtype="uint32"))
    labels = spectral_labels(x, clusters, seed)
    sizes = np.bincount(labels)
    degradations = np.bincount(labels, damage) / sizes
    budgets = _shares(budget, degradations, sizes)
    worth = damage / np.log(cost)
    chosen: list[int] = []
    rejected: list[int] = []
    links = _Links()
    for k in np.argsort(-degradations, kind="stable"):
        members = np.flatnonzero(labels == k)
        order = members[np.argsort(-worth[members], kind="stable")]
        left = int(budgets[k])
        for i in map(int, order):
            if not left:
                break
            if concepts is not None and not links.add(concepts[i]):
                rejected.append(i)
                continue
            chosen.append(i)
            left -= 1
    indices = np.array(chosen, np.int64)
    return RecoveryData(
        indices, labels, degradations, budgets, np.array(rejected, np.int64)
    )


class _Links:
    """Concepts that were seen, and which of them together."""

    def __init__(self) -> None:
        self.seen: set[Hashable] = set()
        self.together: set[frozenset[Hashable]] = set()

    def add(self, concepts: Iterable[Hashable]) -> bool:
        """Takes a sample's concepts, unless they conflict with those of others."""
        own = set(concepts)
        pairs = {frozenset(pair) for pair in itertools.combinations(own, 2)}
        if any(pair <= self.seen for pair in pairs - self.together):
            return False
        self.seen |= own
        self.together |= pairs
        return True


def _shares(budget: int, worth: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Whole numbers in proportion to `worth`, at most `most`, that add up."""
    found = np.zeros(len(worth))
    free = np.ones(len(worth), bool)
    while free.any():
        left = budget - found[~free].sum()
        part = np.where(free, worth, 0)
        # Where nothing is damaged that has room, the rest is spread by size.
        part = part if part.sum() > 0 else np.where(free, most, 0)
        share = left * part / part.sum()
        full = free & (share >= most)
        if not full.any():
            found[free] = share[free]
            break
        found[full], free = most[full], free & ~full
    counts = np.floor(found + 1e-9).astype(np.int64)
    missing = budget - int(counts.sum())
    by_remainder = np.argsort(counts - found, kind="stable")
    room = [k for k in by_remainder if counts[k] < most[k]]
    counts[room[:missing]] += 1
    return counts


def _numbers(name: str, value: Any, ndim: int, samples: int | None = None) -> Any:
    """An array of finite numbers, in float64."""
    try:
        x = np.asarray(value)
    except (TypeError, ValueError):
        x = np.asarray(None)
    kind = "[samples, d]" if ndim == 2 else "[samples]"
    if x.dtype.kind not in "biufV" or x.ndim != ndim or not x.size:
        raise TypeError(
            f"{name} must be an array {kind} of numbers, got {_checks.shown(value)}."
        )
    if samples is not None and len(x) != samples:
        raise ValueError(
            f"{name} are of {len(x)} samples, and there are {samples} embeddings."
        )
    x = x.astype(np.float64)
    if not np.all(np.isfinite(x)):
        raise ValueError(
            f"{name}: {int(np.sum(~np.isfinite(x)))} entries are NaN or infinite."
        )
    return x


def _check_values(damage: np.ndarray, cost: np.ndarray) -> None:
    if np.any(damage < 0):
        raise ValueError(f"divergences are 0 or more, got {damage.min():g}.")
    if not np.any(damage > 0):
        raise ValueError(
            "divergences are 0 for all samples: the pruned model answers as the dense "
            "one does, and there is nothing to recover."
        )
    if np.any(cost <= 1):
        raise ValueError(
            f"costs must be above 1, their logarithm divides; got {cost.min():g}."
        )


def _check_concepts(concepts: Any, samples: int) -> None:
    if not isinstance(concepts, Sequence):
        raise TypeError(
            "concepts must be a list with a set of concepts for each sample, got "
            f"{_checks.shown(concepts)}."
        )
    if len(concepts) != samples:
        raise ValueError(
            f"concepts: {len(concepts)} sets of them, and there are {samples} samples."
        )
    for i, own in enumerate(concepts):
        if not isinstance(own, Collection):
            raise TypeError(f"concepts[{i}] must be a set, got {_checks.shown(own)}.")
