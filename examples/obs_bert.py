# %% [markdown]
# # Second-order pruning of a pretrained BERT
#
# MiniLM, a sentence encoder of 6 layers, loses up to 80 % of the 10.6 million weights
# of its encoder in one shot: nothing is trained afterwards. How alike are two sentences
# (STS-B)? What is left has to tell. The curvature comes from a few hundred pairs of
# sentences. Weights and texts are not part of jaxsparse: `_minilm.py` and `_data.py`
# say where they are looked for.

# %%
import functools
from collections.abc import Iterator

import jax
import numpy as np
import rich
from _common import arguments
from _data import find
from _minilm import batches, find_weights, load, stsb_loss, stsb_spearman
from rich.table import Table

import jaxsparse as js

args = arguments(
    "Prune MiniLM by its curvature.",
    small="two kernels, few gradients",
    out="out/obs_bert",
    needs_files=True,
)

texts = ("text/minilm_ids_stsb_train.npz", "text/minilm_ids_stsb_dev.npz")
train, dev = map(np.load, find(*texts, skip_missing=args.skip_missing))
params = load(find_weights(skip_missing=args.skip_missing))

SPARSITIES = (0.7, 0.9) if args.small else (0.5, 0.6, 0.7, 0.8)
GRADIENTS, PAIRS = (32, 100) if args.small else (256, 500)
WHERE = r"^encoder/layer_[01]/intermediate/kernel$" if args.small else None
GLOBAL = js.Unstructured(scope="global")  # all weights of all layers compete
BLOCK_SIZE = 48
evaluate = functools.partial(stsb_spearman, file=dev, first=PAIRS)
dense = evaluate(params)
print(f"dense: Spearman {dense:.4f} on the first {PAIRS} pairs of the dev set")

# %% [markdown]
# ## Gradients that are not kept
#
# One gradient for each pair of sentences, 42 MB: they arrive 16 at a time and are
# summed up, squares for the diagonal and outer products of 48 neighbours for the
# blocks. The sums hold 49 numbers a weight, 2.1 GB, however many gradients there are.
# Jitted with its sums donated, an update works in place.

# %%
draws = np.random.default_rng(0)


def gradients(params, masks=None) -> Iterator:
    rows = draws.permutation(len(train["score"]))[:GRADIENTS]
    pairs = batches(train, size=16, rows=rows, multiple=32)
    return js.curvature.stream_grads(stsb_loss, params, pairs, where=WHERE, masks=masks)


def summed_up(estimator, params, masks=None):
    sums = estimator.init(params)
    update = jax.jit(estimator.update, donate_argnums=0)
    for grads in gradients(params, masks):
        sums = update(sums, grads)
    return sums


estimator = js.curvature.diagonal_estimator(where=WHERE)
diagonal = estimator.finalize(summed_up(estimator, params), rel_damping=0.1)
estimator = js.curvature.block_estimator(block_size=BLOCK_SIZE, where=WHERE)
blocks = estimator.finalize(summed_up(estimator, params), rel_damping=0.1)

# %% [markdown]
# ## One cut

# %%
options = {"pattern": GLOBAL, "where": WHERE}
obs = functools.partial(js.solvers.obs, params, **options)
methods = {
    "magnitude": functools.partial(js.prune, params, **options),
    "diagonal": functools.partial(obs, diagonal),
    "blocks, as the papers": functools.partial(obs, blocks, update="independent"),
    "blocks, exact": functools.partial(obs, blocks),
}
curves = {
    name: [dense, *(evaluate(prune(s).params) for s in SPARSITIES)]
    for name, prune in methods.items()
}
del methods, blocks  # 2.1 GB

# %% [markdown]
# ## A little at a time
#
# Between two cuts the curvature is that of the network as it is by then.


# %%
def refresh(params, masks):
    return estimator.finalize(summed_up(estimator, params, masks), rel_damping=0.1)


name = "blocks, exact, recomputed"
curves[name], pruned = [dense], js.Pruned(params, None)
cuts = (1, 1) if args.small else (2, 1, 1, 2)
for sparsity, steps in zip(SPARSITIES, cuts, strict=True):
    pruned = js.solvers.obs(
        pruned.params,
        refresh(*pruned),
        sparsity,
        masks=pruned.masks,
        steps=steps,
        refresh=refresh,
        **options,
    )
    curves[name].append(evaluate(pruned.params))

# %%
results = Table(title=f"Spearman's coefficient, {PAIRS} pairs of STS-B")
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
    xlabel="sparsity of the encoder's matrices in %",
    ylabel="Spearman's coefficient",
    path=args.out / "obs_bert.png",
)
print(f"Wrote obs_bert.png to {args.out}")
