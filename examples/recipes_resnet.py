# %% [markdown]
# # Recipes on an image classifier
#
# ResNet-20, trained by others on CIFAR-10, is pruned to 90 %: in one cut with
# fine-tuning, and gradually. A recipe is one value: `optimizer()` prunes on its
# schedule, `loss()` has the shares of labels and teacher. Weights and images are not
# part of jaxsparse: `_data.py` says where they are looked for.

# %%
import jax
import optax
from _common import arguments, show
from _data import augmented
from _resnet import accuracy, forward, setting
from _training import trainer

import jaxsparse as js

text = "Prune ResNet-20 by recipes."
args = arguments(text, small="few images, few steps", needs_files=True)
STEPS, BATCH, IMAGES = (6, 32, 200) if args.small else (200, 128, 2_000)
resnet = setting(test=IMAGES, train=None, skip_missing=args.skip_missing)

# %% [markdown]
# The student learns from labels and from the dense network, half each. SGD in the place
# of AdamW is one argument.

# %%
options = {"pattern": js.Unstructured(scope="global"), "hardness": 0.5}
options |= {"learning_rate": (0.02, 0.0), "temperature": 2.0}
RECIPES = {
    "one shot": js.recipes.one_shot(STEPS, sparsity=0.9, **options),
    "gradual magnitude": js.recipes.gmp(STEPS, final=0.9, begin=0.0, **options),
}


def train(recipe):
    def loss_fn(params, stats, batch):
        logits, moved = forward(params, stats, batch[0], train=True)
        teacher, _ = forward(resnet.params, resnet.stats, batch[0])
        return recipe.loss(logits, teacher, batch[1]).mean(), moved

    tx = recipe.optimizer(lambda rate: optax.sgd(rate, momentum=0.9))
    params, opt_state = jax.jit(lambda p: js.init_sparse(tx, p))(resnet.params)
    start = {"state": resnet.stats, "opt_state": opt_state}
    images = augmented(resnet.x_train, resnet.y_train, BATCH, shift=0)
    found = trainer(loss_fn, tx)(params, images, recipe.total_steps, **start)
    js.assert_sparse(found.opt_state, found.params)
    return found.params, found.state


# %%
cut = js.prune(resnet.params, 0.9, pattern=options["pattern"]).params
networks = {"dense": (resnet.params, resnet.stats)}
networks |= {"cut, not trained": (cut, resnet.stats)}
networks |= {name: train(recipe) for name, recipe in RECIPES.items()}
found = {n: accuracy(*network, resnet.x, resnet.y) for n, network in networks.items()}
title = f"ResNet-20 at 90 %, {STEPS} steps, {IMAGES:,} test images"
show(title, ("", "accuracy"), ((name, f"{a:.4f}") for name, a in found.items()))
