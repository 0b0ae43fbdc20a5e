# %% [markdown]
# # Recipes on a language model
#
# MiniLM, a sentence encoder of 6 layers, is pruned to 80 % while it learns a task:
# STS-B (how alike are two sentences?) and SST-2 (does a sentence praise?). A recipe is
# one value; its `optimizer()` prunes on its schedule. Weights and texts are not part of
# jaxsparse: `_minilm.py` and `_data.py` say where they are looked for.

# %%
import itertools

import jax
import numpy as np
import optax
import rich
from _common import arguments
from _data import find
from _minilm import (
    batches,
    find_weights,
    load,
    sst2_accuracy,
    sst2_loss,
    sst2_probe,
    stsb_loss,
    stsb_spearman,
)
from rich.table import Table

import jaxsparse as js

args = arguments(
    "Prune MiniLM by three recipes.", small="two kernels, few steps", needs_files=True
)

names = ("stsb_train", "stsb_dev", "sst2_train", "sst2_dev_half")
files = find(
    *(f"text/minilm_ids_{n}.npz" for n in names), skip_missing=args.skip_missing
)
stsb, stsb_dev, sst2, sst2_dev = map(np.load, files)
dense = load(find_weights(skip_missing=args.skip_missing))
SPARSITY, STEPS_PER_EPOCH, FIRST = (0.8, 1, 60) if args.small else (0.8, 8, 500)
WHERE = r"^encoder/layer_[01]/intermediate/kernel$" if args.small else None

# %% [markdown]
# ## Two tasks
#
# Each has a file to train on, a loss and a measure.

# %%
head = sst2_probe(dense, sst2, sst2_dev, first=4 * FIRST).head
TASKS = {
    "STS-B, Spearman": (
        stsb,
        stsb_loss,
        lambda p: stsb_spearman(p, stsb_dev, first=FIRST),
    ),
    "SST-2, accuracy": (
        sst2,
        sst2_loss(head),
        lambda p: sst2_accuracy(p, head, sst2_dev, first=FIRST),
    ),
}

# %% [markdown]
# ## Three recipes
#
# oBERT's prunes in seven cuts by second order and rewinds the learning rate at each;
# the Fisher's blocks are smaller here than in the paper, for memory. Gradual magnitude
# pruning cuts little by little. One-shot cuts once and fine-tunes.

# %%
obert = js.recipes.obert_downstream(STEPS_PER_EPOCH, final=SPARSITY)
obert = obert._replace(block_size=16, where=WHERE or obert.where)
steps, options = obert.total_steps, {"where": WHERE, "learning_rate": (8e-5, 0.0)}
GLOBAL = js.Unstructured(scope="global")
RECIPES = {
    "one shot": js.recipes.one_shot(
        steps, sparsity=SPARSITY, pattern=GLOBAL, **options
    ),
    "gradual magnitude": js.recipes.gmp(
        steps, final=SPARSITY, pattern=GLOBAL, **options
    ),
    "oBERT": obert,
}


def train(recipe: js.recipes.Recipe, file, loss_fn):
    tx = recipe.optimizer()
    params, opt_state = jax.jit(lambda p: js.init_sparse(tx, p))(dense)

    @jax.jit
    def step(params, opt_state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(0)
    epochs = (batches(file, size=16, multiple=64, rng=rng) for _ in itertools.count())
    texts = itertools.islice(itertools.chain.from_iterable(epochs), recipe.total_steps)
    for batch in texts:
        params, opt_state = step(params, opt_state, batch)
    js.assert_sparse(opt_state, params)
    return params


# %%
table = Table(
    title=f"MiniLM at {SPARSITY:.0%}, {steps} steps, {FIRST} texts of the dev set"
)
for column in ("", "dense", "cut, not trained", *RECIPES):
    table.add_column(column, justify="right")
cut = js.prune(dense, SPARSITY, pattern=GLOBAL, where=WHERE).params
for name, (file, loss_fn, measure) in TASKS.items():
    trained = (train(recipe, file, loss_fn) for recipe in RECIPES.values())
    table.add_row(name, *(f"{measure(p):.4f}" for p in (dense, cut, *trained)))
rich.print(table)
