# %% [markdown]
# # Prune a language model after training
#
# A tiny transformer learns a language of its own making, so that this page needs no
# data. Then each of its layers loses half of its weights, from a few sentences and
# without training. The same lines prune a large model.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse as js

VOCABULARY, WIDTH, HEADS, LENGTH = 16, 32, 4, 16
rng = np.random.default_rng(0)
table = rng.dirichlet(np.full(VOCABULARY, 0.1), size=(VOCABULARY, VOCABULARY))


def sentences(count):
    """Each token depends on the two before it, by a table of probabilities."""
    tokens = list(rng.integers(0, VOCABULARY, (2, count)))
    while len(tokens) < LENGTH + 1:
        chances = table[tokens[-2], tokens[-1]].cumsum(-1)
        tokens.append((chances > rng.random((count, 1))).argmax(-1))
    return np.stack(tokens, 1).astype(np.int32)


# %% [markdown]
# ## The model
#
# Plain functions and dictionaries; a flax or equinox model would do as well.


# %%
def init(key, layers=2):
    shapes = {"query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH)}
    shapes |= {"proj": (WIDTH, WIDTH), "up": (WIDTH, 64), "down": (64, WIDTH)}
    draw = lambda key, shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    keys = iter(jax.random.split(key, 6 * layers + 2))
    block = lambda: {n: {"kernel": draw(next(keys), s)} for n, s in shapes.items()}
    return {
        "blocks": [block() for _ in range(layers)],
        "embedding": draw(next(keys), (VOCABULARY, WIDTH)),
        "positions": draw(next(keys), (LENGTH, WIDTH)),
    }


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


def logits(params, tokens):
    x = params["embedding"][tokens] + params["positions"]
    for block in params["blocks"]:
        w = {name: block[name]["kernel"] for name in block}
        heads = (norm(x) @ w[name] for name in ("query", "key", "value"))
        q, k, v = (h.reshape(*x.shape[:2], HEADS, -1) for h in heads)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ w["proj"]
        x = x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"]
    return norm(x) @ params["embedding"].T


@jax.jit
def loss_fn(params, batch):
    found = logits(params, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(found, batch[:, 1:]).mean()


# %%
params = init(jax.random.key(0))
tx = optax.adam(3e-3)
opt_state = tx.init(params)


@jax.jit
def train_step(params, opt_state, batch):
    updates, opt_state = tx.update(jax.grad(loss_fn)(params, batch), opt_state)
    return optax.apply_updates(params, updates), opt_state


for _ in range(200):
    params, opt_state = train_step(params, opt_state, sentences(64))
dev = sentences(256)
print(f"dense: perplexity {float(jnp.exp(loss_fn(params, dev))):.2f}")

# %% [markdown]
# ## One pass over a little data
#
# The pass stops at each kernel, sums up the second moments of the inputs that arrive
# there (through the kernels pruned before it), and prunes the kernel.

# %%
calibration = [sentences(64)[:, :-1] for _ in range(4)]
solvers = js.solvers.magnitude, js.solvers.sparsegpt, js.solvers.alps
for solver in solvers:
    pruned = js.oneshot.layerwise(
        logits, params, calibration, sparsity=0.5, solver=solver, show=False
    )
    perplexity = float(jnp.exp(loss_fn(pruned.params, dev)))
    print(f"{solver.__name__}: perplexity {perplexity:.2f}")

# %% [markdown]
# The result lists how well each kernel was solved. A kernel that the model does not
# multiply with data (the embedding) stays dense.

# %%
print(js.report.layer_table(pruned.info))

# %% [markdown]
# ## A real model
#
# `python examples/layerwise.py` does the same with stories260K, a Llama that was
# trained on TinyStories. It looks for the weights and texts in the folder
# `$JAXSPARSE_DATA` and says what is missing. [Results](../results.md#layer-by-layer)
# has its table: ALPS is the best there, too.
