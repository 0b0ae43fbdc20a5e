# %% [markdown]
# # Learn which two of four weights a language model keeps
#
# A small Llama (260,032 parameters, trained on TinyStories) keeps two of every four
# weights, and the weights themselves never change. SparseGPT's masks are the start;
# MaskLLM learns a distribution over the six patterns of each group from stories, and
# takes the likeliest. Weights and texts are not part of jaxsparse: `_data.py` says
# where they are looked for.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, show
from _data import find
from _stories import MATRICES, cross_entropy, load, logits, perplexity, windows

import jaxsparse as js

small = "short stories, few steps"
args = arguments("2:4 masks that are learned.", small=small, needs_files=True)
names = ("weights/stories260K.npz", "text/tinystories_dev_tok512.npz")
weights, texts = map(np.load, find(*names, skip_missing=args.skip_missing))
params = load(weights)
LENGTH, STEPS, LAST = (64, 40, 1740) if args.small else (256, 300, 2015)
stories, dev = windows(texts, 0, 1715, LENGTH), windows(texts, 1716, LAST, LENGTH)
two_of_four, axes = js.NM(2, 4), js.Axes(input=(1,), output=(0,))  # x @ w.T

# %% [markdown]
# SparseGPT chooses masks and updates the weights that stay. MaskLLM takes the masks
# alone: the logits of their patterns begin higher than the others'.

# %%
calibration = [jnp.asarray(stories[i : i + 16, :-1]) for i in range(0, 128, 16)]
how = {"solver": js.solvers.sparsegpt, "pattern": two_of_four, "where": MATRICES}
sparsegpt = js.oneshot.layerwise(logits, params, calibration, show=False, **how)
masks, drawn = sparsegpt.masks, {"pattern": two_of_four, "axes": axes}
start = {"key": jax.random.key(0), "masks": masks, "where": MATRICES}
pi = js.masking.init_mask_logits(params, **start, **drawn)

# %% [markdown]
# In each step a soft mask is drawn for each group. As the temperature falls and the
# scale of the logits rises, the soft masks come near to hard ones.

# %%
temperature = optax.linear_schedule(4.0, 0.05, STEPS)
scale = optax.linear_schedule(1e2, 5e2, STEPS)
tx = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS, 0.1))


def loss_fn(pi, batch, key, step):
    noise = {"key": key, "temperature": temperature(step), "scale": scale(step)}
    soft = js.masking.masked_by_logits(params, pi, **noise, **drawn)
    return cross_entropy(soft, batch)


@jax.jit
def train_step(pi, opt_state, batch, key, step):
    grads = jax.grad(loss_fn)(pi, batch, key, step)
    updates, opt_state = tx.update(grads, opt_state, pi)
    return optax.apply_updates(pi, updates), opt_state


opt_state, rng = tx.init(pi), np.random.default_rng(0)
for step in range(STEPS):
    batch = stories[rng.choice(len(stories), 8, replace=False)]
    key = jax.random.fold_in(jax.random.key(1), step)
    pi, opt_state = train_step(pi, opt_state, batch, key, step)

# %%
learned = js.masking.masks_of_logits(pi, params, **drawn)
models = {"dense": params, "SparseGPT": sparsegpt.params}
models["SparseGPT, masks alone"] = js.patterns.apply(params, masks)
models["learned masks"] = js.patterns.apply(params, learned)
rows = [(name, f"{perplexity(model, dev):.2f}") for name, model in models.items()]
show("2:4 of all layers", ("", "perplexity"), rows)
