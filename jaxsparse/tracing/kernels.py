"""From the places that read a parameter to its input, output and batch axes."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsparse.primitives import axes as algebra
from jaxsparse.primitives.axes import Axis
from jaxsparse.primitives.dims import Dims
from jaxsparse.program import Address
from jaxsparse.tracing._parts import Cut, cut_of, piece_of, with_pieces
from jaxsparse.tracing.values import Site
from jaxsparse.tree import Axes, MatrixView, matrix_view


class NotFollowed(Exception):
    """A parameter that has no one reading as a matrix; says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """How one equation reads one kernel: where inputs and matrices are found in it.

    Attributes:
      site: the equation.
      inputs: `[d_in]`, for each column of the kernel's matrices its place along the
        site's contracted axes.
      batch: for each of the site's batch indices (loops first, in their order) the
        kernel's flat batch index; of the shape of these indices.
      scans: the scans that hand out the kernel's slices, outermost first.
    """

    site: Site
    inputs: np.ndarray
    batch: np.ndarray
    scans: tuple[Address, ...]

    def samples(self, axes: Sequence[Axis]) -> np.ndarray:
        """For each row of inputs its place along some axes of the model's inputs."""
        site = self.site
        contracted, batch = site.of_input
        dims, repeat = site.input_dims, 1
        free = [d for i, d in enumerate(dims) if i not in contracted and i not in batch]
        if site.conv is not None:
            first, positions = site.conv
            free, repeat = [dims[first]], positions
        found = np.where(_crossed(free, axes), -1, _match(free, axes, distinct=True))
        return np.repeat(found, repeat)

    @property
    def key(self) -> Any:
        """Equal for readings whose statistics are the same."""
        place = self.inputs.tobytes(), self.batch.tobytes(), self.batch.shape
        return self.site.reads, place, self.scans


def view_of(
    path: str, shape: tuple[int, ...], sites: Sequence[Site]
) -> tuple[MatrixView, tuple[Reading, ...]]:
    """The view of a parameter, and how each site reads it."""
    dims = next(dims for p, dims in sites[0].origin.sources if p == path)
    roles: dict[Axis, str] = {}
    for site in sites:
        _assign(roles, dims, site)
    runs = [run for axis in dims for run in _runs(axis, roles)]
    named = lambda name: [part for role, part in runs if role == name]
    places = {name: named(name) for name in ("input", "output", "batch")}
    found = [_reading(site, places) for site in sites]
    cuts = _cuts(found, places)
    names, sizes = [], []
    for role, part in runs:
        cut = cuts.get(role)
        if cut is not None and part is places[role][cut.axis]:
            names += ["batch", role]
            sizes += [part.size // cut.size, cut.size]
        else:
            names.append(role)
            sizes.append(part.size)
    pick = lambda name: tuple(i for i, n in enumerate(names) if n == name)
    axes = Axes(pick("input"), pick("output"), pick("batch"))
    split = shape if len(sizes) == len(shape) else tuple(sizes)
    view = matrix_view(shape, axes, split=split)
    readings: dict[Any, Reading] = {}
    for index, reading in enumerate(found):
        for piece in _pieces(reading, index, runs, places, cuts):
            readings.setdefault(piece.key, piece)  # the same rows once
    return view, tuple(readings.values())


def _cuts(found: Sequence[Reading], places: dict[str, list[Axis]]) -> dict[str, Cut]:
    """How inputs and outputs fall into pieces that different inputs meet."""
    cuts = {}
    sizes = [x.size for x in places["input"]]
    reads = [reading.inputs >= 0 for reading in found]
    if not np.all(reads):
        cut = cut_of(reads, sizes)
        all_read = cut is not None and len({i for x in cut.taken for i in x}) == (
            sizes[cut.axis] // cut.size
        )
        # Pieces of unequal size would lose how their own inputs go together.
        if cut is None or not all_read or any(len(x) != 1 for x in cut.taken):
            at = next(r.site for r in found if np.any(r.inputs < 0))
            raise NotFollowed(f"only a part of its inputs is read at {at.source}")
        cuts["input"] = cut
    met = cuts["input"].taken if cuts else [()] * len(found)
    keys = {
        piece: {r.key for r, x in zip(found, met, strict=True) if x == piece}
        for piece in met
    }
    # Parts of the outputs may be read apart, as long as they read the same inputs.
    if max(map(len, keys.values())) > 1:
        outputs = [_match(places["output"], _kernel_dims(r.site)[2]) for r in found]
        reads = [x >= 0 for x in outputs]
        if not np.all(reads):
            cut = cut_of(reads, [x.size for x in places["output"]])
            if cut is None:
                raise NotFollowed(
                    "parts of its outputs read different inputs; keep them as "
                    "parameters of their own"
                )
            cuts["output"] = cut
    return cuts


def _pieces(
    reading: Reading,
    index: int,
    runs: Sequence[tuple[str, Axis]],
    places: dict[str, list[Axis]],
    cuts: dict[str, Cut],
) -> list[Reading]:
    """A reading for each piece that a site has; itself where nothing is cut."""
    if not cuts:
        return [reading]
    sizes = [x.size for x in places["input"]]
    taken = {role: cut.taken[index] for role, cut in cuts.items()}
    found = []
    for at in itertools.product(*taken.values()):
        chosen = dict(zip(taken, at, strict=True))
        inputs, inserted, batches = reading.inputs, [], 0
        for role, part in runs:
            cut = cuts.get(role)
            if cut is not None and part is places[role][cut.axis]:
                inserted.append((batches, part.size // cut.size, chosen[role]))
                batches += 1
            batches += role == "batch"
        if "input" in cuts:
            inputs = piece_of(inputs, sizes, cuts["input"], chosen["input"])
        batch = with_pieces(reading.batch, [x.size for x in places["batch"]], inserted)
        found.append(dataclasses.replace(reading, inputs=inputs, batch=batch))
    return found


def _kernel_dims(site: Site) -> tuple[Dims, Dims, Dims]:
    """The contracted, batch and produced axes of a site's kernel operand."""
    dims = site.origin.dims
    contracted = tuple(dims[a] for a in site.contracted)
    batch = tuple(dims[a] for a in site.batch)
    rest = [
        d
        for i, d in enumerate(dims)
        if i not in site.contracted and i not in site.batch
    ]
    if site.groups > 1:
        (out,) = rest
        group, within = algebra.split_minor(out, out.size // site.groups)
        batch, rest = (group,), [within]
    return contracted, batch, tuple(rest)


def _assign(roles: dict[Axis, str], own: Dims, site: Site) -> None:
    try:
        contracted, batch, rest = _kernel_dims(site)
    except algebra.Incompatible as error:
        raise NotFollowed(f"its groups do not fit: {error}") from error
    mine = {x for axis in own for x in algebra.leaves(axis)}
    named = (contracted, "input"), (batch, "batch"), (rest, "output")
    for axes, role in named:
        for axis in axes:
            for x in algebra.leaves(axis):
                if x not in mine:
                    continue
                if roles.setdefault(x, role) != role and x.size > 1:
                    raise NotFollowed(
                        f"an axis of {x.size} is {roles[x]} axis at one place and "
                        f"{role} axis at {site.source}"
                    )


def _runs(axis: Axis, roles: dict[Axis, str]) -> list[tuple[str, Axis]]:
    """The parts of one axis of a parameter that have a role of their own."""
    node = algebra.find(axis)
    # What no site has was sliced along, or is of size 1: it is carried.
    named = {roles.get(x, "batch") for x in algebra.leaves(node)}
    if len(named) == 1:
        return [(named.pop(), node)]
    if node.is_sum:
        raise NotFollowed(
            "parts of one of its axes are read in different ways; keep them as "
            "parameters of their own"
        )
    runs: list[tuple[str, list[Axis]]] = []
    for part in algebra.parts(node):
        for name, piece in _runs(part, roles):
            if runs and runs[-1][0] == name:
                runs[-1][1].append(piece)
            else:
                runs.append((name, [piece]))
    return [(name, algebra.product(pieces)) for name, pieces in runs]


def _reading(site: Site, places: dict[str, list[Axis]]) -> Reading:
    contracted, batch, _ = _kernel_dims(site)
    loops = tuple(axis for _, axis in site.origin.loops)
    inputs = _match(places["input"], contracted)
    # Each index that the site has must be one of the kernel.
    space = (*loops, *batch)
    ones = site.origin.dropped
    flat = _match([*space, *ones], places["batch"], distinct=True)
    shape = tuple(a.size for a in space)
    if np.any(flat < 0):
        raise NotFollowed(f"its slices at {site.source} could not be told apart")
    return Reading(
        site, inputs, flat.reshape(shape), tuple(a for a, _ in site.origin.loops)
    )


def _match(
    wanted: Sequence[Axis], given: Sequence[Axis], *, distinct: bool = False
) -> np.ndarray:
    """For each index along the wanted axes its place along the given ones, or -1.

    -1 too where places must be distinct, and the common leaves do not tell them so.
    """
    same = [algebra.find(x) for x in wanted] == [algebra.find(x) for x in given]
    if same and not _repeated(wanted):
        return np.arange(math.prod(a.size for a in wanted))
    left, right = _labels(wanted), _labels(given)
    n, m = (math.prod(a.size for a in axes) for axes in (wanted, given))
    signs = np.zeros(n + m, np.int64)
    for key in left.keys() & right.keys():
        label = np.concatenate([left[key], right[key]]) + 1
        radix = int(label.max()) + 1
        if int(signs.max()) >= 2**62 // radix:  # as of an axis of many pieces
            signs = np.unique(signs, return_inverse=True)[1].reshape(-1)
        signs = signs * radix + label
    a, b = signs[:n], signs[n:]
    order = np.argsort(b, kind="stable")
    at = np.searchsorted(b[order], a)
    many = np.searchsorted(b[order], a, side="right") - at
    found = order[np.minimum(at, m - 1)]
    return np.where((many == 1) | ((many > 1) & (not distinct)), found, -1)


def _repeated(axes: Sequence[Axis]) -> bool:
    """Whether some leaf is there twice, so that it does not say where."""
    found = [x for axis in axes for x in algebra.leaves(axis)]
    return len(found) > len(set(found))


def _crossed(wanted: Sequence[Axis], given: Sequence[Axis]) -> np.ndarray:
    """Where the wanted axes have one of the given leaves twice, as pairs of tokens."""
    total = inner = math.prod(a.size for a in wanted)
    mine = {x for axis in given for x in algebra.leaves(axis) if x.size > 1}
    times = {leaf: np.zeros(total, int) for leaf in mine}
    for axis in wanted:
        inner //= axis.size
        at = np.arange(total) // inner % axis.size
        for x, index in algebra.coordinates(axis):
            if x in mine:
                times[x] += index[at] >= 0
    return np.any([t > 1 for t in times.values()] or [np.zeros(total, bool)], axis=0)


def _labels(axes: Sequence[Axis]) -> dict[Axis, np.ndarray]:
    """For each leaf its index along the flattened axes, -1 where it has no part."""
    total = math.prod(a.size for a in axes)
    inner, labels = total, {}
    for axis in axes:
        inner //= axis.size
        at = np.arange(total) // inner % axis.size
        for x, index in algebra.coordinates(axis):
            found = index[at]
            labels[x] = np.maximum(labels[x], found) if x in labels else found
    return labels
