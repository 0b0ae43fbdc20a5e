# %% [markdown]
# # Second-order pruning of a pretrained BERT
#
# MiniLM, a sentence encoder of 6 layers, loses up to 80 % of the 10.6 million weights
# of its encoder in one shot: nothing is trained afterwards. How alike are two sentences
# (STS-B)? What is left has to tell. Weights and texts are not part of jaxsparse:
# `_minilm.py` and `_data.py` say where they are looked for.

# %%
from functools import partial

import jax
import numpy as np
from _common import arguments, show_curves
from _data import find
from _minilm import batches, find_weights, load, stsb_loss, stsb_spearman

import jaxsparse as js

text, small = "Prune MiniLM by its curvature.", "two kernels, few gradients"
args = arguments(text, small=small, out="out/obs_bert", needs_files=True)
texts = ("text/minilm_ids_stsb_train.npz", "text/minilm_ids_stsb_dev.npz")
train, dev = map(np.load, find(*texts, skip_missing=args.skip_missing))
params = load(find_weights(skip_missing=args.skip_missing))
SPARSITIES = (0.7, 0.9) if args.small else (0.5, 0.6, 0.7, 0.8)
COUNT, PAIRS = (32, 100) if args.small else (256, 500)
WHERE = r"^encoder/layer_[01]/intermediate/kernel$" if args.small else None
evaluate = partial(stsb_spearman, file=dev, first=PAIRS)
dense, draws = evaluate(params), np.random.default_rng(0)
print(f"dense: Spearman {dense:.4f} on the first {PAIRS} pairs of the dev set")

# %% [markdown]
# One gradient for each pair of sentences, 42 MB: they arrive 16 at a time and are
# summed up, squares for the diagonal and outer products of 48 neighbours for the
# blocks. The sums hold 49 numbers a weight, 2.1 GB, however many gradients there are.
# Jitted with its sums donated, an update works in place.


# %%
def fisher(estimator, params, masks=None):
    rows = draws.permutation(len(train["score"]))[:COUNT]
    pairs = batches(train, size=16, rows=rows, multiple=32)
    how = {"where": WHERE, "masks": masks}
    sums = estimator.init(params)
    update = jax.jit(estimator.update, donate_argnums=0)
    for grads in js.curvature.stream_grads(stsb_loss, params, pairs, **how):
        sums = update(sums, grads)
    return estimator.finalize(sums, rel_damping=0.1)


estimator = js.curvature.block_estimator(block_size=48, where=WHERE)
diagonal = fisher(js.curvature.diagonal_estimator(where=WHERE), params)
blocks = fisher(estimator, params)
options = {"pattern": js.Unstructured(scope="global"), "where": WHERE}
obs = partial(js.solvers.obs, params, **options)
methods = {
    "magnitude": partial(js.prune, params, **options),
    "diagonal": partial(obs, diagonal),
    "blocks, as the papers": partial(obs, blocks, update="independent"),
    "blocks, exact": partial(obs, blocks),
}
curves = {n: [evaluate(f(s).params) for s in SPARSITIES] for n, f in methods.items()}
del methods, blocks  # 2.1 GB

# %%
# A little at a time: between two cuts the curvature is that of the network by then.
pruned, found = js.Pruned(params, None), []
refresh = partial(fisher, estimator)
for sparsity, steps in zip(SPARSITIES, (2, 1, 1, 2), strict=False):
    how = {"masks": pruned.masks, "refresh": refresh, "steps": steps, **options}
    pruned = js.solvers.obs(pruned.params, refresh(*pruned), sparsity, **how)
    found.append(evaluate(pruned.params))
curves["blocks, exact, recomputed"] = found
curves = {name: [dense, *curve] for name, curve in curves.items()}
title, ylabel = f"Spearman's coefficient, {PAIRS} pairs of STS-B", "Spearman"
path = args.out / "obs_bert.png"
show_curves(title, (0.0, *SPARSITIES), curves, path=path, ylabel=ylabel)
