# %% [markdown]
# # Recipes on an image classifier
#
# ResNet-20, trained by others on CIFAR-10, is pruned to 90 %: in one cut with
# fine-tuning, and gradually. A recipe is one value: `optimizer()` prunes on its
# schedule, `loss()` has the shares of labels and teacher. Weights and images are not
# part of jaxsparse: `_data.py` says where they are looked for.

# %%
import jax
import numpy as np
import optax
import rich
from _common import arguments
from _data import find
from _resnet import accuracy, forward, load
from rich.table import Table

import jaxsparse as js

args = arguments(
    "Prune ResNet-20 by recipes.", small="few images, few steps", needs_files=True
)

files = find(
    "weights/resnet20_cifar10_jpeg_adapted.npz",
    "images/cifar10_png_train4k.npz",
    "images/cifar10_jpeg_test8k.npz",
    skip_missing=args.skip_missing,
)
weights, train_set, test = map(np.load, files)
dense, stats = load(weights)
STEPS, BATCH, IMAGES = (6, 32, 200) if args.small else (200, 128, 2_000)
x_test, y_test = test["x"][:IMAGES], test["y"][:IMAGES]

# %% [markdown]
# ## Recipes
#
# The student learns from labels and from the dense network, half each. SGD in the place
# of AdamW is one argument.

# %%
options = {"pattern": js.Unstructured(scope="global"), "hardness": 0.5}
options |= {"learning_rate": (0.02, 0.0), "temperature": 2.0}
RECIPES = {
    "one shot": js.recipes.one_shot(STEPS, sparsity=0.9, **options),
    "gradual magnitude": js.recipes.gmp(STEPS, final=0.9, begin=0.0, **options),
}


def train(recipe: js.recipes.Recipe):
    tx = recipe.optimizer(lambda rate: optax.sgd(rate, momentum=0.9))
    params, opt_state = jax.jit(lambda p: js.init_sparse(tx, p))(dense)

    @jax.jit
    def step(params, moved, opt_state, x, y):
        def loss_fn(params):
            logits, new = forward(params, moved, x, train=True)
            teacher, _ = forward(dense, stats, x)
            return recipe.loss(logits, teacher, y).mean(), new

        grads, moved = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), moved, opt_state

    rng, moved = np.random.default_rng(0), stats
    for _ in range(recipe.total_steps):
        rows = rng.integers(0, len(train_set["x"]), BATCH)
        x, y = train_set["x"][rows], train_set["y"][rows].astype(np.int32)
        x[::2] = x[::2, :, ::-1]  # mirrored
        params, moved, opt_state = step(params, moved, opt_state, x, y)
    js.assert_sparse(opt_state, params)
    return params, moved


# %%
table = Table(title=f"ResNet-20 at 90 %, {STEPS} steps, {IMAGES:,} test images")
table.add_column("")
table.add_column("accuracy", justify="right")
cut = js.prune(dense, 0.9, pattern=options["pattern"]).params
networks = {"dense": (dense, stats), "cut, not trained": (cut, stats)}
networks |= {name: train(recipe) for name, recipe in RECIPES.items()}
for name, network in networks.items():
    table.add_row(name, f"{accuracy(*network, x_test, y_test):.4f}")
rich.print(table)
