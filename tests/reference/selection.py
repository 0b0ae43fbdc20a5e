"""What a pattern keeps, by sorting: numpy, float64, loops where they are plainest."""

import math

import numpy as np

import jaxsparse as js


def removed_count(sparsity: float, n: int) -> int:
    """`floor(s * n + 1/2)` in float64."""
    return math.floor(np.float64(sparsity) * n + 0.5)


def best(values: np.ndarray, keep: int) -> np.ndarray:
    """Positions of the `keep` largest: ties to the lower one, NaN below all."""
    values = np.asarray(values, np.float64)
    nan = np.isnan(values)
    order = np.lexsort((np.arange(values.size), -np.where(nan, 0, values), nan))
    return order[:keep]


def keep_in_groups(
    scores: np.ndarray, groups, sparsity: float, layers=None, min_keep: int = 1
) -> np.ndarray:
    """Selects in each group, a list of flat indices, on its own.

    The best `min_keep` of each layer (a list of flat indices too; None: of each group)
    come first, even if they are too many.
    """
    flat = np.asarray(scores, np.float64).ravel()
    mask = np.zeros(flat.size, bool)
    for layer in groups if layers is None else layers:
        mask[np.asarray(layer)[best(flat[layer], min_keep)]] = True
    for group in map(np.asarray, groups):
        keep = len(group) - removed_count(sparsity, len(group)) - mask[group].sum()
        rest = group[~mask[group]]
        mask[rest[best(flat[rest], max(0, keep))]] = True
    return mask.reshape(scores.shape)


def layer_groups(shape, batch=()):
    """All weights that share their indices of the batch axes."""
    indices = np.arange(math.prod(shape)).reshape(shape)
    layers = math.prod(shape[a] for a in batch)
    front = np.moveaxis(indices, batch, range(len(batch)))
    return [np.sort(g) for g in front.reshape(layers, -1)]


def input_groups(shape, axes: js.Axes, size: int | None = None):
    """`size` neighbours along the input axes (None: all), for each output and batch."""
    indices = np.arange(math.prod(shape)).reshape(shape)
    columns = indices.transpose((*axes.output, *axes.batch, *axes.input))
    d_in = math.prod(shape[a] for a in axes.input)
    return list(columns.reshape(-1, size or d_in))


def units(scores: np.ndarray, pattern, axes: js.Axes | None):
    """The score of every unit, and for each the slices of its weights."""
    scores = np.asarray(scores, np.float64)
    sides = [1] * scores.ndim
    if isinstance(pattern, js.Block | js.Balanced):
        sides[axes.input[-1]], sides[axes.output[-1]] = pattern.shape
    if isinstance(pattern, js.Channel):
        batch = () if axes is None else axes.batch
        apart = {pattern.axis % scores.ndim, *batch}
        sides = [1 if a in apart else n for a, n in enumerate(scores.shape)]
    grid = tuple(n // side for n, side in zip(scores.shape, sides, strict=True))
    values, places = np.zeros(grid), {}
    reduce = np.max if getattr(pattern, "reduce", "max") == "max" else np.mean
    for unit in np.ndindex(*grid):
        place = tuple(
            slice(i * n, (i + 1) * n) for i, n in zip(unit, sides, strict=True)
        )
        values[unit], places[unit] = reduce(scores[place]), place
    return values, places


def mask(scores, sparsity: float, pattern, axes: js.Axes | None = None) -> np.ndarray:
    """The full mask of one parameter."""
    scores = np.asarray(scores, np.float64)
    if axes is None:
        axes = js.Axes(tuple(range(scores.ndim - 1)), (scores.ndim - 1,))
    match pattern:
        case js.NM(of=of):
            groups = input_groups(scores.shape, axes, of)
            return keep_in_groups(scores, groups, sparsity)
        case js.Unstructured(scope="output"):
            groups = [np.sort(g) for g in input_groups(scores.shape, axes)]
            return keep_in_groups(scores, groups, sparsity)
        case js.Unstructured():
            groups = layer_groups(scores.shape, axes.batch)
            return keep_in_groups(scores, groups, sparsity)
    values, places = units(scores, pattern, axes)
    batch = axes.batch
    if isinstance(pattern, js.Channel):
        batch = tuple(a for a in batch if a != pattern.axis % scores.ndim)
    if isinstance(pattern, js.Balanced):
        groups = [np.sort(g) for g in input_groups(values.shape, axes)]
    else:
        groups = layer_groups(values.shape, batch)
    kept = keep_in_groups(values, groups, sparsity)
    full = np.zeros(scores.shape, bool)
    for unit, place in places.items():
        full[place] = kept[unit]
    return full


def global_masks(
    scores: list, sparsity: float, pattern, axes=None, min_keep: int = 1
) -> list[np.ndarray]:
    """The full masks of parameters whose units all compete."""
    axes = axes or [js.Axes(tuple(range(x.ndim - 1)), (x.ndim - 1,)) for x in scores]
    found = [units(x, pattern, a) for x, a in zip(scores, axes, strict=True)]
    together = np.concatenate([values.ravel() for values, _ in found])
    layers, start = [], 0
    for (values, _), a in zip(found, axes, strict=True):
        batch = a.batch
        if isinstance(pattern, js.Channel):
            batch = tuple(b for b in batch if b != pattern.axis % values.ndim)
        layers += [start + g for g in layer_groups(values.shape, batch)]
        start += values.size
    everyone = [np.arange(together.size)]
    kept = keep_in_groups(together, everyone, sparsity, layers, min_keep)
    full, start = [], 0
    for x, (values, places) in zip(scores, found, strict=True):
        own = kept[start : start + values.size].reshape(values.shape)
        start += values.size
        full.append(np.zeros(x.shape, bool))
        for unit, place in places.items():
            full[-1][place] = own[unit]
    return full
