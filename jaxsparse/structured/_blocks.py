"""`blocks`: the residual branches of any model."""

import dataclasses
import math
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxsparse.tracing import Trace
from jaxsparse.tracing._jaxprs import Address, called, equations
from jaxsparse.tracing._steps import Step, Steps, flatten
from jaxsparse.tree import nearest

Join = Callable[["Block"], Hashable] | None


class Addition(NamedTuple):
    """Where a branch is added to the stream.

    Attributes:
      address: of the equation in the traced program.
      turns: of the scans over layers around it.
      stream: which of its two operands is the stream; the other is the branch.
    """

    address: Address
    turns: tuple[int, ...]
    stream: int


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual branch y = f(x) of x + y.

    Attributes:
      name: the common path of its kernels, "layers/0/attn"; where other parameters lie
        there too, with what follows, "layers/0/up+down"; in a scan over layers with
        the turn, "layers/attn[2]".
      paths: the parameters that nothing but this block uses; slices of stacked ones
        with the turn, "layers/attn/out/kernel[2]".
      source: the line of the model where the branch is added.
      parameters: how many numbers `paths` hold: what goes with the block.
      additions: where it is added: one place, more for blocks that were joined.
    """

    name: str
    paths: tuple[str, ...]
    source: str
    parameters: int
    additions: tuple[Addition, ...]


class Unit(NamedTuple):
    """A parameter, or the slice of it that some turns of scans are handed.

    Attributes:
      path: the parameter's path.
      at: pairs of one of its axes and the index there; () for the whole parameter.
    """

    path: str
    at: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        turns = ",".join(str(i) for _, i in self.at)
        return f"{self.path}[{turns}]" if turns else self.path


class Held(NamedTuple):
    """A variable that is a parameter, or a slice, cast or transpose of one.

    Attributes:
      unit: what it holds.
      axes: which of the parameter's axes its own are.
    """

    unit: Unit
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A flat program and what was found in it.

    Attributes:
      steps: the program, scans over layers unrolled.
      held: the variables that hold parameters.
      unrolled: the scans that were unrolled.
      calls: the calls that were inlined.
      checkpoints: the calls whose values are computed again in the backward pass.
      additions: of residual branches, each with the index of its step, in order.
      before: for a value of a stream the one that it was before a branch was added, or
        before it was scaled or cast.
    """

    steps: Steps
    held: Mapping[int, Held]
    unrolled: frozenset[Address]
    calls: frozenset[Address]
    checkpoints: Mapping[Address, Any]
    additions: Mapping[Addition, int]
    before: Mapping[int, int]


def blocks(trace: Trace, *, join: Join = None) -> dict[str, Block]:
    """The residual branches of a model: what can go without changing any shape.

    A branch is what is added to a value x of its own shape and depends on x through at
    least one contraction of a parameter: attention and feed-forward sublayers, before
    or after a norm, side by side in a parallel layer, the two convolutions of a ResNet.
    Nothing depends on classes or names. Branches of a stack that is run by a scan over
    its parameters are found for each turn. A stage's first ResNet block, of which both
    paths have convolutions, is none: no shape would fit without it; nor is what lies
    in a loop over time, in a `cond`, or inside of a function with a derivative of its
    own.

    Branches may lie within each other (a U-Net's skips around everything inside). A
    stacked parameter that is computed with before the scan takes it apart, other than
    cast or transposed, stays whole and is counted to no block.

    Args:
      trace: of `js.trace`.
      join: `join(block)` gives a key; consecutive blocks of equal keys become one, a
        whole layer from its attention and its feed-forward branch. None leaves a block
        alone. (Norms between the branches of a joined block stay.)

    Returns:
      By name, in the order in which they are added.

    Raises:
      ValueError: there are none.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> layer = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
      >>> params = {"layers": [layer, layer]}
      >>> def apply_fn(params, x):
      ...     for p in params["layers"]:
      ...         x = x + jnp.tanh(x @ p["up"]) @ p["down"]
      ...     return x
      >>> trace = js.trace(apply_fn, params, jnp.ones((2, 4)))
      >>> for block in js.structured.blocks(trace).values():
      ...     print(block.name, block.parameters, block.paths)
      layers/0 64 ('layers/0/up', 'layers/0/down')
      layers/1 64 ('layers/1/up', 'layers/1/down')
    """
    if join is None:
        if trace not in _plain:
            _plain[trace] = _named(trace, [(a,) for a in flat_of(trace).additions])
        return dict(_plain[trace])
    groups: list[tuple[Addition, ...]] = []
    last: Hashable = None
    for block in blocks(trace).values():
        key = join(block)
        if groups and key is not None and key == last:
            groups[-1] += block.additions
        else:
            groups.append(block.additions)
        last = key
    return _named(trace, groups)


_plain: "weakref.WeakKeyDictionary[Trace, dict[str, Block]]"
_plain = weakref.WeakKeyDictionary()
_flat: "weakref.WeakKeyDictionary[Trace, Flat]" = weakref.WeakKeyDictionary()


def chosen(trace: Trace, names: Collection[str], join: Join) -> dict[str, Block]:
    """Some blocks by their names.

    Args:
      trace: of the model.
      names: of blocks.
      join: see `blocks`.

    Returns:
      Those blocks, in the model's order.

    Raises:
      TypeError: one text instead of several.
      ValueError: a name that no block has.
    """
    if isinstance(names, str):
        raise TypeError(f"Expected a collection of names, got the text {names!r}.")
    found = blocks(trace, join=join)
    for name in names:
        if name not in found:
            raise ValueError(
                f"{name}: not a block of this model. Similar: "
                f"{', '.join(nearest(name, list(found), most=3))}; "
                "js.structured.blocks(trace) lists them all."
            )
    wanted = set(names)
    return {name: block for name, block in found.items() if name in wanted}


def flat_of(trace: Trace) -> Flat:
    """The flat program of a trace with its branches. A trace is looked through once.

    Args:
      trace: of the model.

    Returns:
      A `Flat`.

    Raises:
      ValueError: there are no branches.
    """
    if trace not in _flat:
        _flat[trace] = _flattened(trace)
    found = _flat[trace]
    if not found.additions:
        raise ValueError(
            "This model has no residual branches. What is looked for is a sum x + y of "
            "two values of one shape, with y computed from x by at least one "
            "contraction (a matrix product, a convolution) of a parameter; in the "
            "model itself or in a scan that hands out slices of stacked parameters."
        )
    return found


def _flattened(trace: Trace) -> Flat:
    # Functions with derivatives of their own stay whole: they would lose them.
    custom = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
    calls, checkpoints = set(), {}
    for address, eqn in equations(trace.program):
        if called(eqn) is not None and eqn.primitive.name not in custom:
            calls.add(address)
            if "policy" in eqn.params:
                checkpoints[address] = eqn
    scans = {scan for site in trace.sites for scan, _ in site.origin.loops}
    unroll: set[Address] = set()
    for scan in sorted(scans, key=len):
        around = [scan[:i] for i in range(1, len(scan), 2)]
        if all(a in unroll or a in calls for a in around):
            unroll.add(scan)
    steps = flatten(trace.program, len(trace.paths), unroll, calls)
    held = _holding(steps, trace)
    additions, before = _additions(trace, steps)
    return Flat(
        steps,
        held,
        frozenset(unroll),
        frozenset(calls),
        checkpoints,
        additions,
        before,
    )


def flat_for(trace: Trace, additions: Collection[Addition]) -> Flat:
    """The flat program in which only those scans are unrolled that have to be.

    Args:
      trace: of the model.
      additions: of the branches that are to be changed.

    Returns:
      A `Flat` of these additions; the scans that have none of them stay scans.
    """
    whole = flat_of(trace)
    within = lambda scan: any(a.address[: len(scan)] == scan for a in additions)
    scans = frozenset(filter(within, whole.unrolled))
    if scans == whole.unrolled:
        return whole
    steps = flatten(trace.program, len(trace.paths), scans, whole.calls)
    places = {(s.address, s.turns): i for i, s in enumerate(steps.steps) if s.eqn}
    return dataclasses.replace(
        whole,
        steps=steps,
        held=_holding(steps, trace),
        unrolled=scans,
        additions={a: places[a.address, a.turns] for a in additions},
        before={},
    )


def _holding(flat: Steps, trace: Trace) -> dict[int, Held]:
    """The variables that hold a parameter, so that its unread slices can go."""
    held = {}
    for x, (path, dims) in zip(flat.arguments, trace.dims.items(), strict=False):
        held[x] = Held(Unit(path, ()), tuple(range(len(dims))))
    for step in flat.steps:
        first = step.ins[0] if step.ins else None
        source = held.get(first) if isinstance(first, int) else None
        if source is None:
            continue
        (path, at), axes = source
        if step.name == "turn":
            turn = int(flat.constants[step.ins[1]])
            held[step.outs[0]] = Held(Unit(path, (*at, (axes[0], turn))), axes[1:])
        elif step.name in {"convert_element_type", "copy"}:
            held[step.outs[0]] = source
        elif step.name == "transpose":
            order = step.eqn.params["permutation"]
            held[step.outs[0]] = Held(source.unit, tuple(axes[i] for i in order))
    return held


# What leaves x recognisable in x + y.
_CARRIES = frozenset({"convert_element_type", "copy", "sharding_constraint", "name",
                      "mul", "div", "optimization_barrier"})  # fmt: skip


def _additions(trace: Trace, flat: Steps) -> tuple[dict[Addition, int], dict[int, int]]:
    """The additions of residual branches, and what values of the stream were before."""
    live = used(flat, {})[0]
    carried: dict[int, int] = {}
    for step in (flat.steps[i] for i in live):
        data = [x for x in step.ins if isinstance(x, int) and x in flat.data]
        if step.name in _CARRIES and len(data) == len(step.outs) == 1:
            first = step.ins.index(data[0])
            if step.name == "div" and first:
                continue  # a quotient by x is no multiple of it
            if _shape(step.eqn.invars[first]) == _shape(step.eqn.outvars[0]):
                carried[step.outs[0]] = data[0]
    bits: dict[int, int] = {}  # for each value that may be an x
    for step in (flat.steps[i] for i in live):
        for x in step.ins if _adds(step, flat) else ():
            while x is not None and x not in bits:
                bits[x] = 1 << len(bits)
                x = carried.get(x)
    contractions = {
        site.address[:i]
        for site in trace.sites
        for i in range(1, len(site.address) + 1, 2)
    }
    found: dict[Addition, int] = {}
    # Of which of those values a variable is computed; and of which by a contraction.
    above: dict[int, int] = {}
    through: dict[int, int] = {}
    for i in live:
        step = flat.steps[i]
        if not step.data:
            continue
        ins = [x for x in step.ins if isinstance(x, int) and x in flat.data]
        if _adds(step, flat):
            for stream in (0, 1):
                a, b = ins[stream], ins[1 - stream]
                if _is_branch(_line(a, carried), b, bits, above, through):
                    found[Addition(step.address, step.turns, stream)] = i
                    carried[step.outs[0]] = a
                    break
        one, two = 0, 0
        for x in ins:
            one |= above.get(x, 0) | bits.get(x, 0)
            two |= through.get(x, 0)
        if step.eqn is not None and step.address in contractions:
            two = one
        for x in step.outs:
            above[x], through[x] = one, two
    return found, carried


def _is_branch(
    line: Iterator[int],
    y: int,
    bits: Mapping[int, int],
    above: Mapping[int, int],
    through: Mapping[int, int],
) -> bool:
    # The first of the stream's values that y is computed from decides: y may see one
    # before (branches side by side), but x + x^3 is no branch for what lies before x.
    for x in line:
        if above.get(y, 0) & bits.get(x, 0):
            return bool(through.get(y, 0) & bits[x])
    return False


def _line(x: int | None, carried: Mapping[int, int]) -> Iterator[int]:
    """A value of the stream, then those that it was before."""
    while x is not None:
        yield x
        x = carried.get(x)


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _adds(step: Step, flat: Steps) -> bool:
    """Whether a step adds two arrays of one shape that depend on the inputs."""
    if step.name not in {"add", "add_any"} or not all(
        isinstance(x, int) and x in flat.data for x in step.ins
    ):
        return False
    shapes = {_shape(x) for x in (*step.eqn.invars, *step.eqn.outvars)}
    result = step.eqn.outvars[0].aval
    return (
        len(shapes) == 1
        and result.ndim > 0
        and jnp.issubdtype(result.dtype, jnp.floating)
    )


def used(flat: Steps, replace: Mapping[int, int]) -> tuple[list[int], set[int]]:
    """What a program computes and reads, with some variables in place of others.

    Args:
      flat: the program.
      replace: for a variable the one that is read in its place.

    Returns:
      The indices of the steps that lead to the results, in order; the variables that
      they or the results read.
    """
    read = {final(x, replace) for x in flat.results if isinstance(x, int)}
    steps = []
    for i in range(len(flat.steps) - 1, -1, -1):
        step = flat.steps[i]
        if not read.isdisjoint(step.outs):
            steps.append(i)
            read.update(final(x, replace) for x in step.ins if isinstance(x, int))
    return steps[::-1], read


def final(x: int, replace: Mapping[int, int]) -> int:
    """What is read in place of a variable.

    Args:
      x: the variable.
      replace: see `used`.

    Returns:
      A variable.
    """
    while x in replace:
        x = replace[x]
    return x


def without(found: Flat, additions: Collection[Addition]) -> dict[int, int]:
    """For the results of some additions the stream to be read in their place.

    Args:
      found: of `flat_of`.
      additions: of its branches.

    Returns:
      What `used` takes.
    """
    steps = [(found.steps.steps[found.additions[a]], a.stream) for a in additions]
    return {step.outs[0]: step.ins[stream] for step, stream in steps}


def units_read(found: Flat, replace: Mapping[int, int]) -> dict[Unit, None]:
    """The parameters and slices that a program reads, in the order it does.

    Args:
      found: of `flat_of`.
      replace: see `used`.

    Returns:
      Units, as the keys of a dictionary.
    """
    steps, _ = used(found.steps, replace)
    units: dict[Unit, None] = {}

    def look(x: Any) -> None:
        x = final(x, replace) if isinstance(x, int) else x
        if x in found.held:
            units[found.held[x].unit] = None

    for i in steps:
        step = found.steps.steps[i]
        if step.outs[0] not in found.held:  # else it hands a parameter on
            for x in step.ins:
                if isinstance(x, int):
                    look(x)
    for x in found.steps.results:
        if isinstance(x, int):
            look(x)
    return units


def own_units(found: Flat, additions: Collection[Addition]) -> list[Unit]:
    """What nothing reads any more without some branches.

    Args:
      found: of `flat_of`.
      additions: of the branches.

    Returns:
      Units, in the order in which the program first reads them.
    """
    left = units_read(found, without(found, additions))
    return [unit for unit in units_read(found, {}) if unit not in left]


def unit_size(trace: Trace, unit: Unit) -> int:
    """How many numbers a unit has.

    Args:
      trace: of the model.
      unit: one of its units.

    Returns:
      The size of its array.
    """
    shape = [d.size for d in trace.dims[unit.path]]
    return math.prod(shape) // math.prod(shape[axis] for axis, _ in unit.at)


def _named(trace: Trace, groups: Sequence[tuple[Addition, ...]]) -> dict[str, Block]:
    found = flat_of(trace)
    sites: dict[Address, list[str]] = {}
    for site in trace.sites:
        for i in range(1, len(site.address) + 1, 2):
            paths = [path for path, _ in site.origin.sources]
            sites.setdefault(site.address[:i], []).extend(paths)
    result: dict[str, Block] = {}
    for additions in groups:
        own = own_units(found, additions)
        kernels: dict[str, None] = {}
        for addition in additions:
            for step in _between(found, addition):
                if step.eqn is not None:
                    kernels |= dict.fromkeys(sites.get(step.address, ()))
        name = _name(trace, list(kernels), {unit.path for unit in own})
        name = _unique(name + _turns(additions), result)
        result[name] = Block(
            name,
            tuple(map(str, own)),
            trace.nodes[additions[0].address].visit.source,
            sum(unit_size(trace, unit) for unit in own),
            additions,
        )
    return result


def _between(found: Flat, addition: Addition) -> list[Step]:
    """The steps that lead from the stream to the branch."""
    end = found.additions[addition]
    last = found.steps.steps[end]
    x, y = last.ins[addition.stream], last.ins[1 - addition.stream]
    wanted, back = {y}, []
    # Backwards to what makes x, or for branches side by side, the stream before it.
    for i in range(end - 1, -1, -1):
        step = found.steps.steps[i]
        if not wanted.isdisjoint(step.outs):
            if x in step.outs or not step.data:
                continue
            back.append(step)
            wanted.update(z for z in step.ins if isinstance(z, int))
    reached, between = {x}, []
    for start in _line(x, found.before):
        reached = {start}
        between = []
        for step in back[::-1]:
            if any(z in reached for z in step.ins if isinstance(z, int)):
                reached.update(step.outs)
                between.append(step)
        if y in reached:
            break
    return between


def _name(trace: Trace, kernels: list[str], own: set[str]) -> str:
    """The path that holds the kernels and nothing else, or the parts below it."""
    split = [path.split("/") for path in kernels]
    common: list[str] = []
    for parts in zip(*(path[:-1] for path in split), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    prefix = "/".join(common)
    mine = own | set(kernels)
    under = [p for p in trace.paths if p.startswith(prefix + "/")] if prefix else [""]
    if mine.issuperset(under):
        return prefix
    parts = list(dict.fromkeys(path[len(common)] for path in split))
    below = "+".join(parts) if len(parts) <= 4 else f"{parts[0]}..{parts[-1]}"
    return f"{prefix}/{below}" if prefix else below


def _turns(additions: tuple[Addition, ...]) -> str:
    texts = dict.fromkeys(",".join(map(str, a.turns)) for a in additions if a.turns)
    if not texts:
        return ""
    first, *_, last = (*texts, "") if len(texts) == 1 else texts
    return f"[{first}..{last}]" if last else f"[{first}]"


def _unique(name: str, known: Collection[str]) -> str:
    if name not in known:
        return name
    return next(
        candidate
        for candidate in (f"{name}#{i}" for i in range(2, len(known) + 3))
        if candidate not in known
    )
