# %% [markdown]
# # Prune BERT with second-order information
#
# A small BERT learns whether a sentence praises, in a language of its own making, so
# that this page needs no data. Then its encoder loses up to 90 % of its weights, and
# nothing is trained afterwards. The curvature comes from gradients that are not kept.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse as js

WORDS, LENGTH, WIDTH, HEADS, LAYERS, NOT = 40, 16, 32, 4, 2, 1
rng = np.random.default_rng(0)
mood = rng.choice([-1, 0, 1], WORDS) * (np.arange(WORDS) > NOT)  # word 0 pads


def sentences(count):
    """Words, which of them are there, and whether they praise: "not" turns the next."""
    mask = np.arange(LENGTH) < rng.integers(5, LENGTH + 1, (count, 1))
    ids = np.where(rng.random((count, LENGTH)) < 0.2, NOT, 0)
    ids = np.where(ids | ~mask, ids * mask, rng.integers(2, WORDS, ids.shape))
    turned = np.pad(ids, [(0, 0), (1, 0)])[:, :-1] == NOT
    labels = np.where(turned, -mood[ids], mood[ids]).sum(1) > 0
    return {"ids": ids, "mask": mask, "label": labels.astype(np.float32)}


# %% [markdown]
# ## The model
#
# BERT as it is: learned positions, attention over the words that are there, a norm
# after each sum, GELU, and the mean of the last states.


# %%
def init(key):
    keys = iter(jax.random.split(key, 6 * LAYERS + 3))
    draw = lambda *shape: jax.random.normal(next(keys), shape) / shape[0] ** 0.5
    dense = lambda m, n: {"kernel": draw(m, n), "bias": jnp.zeros(n)}
    sizes = dict.fromkeys(("q", "k", "v", "out"), (WIDTH, WIDTH))
    sizes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    layer = lambda: {name: dense(*size) for name, size in sizes.items()}
    encoder = {f"layer_{i}": layer() for i in range(LAYERS)}
    params = {"words": draw(WORDS, WIDTH), "positions": draw(LENGTH, WIDTH)}
    return params | {"encoder": encoder, "head": dense(WIDTH, 1)}


def apply_fn(params, ids, mask):
    norm = partial(jax.nn.standardize, epsilon=1e-5)
    x = norm(params["words"][ids] + params["positions"])
    for layer in params["encoder"].values():
        use = lambda name, x, p=layer: x @ p[name]["kernel"] + p[name]["bias"]
        q, k, v = (use(n, x).reshape(*x.shape[:2], HEADS, -1) for n in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None])
        x = norm(x + use("out", y.reshape(x.shape)))
        x = norm(x + use("down", jax.nn.gelu(use("up", x))))
    mean = jnp.sum(x * mask[..., None], 1) / mask.sum(1, keepdims=True)
    return (mean @ params["head"]["kernel"] + params["head"]["bias"])[:, 0]


def loss_fn(params, batch):
    logits = apply_fn(params, batch["ids"], batch["mask"])
    return optax.sigmoid_binary_cross_entropy(logits, batch["label"]).mean()


@jax.jit
def accuracy(params, batch):
    return jnp.mean(
        (apply_fn(params, batch["ids"], batch["mask"]) > 0) == batch["label"]
    )


# %%
params, tx = init(jax.random.key(0)), optax.adam(optax.cosine_decay_schedule(3e-3, 800))
opt_state = tx.init(params)


@jax.jit
def train_step(params, opt_state, batch):
    updates, opt_state = tx.update(jax.grad(loss_fn)(params, batch), opt_state)
    return optax.apply_updates(params, updates), opt_state


for _ in range(800):
    params, opt_state = train_step(params, opt_state, sentences(128))
test, training = sentences(2_000), [sentences(64) for _ in range(16)]
print(f"dense: {float(accuracy(params, test)):.1%}")

# %% [markdown]
# ## Curvature from a stream
#
# One gradient for each sentence. They arrive in batches and are summed up: squares for
# the diagonal, outer products of 32 neighboring weights for the blocks. The sums of
# the blocks hold 33 numbers for each weight, however many gradients there are.

# %%
WHERE = r"^encoder/.*kernel$"


def fisher(estimator, params, masks=None):
    sums, update = estimator.init(params), jax.jit(estimator.update, donate_argnums=0)
    options = {"where": WHERE, "masks": masks}
    for grads in js.curvature.stream_grads(loss_fn, params, training, **options):
        sums = update(sums, grads)
    return estimator.finalize(sums, rel_damping=0.1)


blocks = js.curvature.block_estimator(block_size=32, where=WHERE)
diagonal = js.curvature.diagonal_estimator(where=WHERE)

# %% [markdown]
# ## One cut, or several
#
# All weights of the encoder compete. `obs` chooses and updates those that remain. The
# curvature is that of the dense network, and far from it misleads. So the last row
# takes 4 steps, and between them `refresh` computes the curvature anew.

# %%
how = {"pattern": js.Unstructured(scope="global"), "where": WHERE}
obs = partial(js.solvers.obs, params, **how)
refresh, dense = partial(fisher, blocks), fisher(blocks, params)
methods = {
    "magnitude": partial(js.prune, params, **how),
    "diagonal": partial(obs, fisher(diagonal, params)),
    "blocks": partial(obs, dense),
    "blocks, 4 cuts": partial(obs, dense, steps=4, refresh=refresh),
}
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
print(f"{'':15}", *(f"{sparsity:6.0%}" for sparsity in SPARSITIES))
for name, prune in methods.items():
    print(
        f"{name:15}", *(f"{accuracy(prune(s).params, test):6.1%}" for s in SPARSITIES)
    )

# %% [markdown]
# ## A pretrained BERT
#
# `python examples/obs_bert.py` prunes MiniLM, a sentence encoder of 6 layers, in the
# same way, and says where it looks for the weights. While a BERT is trained,
# [oBERT's recipe](recipes.py) prunes it by second order.
