# %% [markdown]
# # A network that is really smaller
#
# ResNet-20, trained by others on CIFAR-10, loses channels. With masks they are zero and
# the network is as slow as before; narrowed, they are gone: fewer weights, fewer
# operations, less time. Nothing is written anew for that: the function that runs the
# network is traced, and what was traced runs at the new sizes. Weights and images are
# not part of jaxsparse: `_data.py` says where they are looked for.

# %%
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from _common import arguments
from _data import decode, find
from _resnet import cross_entropy, forward, load
from matplotlib.figure import Figure
from rich.table import Table

import jaxsparse as js

args = arguments(
    "Remove channels of a ResNet-20.",
    small="few images, few steps",
    out="out/structured",
    needs_files=True,
)

files = find(
    "weights/resnet20_cifar10_jpeg_adapted.npz",
    "images/cifar10_jpeg_test8k.npz",
    "images/cifar10_jpeg_train.npz",
    "images/cifar10_png_train4k.npz",
    skip_missing=args.skip_missing,
)
weights, test, jpeg_train, png_train = map(np.load, files)
IMAGES, STEPS, BATCH = (200, 4, 32) if args.small else (4_000, 150, 128)
BUDGETS = (0.5,) if args.small else (0.65, 0.45, 0.3)
x, y = test["x"][:IMAGES], test["y"][:IMAGES]
try:
    x_train, y_train = decode(jpeg_train, 256 if args.small else 20_000)
except ImportError:
    print("Without pillow: training on 4,000 png images, not on jpeg ones.")
    x_train, y_train = png_train["x"], png_train["y"]

# %% [markdown]
# ## Which channels belong together
#
# A channel of a residual stream is a channel of every layer that adds to it or reads
# it, of their norms and of the norms' running statistics: one group. The shortcuts of
# this network have no weights, they fill new channels with zeros; those are groups of
# their own. What may not be removed says why, and at which line of the model.

# %%
params, stats = load(weights)
variables = {"params": params, "stats": stats}
apply_fn = lambda v, images: forward(v["params"], v["stats"], images)[0]
trace = js.trace(apply_fn, variables, jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8))
groups = js.coupling.groups(trace)
print("\n".join(line[:110] for line in str(groups).splitlines()[:12]))
whole = js.narrowing.cost(trace)
print(f"{len(groups.prunable)} groups may lose channels; {whole}")

# %% [markdown]
# ## Which of them matter least
#
# |weight x gradient|, summed over all slices of a channel, in each group relative to
# the group's mean. The lowest go, from all groups, until a budget of operations is met.
# What is kept of a group is rounded to a multiple of 4: convolutions of 13 channels are
# slower than those of 16 on many machines. (One choice without that is there to see;
# and on CPUs 24 channels may take longer than 32: fewer operations are not always less
# time.)

# %%
sample = {"x": x_train[:512], "y": y_train[:512]}
grads = jax.jit(jax.grad(cross_entropy(stats)))(params, sample)
saliency = {
    "params": js.scores.taylor(params, grads),
    "stats": jax.tree.map(jnp.zeros_like, stats),
}
scores = js.channels.channel_scores(groups, saliency)
scores = js.channels.normalize_mean(scores)


def choose(budget, round_to):
    return js.channels.drop_to_budget(
        groups,
        scores,
        cost=lambda drop: js.narrowing.cost(trace, drop).flops,
        budget=budget * whole.flops,
        scope="global",
        min_keep=4,
        round_to=round_to,
    ).drop


selected = {budget: choose(budget, 4) for budget in BUDGETS}

# %% [markdown]
# ## What stays makes up for what goes
#
# Kernels that read fewer channels get the weights that come closest to their old
# outputs, by least squares on the images that they met here. No training yet.

# %%
inputs = js.calibration.run(trace, variables, [sample["x"]])
refitted = {
    budget: js.channels.obs_refit(groups, variables, inputs, drop)
    for budget, drop in selected.items()
}

# %% [markdown]
# ## Masked and narrowed
#
# Both forms of the same choice give the same logits, and so the same accuracy.


# %%
def accuracy(apply_fn, variables):
    run = jax.jit(lambda v, images: jnp.argmax(apply_fn(v, images), -1))
    found = [run(variables, x[i : i + 200]) for i in range(0, len(x), 200)]
    return float(np.mean(np.concatenate(found) == y))


def milliseconds(rows, size=64):
    """The median times of a batch of images, compiled; all rows in turn."""
    images = jnp.asarray(x[:size])
    runs = [(jax.jit(apply_fn), variables) for _, _, apply_fn, variables in rows]
    times = []
    for _ in range(4 if args.small else 40):
        times.append([])
        for run, variables in runs:
            start = time.perf_counter()
            run(variables, images).block_until_ready()
            times[-1].append(1e3 * (time.perf_counter() - start))
    return np.median(times[1:], axis=0)  # the first turn compiles


rows = [("dense", 1.0, apply_fn, variables)]
for budget, drop in selected.items():
    masks = js.narrowing.drop_masks(trace, drop)
    masked = js.patterns.apply(refitted[budget], masks)
    narrowed = js.narrowing.narrow(trace, refitted[budget], drop)
    run, small = narrowed.apply_fn, narrowed.params
    error = jnp.max(jnp.abs(apply_fn(masked, x[:64]) - run(small, x[:64])))
    assert error < 1e-3, error
    rows.append(("masked", budget, apply_fn, masked))
    rows.append(("narrowed", budget, run, small))
odd = js.narrowing.narrow(trace, variables, choose(0.45, 1))
rows.append(("as scored, not rounded", 0.45, odd.apply_fn, odd.params))

# %% [markdown]
# ## Trained a little more
#
# The training function is another one: it normalises by the batch and gives back moved
# statistics. It is traced too and narrowed by the same drop; its results are narrower
# as well, which `allow={"output"}` says is meant. The optimizer is made for the smaller
# parameters (a running one's state would be cut by `narrow_like`).

# %%
train_fn = lambda v, images: forward(v["params"], v["stats"], images, train=True)
train_trace = js.trace(train_fn, variables, x_train[:BATCH])


def fine_tune(variables, drop, name):
    narrow_train = js.narrowing.narrow(
        train_trace, variables, drop, allow={"output", "zeros"}
    )
    forward_train, variables = narrow_train.apply_fn, narrow_train.params
    decay = optax.cosine_decay_schedule(0.02, STEPS)
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(decay, momentum=0.9))
    opt_state = tx.init(variables["params"])

    @jax.jit
    def step(variables, opt_state, images, labels):
        def loss_fn(params):
            logits, stats = forward_train({**variables, "params": params}, images)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean(), stats

        found = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        (loss, stats), grads = found
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "stats": stats}, opt_state, loss

    rng = np.random.default_rng(0)
    bar = js.report.progress(range(STEPS), description=name)
    for _ in bar:
        at = rng.integers(0, len(x_train), BATCH)
        images = np.pad(x_train[at], [(0, 0), (4, 4), (4, 4), (0, 0)])
        i, j = rng.integers(0, 9, 2)
        images = images[:, i : i + 32, j : j + 32]
        images[::2] = images[::2, :, ::-1]
        labels = y_train[at].astype(np.int32)
        variables, opt_state, loss = step(variables, opt_state, images, labels)
        bar.say(f"loss {loss:.3f}")
    return variables


for budget, drop in selected.items():
    run = js.narrowing.narrow(trace, variables, drop).apply_fn
    tuned = fine_tune(refitted[budget], drop, f"{budget:.0%} of the operations")
    rows.append(("trained", budget, run, tuned))
    js.checkpoint.export(args.out / f"narrow_{budget}.npz", tuned, drop=drop)

# %% [markdown]
# ## What it is worth

# %%
title = f"ResNet-20 on {len(x):,} jpeg test images; {STEPS} steps of training"
table = Table(title=title)
for column in ("", "operations", "parameters", "ms for 64 images", "accuracy"):
    table.add_column(column, justify="right")
points = []
for (name, budget, run, v), took in zip(rows, milliseconds(rows), strict=True):
    count, found = sum(w.size for w in v["params"].values()), accuracy(run, v)
    points.append((name, budget, count, took, found))
    cells = f"{budget:.0%}", f"{count:,}", f"{took:.1f}", f"{found:.4f}"
    table.add_row(name, *cells)
rich.print(table)

# %%
MARKS = {"dense": "k*", "masked": "C1x", "narrowed": "C0o", "trained": "C2s-"}
figure = Figure(figsize=(9, 4), layout="constrained")
for axes, at, label in zip(
    figure.subplots(1, 2, sharey=True),
    (3, 2),
    ("milliseconds for 64 images", "parameters"),
    strict=True,
):
    for name, mark in MARKS.items():
        chosen = sorted(p for p in points if p[0] == name)
        text = {"trained": "narrowed, trained"}.get(name, name)
        axes.plot([p[at] for p in chosen], [p[4] for p in chosen], mark, label=text)
    axes.set(xlabel=label, ylabel="accuracy")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
axes.legend()
figure.savefig(args.out / "accuracy.png", dpi=150)
print(f"plot: {args.out / 'accuracy.png'}")
