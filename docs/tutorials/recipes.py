# %% [markdown]
# # Prune by a recipe
#
# A recipe is a whole training as one value: when to prune, how far, the learning rate
# and the loss. Here a dense network learns scikit-learn's digits, and two recipes make
# it sparse: one cut before fine-tuning, and many small cuts while it trains.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxsparse as js

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
x_train, y_train, x_test, y_test = x[:1347], y[:1347], x[1347:], y[1347:]
STEPS = 400


def apply_fn(params, x):
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def draw(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5


initial = {
    "hidden": {"kernel": draw(0, (64, 256)), "bias": jnp.zeros(256)},
    "out": {"kernel": draw(1, (256, 10)), "bias": jnp.zeros(10)},
}

# %% [markdown]
# ## Train dense
#
# One function trains with any optimizer. It knows nothing of sparsity.


# %%
@jax.jit
def accuracy(params):
    return jnp.mean(jnp.argmax(apply_fn(params, x_test), -1) == y_test)


def train(tx, params, loss=optax.softmax_cross_entropy_with_integer_labels):
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state):
        loss_fn = lambda p: loss(apply_fn(p, x_train), labels=y_train).mean()
        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(STEPS):
        params, opt_state = train_step(params, opt_state)
    return params, opt_state


dense, _ = train(optax.adam(5e-3), initial)
print(f"dense: {float(accuracy(dense)):.1%}")

# %% [markdown]
# ## Two recipes
#
# `recipe.optimizer()` prunes on the recipe's schedule, and `recipe.loss` is the loss of
# each example. `gmp` prunes gradually: it begins after a tenth of the training and
# leaves the last quarter to recover. `one_shot` prunes once; here it takes the masks of
# `js.prune` and trains the weights that remain. Both start from the dense network and
# have the same number of steps.

# %%
GLOBAL = js.Unstructured(scope="global")
OPTIONS = {"pattern": GLOBAL, "learning_rate": (1e-2, 0.0)}
SPARSITIES = (0.9, 0.95, 0.98)
runs = {"cut, not trained": [], "one shot": [], "gradual magnitude": []}
for sparsity in SPARSITIES:
    cut = js.prune(dense, sparsity, pattern=GLOBAL)
    one_shot = js.recipes.one_shot(STEPS, sparsity=sparsity, **OPTIONS)
    tx = one_shot.optimizer(masks=cut.masks)
    tuned, _ = train(tx, cut.params, one_shot.loss)
    gmp = js.recipes.gmp(STEPS, final=sparsity, **OPTIONS)
    gradual, opt_state = train(gmp.optimizer(), dense, gmp.loss)
    js.assert_sparse(opt_state, gradual)
    for accuracies, params in zip(
        runs.values(), (cut.params, tuned, gradual), strict=True
    ):
        accuracies.append(float(accuracy(params)))

print(f"{'':18}", *(f"{s:>6.0%}" for s in SPARSITIES))
for name, accuracies in runs.items():
    print(f"{name:18}", *(f"{a:>6.1%}" for a in accuracies))

# %%
points = {"dense": ([0], [accuracy(dense)])}
points |= {name: ([100 * s for s in SPARSITIES], a) for name, a in runs.items()}
js.report.plot_tradeoff(points, xlabel="sparsity in %", ylabel="test accuracy")

# %% [markdown]
# Training brings back most of what the cut has lost. On a network this small the two
# recipes are close, and where few weights remain the result varies with rounding.
#
# ## Other recipes, other masks
#
# `js.recipes.obert_downstream` and `obert_upstream` are the recipes of oBERT. They
# prune transformers by [second order](second_order.py), rewind the learning rate at
# each cut and learn from a dense teacher. `_replace` changes any field of a recipe.
#
# `recipe.optimizer(masks=...)` trains with masks from elsewhere, such as those of
# `js.prune`, `js.oneshot.layerwise` or `js.solvers.obs`. `examples/recipes_minilm.py`
# and `recipes_resnet.py` run recipes on pretrained networks.
