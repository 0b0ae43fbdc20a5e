# %% [markdown]
# # Recipes on a language model
#
# MiniLM, a sentence encoder of 6 layers, is pruned to 80 % while it learns a task:
# STS-B (how alike are two sentences?) and SST-2 (does a sentence praise?). A recipe is
# one value; its `optimizer()` prunes on its schedule. Weights and texts are not part of
# jaxsparse: `_minilm.py` and `_data.py` say where they are looked for.

# %%
import jax
import numpy as np
from _common import arguments, show
from _data import find
from _minilm import (
    epochs,
    find_weights,
    load,
    sst2_accuracy,
    sst2_loss,
    sst2_probe,
    stsb_loss,
    stsb_spearman,
)
from _training import trainer

import jaxsparse as js

args = arguments("Three recipes.", small="two kernels, few steps", needs_files=True)
names = ("stsb_train", "stsb_dev", "sst2_train", "sst2_dev_half")
names = (f"text/minilm_ids_{name}.npz" for name in names)
files = map(np.load, find(*names, skip_missing=args.skip_missing))
stsb, stsb_dev, sst2, sst2_dev = files
dense = load(find_weights(skip_missing=args.skip_missing))
SPARSITY, STEPS_PER_EPOCH, FIRST = (0.8, 1, 60) if args.small else (0.8, 8, 500)
WHERE = r"^encoder/layer_[01]/intermediate/kernel$" if args.small else None

# %%
# Each of the two tasks has a file to train on, a loss and a measure.
head = sst2_probe(dense, sst2, sst2_dev, first=4 * FIRST).head
similar = lambda params: stsb_spearman(params, stsb_dev, first=FIRST)
right = lambda params: sst2_accuracy(params, head, sst2_dev, first=FIRST)
TASKS = {
    "STS-B, Spearman": (stsb, stsb_loss, similar),
    "SST-2, accuracy": (sst2, sst2_loss(head), right),
}

# %% [markdown]
# oBERT's recipe prunes in seven cuts by second order and rewinds the learning rate at
# each; the Fisher's blocks are smaller here than in the paper, for memory. Gradual
# magnitude pruning cuts little by little. One-shot cuts once and fine-tunes.

# %%
obert = js.recipes.obert_downstream(STEPS_PER_EPOCH, final=SPARSITY)
obert = obert._replace(block_size=16, where=WHERE or obert.where)
everywhere, steps = js.Unstructured(scope="global"), obert.total_steps
how = {"where": WHERE, "learning_rate": (8e-5, 0.0), "pattern": everywhere}
RECIPES = {
    "one shot": js.recipes.one_shot(steps, sparsity=SPARSITY, **how),
    "gradual magnitude": js.recipes.gmp(steps, final=SPARSITY, **how),
    "oBERT": obert,
}


def train(recipe, file, loss_fn):
    tx = recipe.optimizer()
    params, opt_state = jax.jit(lambda p: js.init_sparse(tx, p))(dense)
    run = trainer(lambda params, state, batch: (loss_fn(params, batch), state), tx)
    texts = epochs(file, size=16, multiple=64)
    found = run(params, texts, recipe.total_steps, opt_state=opt_state)
    js.assert_sparse(found.opt_state, found.params)
    return found.params


# %%
cut, rows = js.prune(dense, SPARSITY, pattern=everywhere, where=WHERE).params, []
for name, (file, loss_fn, measure) in TASKS.items():
    trained = (train(recipe, file, loss_fn) for recipe in RECIPES.values())
    rows.append((name, *(f"{measure(p):.4f}" for p in (dense, cut, *trained))))
title = f"MiniLM at {SPARSITY:.0%}, {steps} steps, {FIRST} texts of the dev set"
show(title, ("", "dense", "cut, not trained", *RECIPES), rows)
