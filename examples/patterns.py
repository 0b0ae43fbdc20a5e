# %% [markdown]
# # Patterns: which weights live or die together
#
# Single weights can be removed anywhere, but hardware gains little from that. Patterns
# that it can use are coarser: N:M groups, tiles, whole channels. Each is a frozen
# value, and the rest of the call stays as it is.

# %%
import jax
import jax.numpy as jnp
import rich
from _common import arguments
from matplotlib.figure import Figure
from rich.table import Table

import jaxsparse as js

args = arguments(
    "Patterns of sparsity.", small="the same: this one is quick", out="out/patterns"
)

# %% [markdown]
# The kernels of a convolution, of attention, and of a dense layer, in flax's layouts,
# filled with random numbers. Input features differ in size, as they do in trained nets.

# %%
shapes = {
    "conv": (3, 3, 16, 32),
    "attention/query": (64, 4, 16),
    "attention/out": (4, 16, 64),
    "dense": (64, 32),
}
draws = jax.random.split(jax.random.key(0), 2 * len(shapes))
params = {
    name: {
        "kernel": jax.random.normal(draws[2 * i], shape)
        * jnp.exp(0.5 * jax.random.normal(draws[2 * i + 1], (*shape[:-1], 1)))
    }
    for i, (name, shape) in enumerate(shapes.items())
}

# %% [markdown]
# N:M groups and tiles lie along the axes that a layer contracts with its input.
# Where there is a model, its trace knows them: `axes=js.trace(...).axes`. Here are only
# kernels. Those of two or four axes are taken for flax's usual ones, with a
# warning. One of three may be attention, a one-dimensional convolution or a stack of
# layers: that is not guessed.

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
# Six patterns at one half. What a mask claims can be checked, for instance when it
# comes from a file. `Channel(axis=1)` of the query kernel removes whole heads. (A head
# is only gone for good when key, value and out lose it too.)

# %%
patterns = {
    "single weights": (js.Unstructured(), {}),
    "of each output": (js.Unstructured(scope="output"), {"axes": axes}),
    "2:4": (js.NM(keep=2, of=4), {"axes": axes}),
    "tiles of 4 x 4": (js.Block((4, 4)), {"axes": axes}),
    "output channels": (js.Channel(axis=-1), {}),
    "heads of query": (js.Channel(axis=1), {"where": r"query/kernel$"}),
}
results = Table(title="Half of the weights removed, in six ways")
for column in ("pattern", "removed", "sum |w| kept", "weights, bytes", "mask, bytes"):
    results.add_column(column, justify="left" if column == "pattern" else "right")
magnitudes = jax.jit(lambda ws: sum(jnp.sum(jnp.abs(w)) for w in jax.tree.leaves(ws)))
shown = {}
for name, (pattern, how) in patterns.items():
    pruned = js.prune(params, 0.5, pattern=pattern, **how)
    js.patterns.verify(pruned.masks, params, pattern=pattern, **how)
    found = js.report.table(*pruned).pruned  # the sum over those that take part
    left = jax.tree.map(lambda w, m: w if m.ndim else 0 * w, params, pruned.masks)
    kept = magnitudes(js.patterns.apply(left, pruned.masks)) / magnitudes(left)
    bits = js.patterns.pack(pruned.masks).bits
    results.add_row(
        name,
        f"{found.reached:.1%}",
        f"{kept:.1%}",
        f"{4 * found.kept:,} of {found.dense_bytes:,}",
        f"{sum(b.nbytes for b in jax.tree.leaves(bits)):,}",
    )
    shown[name] = pruned.masks
rich.print(results)

# %% [markdown]
# The coarser the pattern, the more of the weights' magnitude is lost: that is its
# price. `pack` stores one bit for each element of a mask, and the masks of channels and
# heads have one element for each of them. For 2:4 and tiles fewer bits would do.
# Nothing here says how quick a pruned layer is: that depends on the kernel that
# multiplies by it.

# %%
try:
    broken = jax.tree.map(jnp.ones_like, shown["2:4"])
    js.patterns.verify(broken, params, pattern=js.NM(keep=2, of=4), axes=axes)
except ValueError as error:
    print("A mask that keeps everything:", error, sep="\n  ")

# %%
figure = Figure(figsize=(12, 4.6), layout="constrained")
for axis, (name, masks) in zip(figure.subplots(1, 6), shown.items(), strict=True):
    kernel = "attention/query" if "query" in name else "dense"
    full = jnp.broadcast_to(masks[kernel]["kernel"], shapes[kernel])
    axis.imshow(
        full.reshape(64, -1)[:, :64], cmap="Blues", vmin=0, vmax=1.3, aspect="auto"
    )
    axis.set_title(f"{name}\n({kernel} kernel)", fontsize=9)
    axis.set_xlabel("output")
    axis.set_xticks([])
    axis.set_yticks([])
figure.axes[0].set_ylabel("input")
figure.savefig(args.out / "patterns.png", dpi=130)
print(f"Wrote patterns.png to {args.out}: blue is kept")
