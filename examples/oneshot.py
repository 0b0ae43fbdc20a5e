# %% [markdown]
# # Prune a trained network, in one line or in steps
#
# Every score chooses other weights. How well, after training and before?

# %%
import jax
import jax.numpy as jnp
import optax
import rich
from _common import arguments, show
from _mlp import accuracy, init, loss_fn, y_test
from _mlp import train as scan

import jaxsparse as js

args = arguments("Prune in one shot.", small="few steps", out="out/oneshot")
STEPS = 200 if args.small else 1_500
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
everywhere = js.Unstructured(scope="global")
adam = optax.adam(optax.cosine_decay_schedule(1e-3, STEPS))


@jax.jit
def train(params, masks=None):
    """Trains; `keep_sparse`, the last member of the chain, holds the masks."""
    tx = adam if masks is None else optax.chain(adam, js.keep_sparse(masks))
    return scan(tx, params, jax.random.key(1), steps=STEPS).params


start = init(jax.random.key(0), (64, 256, 128, 10))
params = train(start)
print(f"dense: {accuracy(params):.2%} of {len(y_test)} test images")

# %% [markdown]
# In one line, and the same in steps, where each step can be looked at or replaced.

# %%
pruned = js.prune(params, 0.8)

scores = js.scores.magnitude(params)
masks = js.patterns.masks(scores, 0.8, pattern=js.Unstructured(), where=r"kernel$")
again = js.patterns.apply(params, masks)
assert jax.tree.all(jax.tree.map(jnp.array_equal, pruned.params, again))
rich.print(js.report.table(*pruned, asked=0.8, title="js.prune(params, 0.8)"))

# %% [markdown]
# Four scores, all in the global scope. Taylor and SNIP ask the gradient of the loss,
# near zero in a trained network; the two choose alike. SNIP was made for the moment
# before training: the second table prunes then, and trains under the fixed mask.


# %%
def sweep(params, finish=lambda params, masks: params):
    grads, rows, masks = jax.jit(jax.grad(loss_fn))(params), [], {}
    scores = {
        "random": js.scores.random(params, key=jax.random.key(2)),
        "taylor": js.scores.taylor(params, grads),
        "snip": js.scores.snip(params, grads),
        "magnitude": js.scores.magnitude(params),
    }
    for name, s in scores.items():
        masks[name] = [js.patterns.masks(s, x, pattern=everywhere) for x in SPARSITIES]
        sparse = [finish(js.patterns.apply(params, m), m) for m in masks[name]]
        rows.append((name, *(f"{accuracy(p):.1%}" for p in sparse)))
    return rows, masks


columns = ("score", *(f"{sparsity:.0%}" for sparsity in SPARSITIES))
rows, masks = sweep(params)
show("Test accuracy, pruned after training, not trained again", columns, rows)
at_80 = {f"{n}, 80%": js.report.table(params, m[3]) for n, m in masks.items()}
js.report.plot(at_80, path=args.out / "oneshot.png")
print(f"Wrote oneshot.png to {args.out}: how each score shares out 80 %")

rows, masks = sweep(start, train)
for name, found in masks.items():
    left = float(found[-1]["dense_1"]["kernel"].mean())
    print(f"{name}: {left:.2%} of the middle layer is left at 95%")
show(f"Test accuracy, pruned before training of {STEPS} steps", columns, rows)
