"""`residual_blocks`: the residual branches of any model, by name."""

import dataclasses
from collections.abc import Callable, Collection, Hashable, Sequence

from jaxsparse import _checks
from jaxsparse.depth._branches import flat_of, line
from jaxsparse.depth._flat_program import Addition, Flat, own_units, unit_size
from jaxsparse.program import Address, Step
from jaxsparse.tracing import Trace
from jaxsparse.tree import nearest

Join = Callable[["ResidualBlock"], Hashable] | None


@dataclasses.dataclass(frozen=True)
class ResidualBlock:
    """A residual branch y = f(x) of x + y.

    Attributes:
      name: the common path of its kernels, "layers/0/attn"; where other parameters lie
        there too, with what follows, "layers/0/up+down"; in a scan over layers with
        the turn, "layers/attn[2]".
      paths: the parameters that only this block uses; slices of stacked ones with the
        turn, "layers/attn/out/kernel[2]".
      source: the line of the model where the branch is added.
      parameters: the number of weights in `paths`, which are removed with the block.
      additions: the places where it is added: one, or more for joined blocks.
    """

    name: str
    paths: tuple[str, ...]
    source: str
    parameters: int
    additions: tuple[Addition, ...]


def residual_blocks(trace: Trace, *, join: Join = None) -> dict[str, ResidualBlock]:
    """Find the residual branches of a model, which can be removed at unchanged shapes.

    A branch is a value that is added to a value x of its own shape and depends on x
    through at least one contraction of a parameter: attention and feed-forward
    sublayers, before or after a norm or side by side, or the two convolutions of a
    ResNet. Nothing depends on classes or names. In a stack that a scan runs, branches
    are found for each turn.

    It does not find: a stage's first ResNet block, whose paths both have convolutions
    (no shape would fit without it); the first cross-attention of a Perceiver, whose
    stream depends on the latent parameters but on none of the inputs; a stack whose
    parameters are indexed in the body of a `fori_loop` or `while_loop`; a branch within
    a loop over time, a `cond`, or a function with its own derivative.

    Branches may be nested (a U-Net's skips around everything inside). A stacked
    parameter stays whole and belongs to no block if the model computes with it before
    the scan, other than a cast or a transposition.

    Args:
      trace: from `js.trace`.
      join: `join(block)` gives a key; consecutive blocks of equal keys become one, a
        whole layer from its attention and its feed-forward branch. None leaves a block
        alone. (Norms between the branches of a joined block stay.)

    Returns:
      By name, in the order in which they are added.

    Raises:
      ValueError: the model has no residual branches.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> layer = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
      >>> params = {"layers": [layer, layer]}
      >>> def apply_fn(params, x):
      ...     for p in params["layers"]:
      ...         x = x + jnp.tanh(x @ p["up"]) @ p["down"]
      ...     return x
      >>> trace = js.trace(apply_fn, params, jnp.ones((2, 4)))
      >>> for block in js.depth.residual_blocks(trace).values():
      ...     print(block.name, block.parameters, block.paths)
      layers/0 64 ('layers/0/up', 'layers/0/down')
      layers/1 64 ('layers/1/up', 'layers/1/down')
    """
    _checks.check_is(Trace, "js.trace(apply_fn, params, inputs)", trace=trace)
    if join is None:
        return dict(trace.once(_plain))
    groups: list[tuple[Addition, ...]] = []
    last: Hashable = None
    for block in residual_blocks(trace).values():
        key = join(block)
        if groups and key is not None and key == last:
            groups[-1] += block.additions
        else:
            groups.append(block.additions)
        last = key
    return _named(trace, groups)


def _plain(trace: Trace) -> dict[str, ResidualBlock]:
    return _named(trace, [(a,) for a in trace.once(flat_of).additions])


def chosen(
    trace: Trace, names: Collection[str], join: Join
) -> dict[str, ResidualBlock]:
    """Some blocks by their names."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise TypeError(f"names: expected a collection of names, got {names!r}.")
    found = residual_blocks(trace, join=join)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names: expected names of blocks, as text, got {name!r}.")
        if name not in found:
            raise ValueError(
                f"{name}: not a block of this model. Similar: "
                f"{', '.join(nearest(name, list(found), most=3))}; "
                "js.depth.residual_blocks(trace) lists them all."
            )
    wanted = set(names)
    return {name: block for name, block in found.items() if name in wanted}


def _named(
    trace: Trace, groups: Sequence[tuple[Addition, ...]]
) -> dict[str, ResidualBlock]:
    found = trace.once(flat_of)
    sites: dict[Address, list[str]] = {}
    for site in trace.sites:
        for i in range(1, len(site.address) + 1, 2):
            paths = [path for path, _ in site.origin.sources]
            sites.setdefault(site.address[:i], []).extend(paths)
    result: dict[str, ResidualBlock] = {}
    for additions in groups:
        own = own_units(found, additions)
        kernels: dict[str, None] = {}
        for addition in additions:
            for step in _between(found, addition):
                if step.eqn is not None:
                    kernels |= dict.fromkeys(sites.get(step.address, ()))
        name = _name(trace, list(kernels), {unit.path for unit in own})
        name = _unique(name + _turns(additions), result)
        result[name] = ResidualBlock(
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
    stream, branch = last.ins[addition.stream], last.ins[1 - addition.stream]
    wanted, back = {branch}, []
    # Backwards to what makes the stream, or for branches side by side the one before.
    for i in range(end - 1, -1, -1):
        step = found.steps.steps[i]
        if not wanted.isdisjoint(step.outs):
            if stream in step.outs or not step.data:
                continue
            back.append(step)
            wanted.update(z for z in step.ins if isinstance(z, int))
    reached, between = {stream}, []
    for start in line(stream, found.before):
        reached = {start}
        between = []
        for step in back[::-1]:
            if any(z in reached for z in step.ins if isinstance(z, int)):
                reached.update(step.outs)
                between.append(step)
        if branch in reached:
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
