# %% [markdown]
# # Patterns: which weights live or die together
#
# Single weights can be removed anywhere, but hardware gains little from that. Patterns
# that it can use are coarser: N:M groups, tiles, whole channels. Here on the kernels of
# a convolution, of attention and of a dense layer, in flax's layouts.

# %%
import jax
import jax.numpy as jnp
from _common import arguments, show
from _pictures import draw_masks

import jaxsparse as js

small = "the same: this one is quick"
args = arguments("Patterns of sparsity.", small=small, out="out/patterns")
shapes = {"conv": (3, 3, 16, 32), "attention/query": (64, 4, 16)}
shapes |= {"attention/out": (4, 16, 64), "dense": (64, 32)}
draws = iter(jax.random.split(jax.random.key(0), 2 * len(shapes)))
normal = lambda shape: jax.random.normal(next(draws), shape)
draw = lambda shape: normal(shape) * jnp.exp(0.5 * normal((*shape[:-1], 1)))
params = {name: {"kernel": draw(shape)} for name, shape in shapes.items()}

# %% [markdown]
# N:M groups and tiles lie along the axes that a layer contracts with its input. A trace
# of the model knows them: `axes=js.trace(...).axes`. Of kernels alone, those of two or
# four axes are taken for flax's usual ones, with a warning. One of three may be
# attention, a convolution or a stack of layers: that is not guessed.

# %%
try:
    js.prune(params, pattern=js.NM(keep=2, of=4))
except ValueError as error:
    print("Without axes:", error, sep="\n  ")

axes = {
    r"conv/kernel$": js.Axes(input=(0, 1, 2), output=(3,)),  # (height, width, in, out)
    r"dense/kernel$": js.Axes(input=(0,), output=(1,)),  # (in, out)
    r"query/kernel$": js.Axes(input=(0,), output=(1, 2)),  # (in, heads, head_dim)
    r"out/kernel$": js.Axes(input=(0, 1), output=(2,)),  # (heads, head_dim, out)
}

# %% [markdown]
# Six patterns at one half. `verify` checks what a mask claims, for instance when it
# comes from a file. `Channel(axis=1)` of the query kernel removes whole heads. The
# coarser the pattern, the more of the weights' magnitude is lost: that is its price.
# `pack` stores one bit for each element of a mask; that of a channel is one element.

# %%
patterns = {
    "single weights": (js.Unstructured(), {}),
    "of each output": (js.Unstructured(scope="output"), {"axes": axes}),
    "2:4": (js.NM(keep=2, of=4), {"axes": axes}),
    "tiles of 4 x 4": (js.Block((4, 4)), {"axes": axes}),
    "output channels": (js.Channel(axis=-1), {}),
    "heads of query": (js.Channel(axis=1), {"where": r"query/kernel$"}),
}
magnitudes = jax.jit(lambda ws: sum(jnp.sum(jnp.abs(w)) for w in jax.tree.leaves(ws)))
rows, shown = [], {}
for name, (pattern, how) in patterns.items():
    pruned = js.prune(params, 0.5, pattern=pattern, **how)
    js.patterns.verify(pruned.masks, params, pattern=pattern, **how)
    found = js.report.table(*pruned).pruned  # the sum over those that take part
    left = jax.tree.map(lambda w, m: w if m.ndim else 0 * w, params, pruned.masks)
    share = magnitudes(js.patterns.apply(left, pruned.masks)) / magnitudes(left)
    weights = f"{4 * found.kept:,} of {found.dense_bytes:,}"
    bits = sum(b.nbytes for b in jax.tree.leaves(js.patterns.pack(pruned.masks).bits))
    rows.append((name, f"{found.reached:.1%}", f"{share:.1%}", weights, f"{bits:,}"))
    kernel = "attention/query" if "query" in name else "dense"
    shown[name] = kernel, pruned.masks[kernel]["kernel"]
columns = ("pattern", "removed", "sum |w| kept", "weights, bytes", "mask, bytes")
show("Half of the weights removed, in six ways", columns, rows)
draw_masks(shown, shapes, args.out / "patterns.png")

try:  # a mask that keeps everything is no 2:4 mask
    broken = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    js.patterns.verify(broken, params, pattern=js.NM(keep=2, of=4), axes=axes)
except ValueError as error:
    print("A mask that keeps everything:", error, sep="\n  ")
