# %% [markdown]
# # A network that is really smaller
#
# ResNet-20, trained by others on CIFAR-10, loses channels. With masks they are zero and
# the network is as slow as before; narrowed, they are gone. Weights and images are not
# part of jaxsparse: `_data.py` says where they are looked for.

# %%
import jax
import jax.numpy as jnp
from _common import arguments, show
from _data import augmented
from _pictures import draw_channels
from _resnet import cross_entropy, forward, hits, milliseconds, setting, tune

import jaxsparse as js

text, small = "Remove channels of a ResNet-20.", "few images, few steps"
args = arguments(text, small=small, out="out/structured", needs_files=True)
IMAGES, STEPS, TRAIN = (200, 4, 256) if args.small else (4_000, 150, 20_000)
resnet = setting(test=IMAGES, train=TRAIN, skip_missing=args.skip_missing)
params, stats, x, y, x_train, y_train = resnet

# %% [markdown]
# Channels that a residual stream, norms and their statistics share are one group. Of
# all groups the lowest |weight x gradient| goes, relative to the group's mean, until a
# budget of operations is met. Widths are multiples of 4: odd ones are slow.

# %%
variables = {"params": params, "stats": stats}
both = lambda v, images, **how: forward(v["params"], v["stats"], images, **how)
apply_fn, train_fn = (lambda v, x: both(v, x)[0]), (lambda v, x: both(v, x, train=True))
trace, train_trace = (js.trace(f, variables, x_train[:1]) for f in (apply_fn, train_fn))
groups, whole = js.coupling.groups(trace), js.narrowing.cost(trace)
print("\n".join(line[:110] for line in str(groups).splitlines()[:12]))
print(f"{len(groups.prunable)} groups may lose channels; {whole}")
sample = {"x": x_train[:512], "y": y_train[:512]}
saliency = js.scores.taylor(params, jax.grad(cross_entropy(stats))(params, sample))
saliency = {"params": saliency, "stats": jax.tree.map(jnp.zeros_like, stats)}
scores = js.channels.normalize_mean(js.channels.channel_scores(groups, saliency))
inputs = js.calibration.run(trace, variables, [sample["x"]])


def choose(budget, round_to=4):
    cost, budget = lambda d: js.narrowing.cost(trace, d).flops, budget * whole.flops
    how = {"cost": cost, "budget": budget, "min_keep": 4, "round_to": round_to}
    return js.channels.drop_to_budget(groups, scores, scope="global", **how).drop


# %% [markdown]
# Kernels that read fewer channels get the weights that come closest to their old
# outputs (`obs_refit`). The training function is traced and narrowed by the same drop.

# %%
odd = js.narrowing.narrow(trace, variables, choose(0.45, round_to=1))
rows = [("dense", 1.0, variables, apply_fn), ("not rounded", 0.45, *odd[:2])]
for budget in (0.5,) if args.small else (0.65, 0.45, 0.3):
    drop = choose(budget)
    refitted = js.channels.obs_refit(groups, variables, inputs, drop)
    masked = js.patterns.apply(refitted, js.narrowing.drop_masks(trace, drop))
    small, run, _ = js.narrowing.narrow(trace, refitted, drop)
    assert jnp.max(jnp.abs(apply_fn(masked, x[:64]) - run(small, x[:64]))) < 1e-3
    how = {"allow": {"output", "zeros"}}  # its statistics become narrower, too
    training = js.narrowing.narrow(train_trace, refitted, drop, **how)
    images = augmented(x_train, y_train, 32 if args.small else 128)
    tuned = tune(training.apply_fn, training.params, images, STEPS)
    rows.append(("masked", budget, masked, apply_fn))
    rows += [("narrowed", budget, small, run), ("trained", budget, tuned, run)]
    js.checkpoint.export(args.out / f"narrow_{budget}.npz", tuned, drop=drop)
took = milliseconds([row[:1:-1] for row in rows], x[:64], turns=4 if args.small else 40)
points, cells = [], []
for (name, budget, v, run), ms in zip(rows, took, strict=True):
    count, found = sum(w.size for w in v["params"].values()), hits(run, v, x, y)
    points.append((name, budget, count, ms, found))
    cells.append((name, f"{budget:.0%}", f"{count:,}", f"{ms:.1f}", f"{found:.4f}"))
columns = ("", "operations", "parameters", "ms for 64 images", "accuracy")
show(f"ResNet-20, {len(x):,} test images, {STEPS} steps of training", columns, cells)
draw_channels(points, args.out / "accuracy.png")
