# %% [markdown]
# # Second-order pruning of a pretrained ResNet-20
#
# What does the loss lose when a weight goes, and how can the others make up for it?
# Optimal Brain Surgeon asks the curvature of the loss, here the empirical Fisher matrix
# of a few hundred gradients. Magnitude asks nobody. All results are one-shot: nothing
# is trained after pruning.

# %%
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import rich
from _common import arguments
from _data import decode, find
from _resnet import accuracy, cross_entropy, load
from rich.table import Table

import jaxsparse as js

args = arguments(
    "Prune a ResNet-20 by its curvature.",
    small="two blocks, few gradients",
    out="out/obs",
    needs_files=True,
)

files = find(
    "weights/resnet20_cifar10_jpeg_adapted.npz",
    "images/cifar10_jpeg_test8k.npz",
    "images/cifar10_jpeg_train.npz",
    "images/cifar10_png_train4k.npz",
    skip_missing=args.skip_missing,
)
weights, test, jpeg_train, png_train = map(np.load, files)
params, stats = load(weights)
x_test, y_test = (test[key][: 200 if args.small else 2_000] for key in ("x", "y"))
try:
    x, y = decode(jpeg_train, 1_000 if args.small else 20_000)
except ImportError:
    print("Without pillow: gradients of 4,000 png images, not of jpeg ones.")
    x, y = png_train["x"], png_train["y"]

SPARSITIES = (0.5, 0.7) if args.small else (0.3, 0.5, 0.6, 0.7, 0.8)
GRADIENTS = 64 if args.small else 1_024
WHERE = r"^layer3\.[12]\.conv.\.weight$" if args.small else None
BLOCK_SIZE = 25 if args.small else 50
GLOBAL = js.Unstructured(scope="global")  # all weights of all layers compete

# %% [markdown]
# ## Gradients
#
# One for each image, on the norms' stored statistics. They come in a stream; here all
# of them are kept, 1,024 x 268,336 numbers, because three approximations want them.
# Weights that are pruned have no gradient: `masks`.

# %%
loss_fn = cross_entropy(stats)
draws = np.random.default_rng(0)


def batches() -> Iterator[dict]:
    while True:
        rows = draws.integers(0, len(x), 64)
        yield {"x": x[rows], "y": y[rows].astype(np.int32)}


def gradients(params, count: int, masks=None):
    stream = js.curvature.stream_grads(
        loss_fn, params, batches(), count=count, where=WHERE, masks=masks
    )
    return js.curvature.collect_grads(stream, count=count)


grads = jax.tree.map(jnp.asarray, gradients(params, GRADIENTS))

# %% [markdown]
# ## Three approximations of one matrix
#
# The Fisher matrix of 268,336 weights has 72 billion entries. Kept of it: the diagonal
# (Optimal Brain Damage), blocks of 50 neighbours (WoodFisher, oBERT), or nothing but
# the gradients, from which everything about the full matrix follows (M-FAC).
#
# The damping says how far to trust them. A thousand gradients are few, and pruning half
# of all weights is not a small step: of the order of the mean diagonal is best here.
# Much less trusts noise, much more ends in magnitude pruning.
#
# The papers' code adds up what each removed weight would ask for if it went alone. The
# exact update is that of all weights of a block that go together. Which these are is
# still decided one by one, unless `greedy` removes them one after another.

# %%
diagonal = js.curvature.diagonal_fisher(grads, rel_damping=1.0)
blocks = js.curvature.block_fisher(grads, block_size=BLOCK_SIZE, rel_damping=1.0)
full = js.curvature.mfac(grads, rel_damping=100.0)

options = {"pattern": GLOBAL, "where": WHERE}
obs = functools.partial(js.solvers.obs, params, **options)
methods = {
    "magnitude": functools.partial(js.prune, params, **options),
    "diagonal": functools.partial(obs, diagonal),
    "blocks, as the papers": functools.partial(obs, blocks, update="independent"),
    "blocks, exact": functools.partial(obs, blocks),
    "blocks, greedy": functools.partial(obs, blocks, greedy=True),
    "full (M-FAC)": functools.partial(obs, full),
}
dense = accuracy(params, stats, x_test, y_test)
curves = {name: [dense] for name in methods}
for name, prune in methods.items():
    for sparsity in SPARSITIES:
        pruned = prune(sparsity)
        curves[name].append(accuracy(pruned.params, stats, x_test, y_test))

# %% [markdown]
# ## A little at a time
#
# The second-order picture is right nearby. So: prune a little, take new gradients of
# the network as it is now, prune a little more. One gradual run passes all sparsities.

# %%
CUT = 2.0 if args.small else 1.1  # each cut leaves one part in this of the weights


def refresh(params, masks):
    grads = gradients(params, GRADIENTS // 2, masks)
    return js.curvature.block_fisher(grads, block_size=BLOCK_SIZE, rel_damping=0.1)


name = "blocks, greedy, recomputed"
curves[name], pruned = [dense], js.Pruned(params, None)
for before, sparsity in itertools.pairwise((0.0, *SPARSITIES)):
    cuts = round(np.log((1 - before) / (1 - sparsity)) / np.log(CUT))
    pruned = js.solvers.obs(
        pruned.params,
        refresh(*pruned),
        sparsity,
        masks=pruned.masks,
        greedy=True,
        steps=max(1, cuts),
        refresh=refresh,
        **options,
    )
    curves[name].append(accuracy(pruned.params, stats, x_test, y_test))

# %%
results = Table(title=f"Accuracy after pruning, {len(x_test):,} test images")
results.add_column("")
for sparsity in (0.0, *SPARSITIES):
    results.add_column(f"{sparsity:.0%}", justify="right")
for name, curve in curves.items():
    results.add_row(name, *(f"{value:.4f}" for value in curve))
rich.print(results)

# %%
percents = [0, *(100 * s for s in SPARSITIES)]
js.report.plot_tradeoff(
    {name: (percents, curve) for name, curve in curves.items()},
    xlabel="sparsity in %",
    ylabel="accuracy",
    path=args.out / "obs.png",
)
print(f"Wrote obs.png to {args.out}")
