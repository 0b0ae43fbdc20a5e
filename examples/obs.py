# %% [markdown]
# # Second-order pruning of a pretrained ResNet-20
#
# Optimal Brain Surgeon asks the curvature of the loss, here the empirical Fisher matrix
# of a few hundred gradients. Magnitude asks nobody. Nothing is trained after pruning.

# %%
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from _common import arguments, show_curves
from _resnet import accuracy, batches, cross_entropy, setting

import jaxsparse as js

text, small = "Prune a ResNet-20 by its curvature.", "two blocks, few gradients"
args = arguments(text, small=small, out="out/obs", needs_files=True)
TEST, TRAIN, COUNT = (200, 1_000, 64) if args.small else (2_000, 20_000, 1_024)
SPARSITIES = (0.5, 0.7) if args.small else (0.3, 0.5, 0.6, 0.7, 0.8)
WHERE = r"^layer3\.[12]\.conv.\.weight$" if args.small else None
SIZE = 25 if args.small else 50
resnet = setting(test=TEST, train=TRAIN, skip_missing=args.skip_missing)
params, stats, x, y, *images = resnet
draws = batches(*images)
measure = lambda params: accuracy(params, stats, x, y)

# %% [markdown]
# Three approximations of the Fisher matrix, which has 72 billion entries: the diagonal,
# blocks of 50 neighbours (WoodFisher, oBERT), and M-FAC's, whole, from gradients alone.
# A thousand gradients are few: the damping is of the order of the mean diagonal.


# %%
def gradients(params, count, masks=None):
    how = {"count": count, "where": WHERE, "masks": masks}
    loss_fn = cross_entropy(stats)
    stream = js.curvature.stream_grads(loss_fn, params, draws, **how)
    return js.curvature.collect_grads(stream, count=count)


grads = jax.tree.map(jnp.asarray, gradients(params, COUNT))
diagonal = js.curvature.diagonal_fisher(grads, rel_damping=1.0)
blocks = js.curvature.block_fisher(grads, block_size=SIZE, rel_damping=1.0)
full = js.curvature.mfac(grads, rel_damping=100.0)
options = {"pattern": js.Unstructured(scope="global"), "where": WHERE}
obs = partial(js.solvers.obs, params, **options)
methods = {
    "magnitude": partial(js.prune, params, **options),
    "diagonal": partial(obs, diagonal),
    "blocks, as the papers": partial(obs, blocks, update="independent"),
    "blocks, exact": partial(obs, blocks),
    "blocks, greedy": partial(obs, blocks, greedy=True),
    "full (M-FAC)": partial(obs, full),
}
dense = measure(params)
at = lambda f: [measure(f(sparsity).params) for sparsity in SPARSITIES]
curves = {name: [dense, *at(prune)] for name, prune in methods.items()}


# %%
# The second-order picture is right nearby. So: prune a little, take new gradients of
# the network as it is now, prune a little more. One run passes all sparsities.
def refresh(params, masks):
    grads = gradients(params, COUNT // 2, masks)
    return js.curvature.block_fisher(grads, block_size=SIZE, rel_damping=0.1)


cut = np.log(2.0 if args.small else 1.1)
pruned, found = js.Pruned(params, None), [dense]
for before, after in pairwise((0.0, *SPARSITIES)):
    how = {"steps": max(1, round(np.log((1 - before) / (1 - after)) / cut))}
    how |= {"masks": pruned.masks, "greedy": True, "refresh": refresh, **options}
    pruned = js.solvers.obs(pruned.params, refresh(*pruned), after, **how)
    found.append(measure(pruned.params))
curves["blocks, greedy, recomputed"] = found
title = f"Accuracy after pruning, {len(x):,} test images"
show_curves(title, (0.0, *SPARSITIES), curves, path=args.out / "obs.png")
