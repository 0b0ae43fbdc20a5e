# %% [markdown]
# # A pretrained network on real images
#
# ResNet-20, trained by others on CIFAR-10, is pruned in one shot and then, at 80 %,
# trained a little more. The network is one function, in `_resnet.py`: it keeps the
# names of the file and turns the kernels into JAX's layout; running means and variances
# are not parameters. Weights and images are not part of jaxsparse: `_data.py` says
# where they are looked for. (jpeg = the images after lossy compression; the network
# "adapted" was trained on such images for three more epochs.)

# %%

import jax
import numpy as np
import optax
import rich
from _common import arguments
from _data import decode, find
from _resnet import accuracy, forward, load
from rich.table import Table

import jaxsparse as js

args = arguments(
    "Prune a pretrained ResNet-20.",
    small="few images, few steps",
    out="out/pretrained",
    needs_files=True,
)

files = find(
    "weights/resnet20_cifar10.npz",
    "weights/resnet20_cifar10_jpeg_adapted.npz",
    "weights/ref_outputs.npz",
    "images/cifar10_png_test200.npz",
    "images/cifar10_jpeg_test8k.npz",
    "images/cifar10_jpeg_train.npz",
    "images/cifar10_png_train4k.npz",
    skip_missing=args.skip_missing,
)
original, adapted, outputs, png, jpeg, jpeg_train, png_train = map(np.load, files)
STEPS, BATCH = (6, 32) if args.small else (150, 128)

# %% [markdown]
# ## Is it the same network?
#
# Before anything is pruned: the logits of 16 images against those the origin's own code
# gave, and the accuracies against those measured there.

# %%
models = {
    "resnet20_cifar10": (*load(original), 0.8131),
    "resnet20_cifar10_jpeg_adapted": (*load(adapted), 0.8813),
}
for name, (params, stats, reference) in models.items():
    logits, _ = jax.jit(forward)(params, stats, png["x"][:16])
    error = float(np.max(np.abs(logits - outputs[name])))
    assert error < 1e-3, error
    print(f"{name}: logits within {error:.0e} of the reference")
    found = accuracy(params, stats, png["x"], png["y"])
    assert abs(found - 0.9) < 0.003, found
    print(f"  200 png test images    {found:.4f}, reference 0.9000")
    if not args.small:
        found = accuracy(params, stats, jpeg["x"], jpeg["y"])
        assert abs(found - reference) < 0.001, found
        print(f"  8,000 jpeg test images {found:.4f}, reference {reference:.4f}")
params, stats, _ = models["resnet20_cifar10_jpeg_adapted"]
x, y = (jpeg[key][: 200 if args.small else 2_000] for key in ("x", "y"))

# %% [markdown]
# ## One shot
#
# Magnitude, per layer and in the global scope, on the first test images. Convolutions
# and the linear layer take part, norms and biases do not: that is the default.

# %%
reference = {0.0: 0.8805, 0.3: 0.8695, 0.5: 0.8135, 0.6: 0.7355, 0.7: 0.5575, 0.8: 0.19}
if args.small:
    reference = {sparsity: reference[sparsity] for sparsity in (0.0, 0.5, 0.8)}
scopes = {"per layer": js.Unstructured(), "global": js.Unstructured(scope="global")}
curves = {name: [] for name in scopes}
results = Table(title=f"Accuracy after one-shot pruning, {len(x):,} jpeg test images")
for column in ("sparsity", *scopes, "reference per layer, 2,000 images"):
    results.add_column(column, justify="right")
for sparsity, known in reference.items():
    for name, pattern in scopes.items():
        pruned = js.prune(params, sparsity, pattern=pattern).params
        curves[name].append(accuracy(pruned, stats, x, y))
    now = curves["per layer"][-1]
    assert args.small or abs(now - known) < 0.003, (sparsity, now)
    cells = (f"{curves[name][-1]:.4f}" for name in scopes)
    results.add_row(f"{sparsity:.0%}", *cells, f"{known:.4f}")
rich.print(results)

# %% [markdown]
# ## 2 of every 4
#
# The groups run along the inputs, which the trace of the model finds: height x width x
# channels, channels fastest. The first convolution has 27 inputs, which 4 does not
# divide; all others have 144, 288, 576 or 64.

# %%
trace = js.trace(lambda params, x: forward(params, stats, x)[0], params, x[:1])
pattern = js.NM(keep=2, of=4)
try:
    js.prune(params, pattern=pattern, trace=trace)
except ValueError as error:
    print("All kernels:", error, sep="\n  ")
others = r"^(layer.*conv.|linear)\.weight$"
two_four = js.prune(params, pattern=pattern, where=others, trace=trace)
js.patterns.verify(
    two_four.masks, params, pattern=pattern, where=others, axes=trace.axes
)

# %% [markdown]
# ## Trained a little more
#
# `keep_sparse`, the last member of the chain, holds the masks. Images are shifted by up
# to 4 pixels and mirrored. A few hundred steps repair much, not all: papers train for
# many epochs, here it is less than one.

# %%
try:
    x_train, y_train = decode(jpeg_train, min(STEPS * BATCH, 20_000))
except ImportError:
    print("Without pillow: training on 4,000 png images, not on jpeg ones.")
    x_train, y_train = png_train["x"], png_train["y"]


def optimizer(masks) -> optax.GradientTransformation:
    decay = optax.cosine_decay_schedule(0.02, STEPS)
    sgd = optax.sgd(decay, momentum=0.9)
    return optax.chain(optax.add_decayed_weights(1e-4), sgd, js.keep_sparse(masks))


@jax.jit
def step(params, stats, opt_state, x, y):
    def loss_fn(params):
        logits, moved = forward(params, stats, x, train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return loss.mean(), moved

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    tx = optimizer(js.masks_of(opt_state))
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state, loss


def fine_tune(pruned: js.Pruned, name: str):
    params, moved, rng = pruned.params, stats, np.random.default_rng(0)
    opt_state = optimizer(pruned.masks).init(params)
    bar = js.report.progress(range(STEPS), description=name)
    for _ in bar:
        rows = rng.integers(0, len(x_train), BATCH)
        images = np.pad(x_train[rows], [(0, 0), (4, 4), (4, 4), (0, 0)])
        i, j = rng.integers(0, 9, 2)
        images = images[:, i : i + 32, j : j + 32]
        images[::2] = images[::2, :, ::-1]
        params, moved, opt_state, loss = step(
            params, moved, opt_state, images, y_train[rows].astype(np.int32)
        )
        bar.say(f"loss {loss:.3f}")
    js.assert_sparse(opt_state, params)
    return params, moved


# %%
starts = {
    "80 % per layer": js.prune(params, 0.8),
    "80 % global": js.prune(params, 0.8, pattern=scopes["global"]),
    "2:4": two_four,
}
results = Table(title=f"Accuracy on {len(x):,} jpeg test images")
for column in ("", "sparsity", "one-shot", f"after {STEPS} steps"):
    results.add_column(column, justify="right")
results.add_row("dense", "0.00%", f"{curves['global'][0]:.4f}", "")
tables, tuned = {}, {}
for name, pruned in starts.items():
    before = accuracy(pruned.params, stats, x, y)
    repaired, moved = fine_tune(pruned, name)
    tuned[name] = accuracy(repaired, moved, x, y)
    tables[name] = js.report.table(repaired, pruned.masks, title=name)
    reached = tables[name].pruned.reached
    results.add_row(name, f"{reached:.2%}", f"{before:.4f}", f"{tuned[name]:.4f}")
rich.print(results)

# %%
js.report.plot(tables, path=args.out / "layers.png")
percents = [100 * s for s in reference]
runs = {f"one-shot, {name}": (percents, curve) for name, curve in curves.items()}
runs["reference, per layer"] = (percents, list(reference.values()))
for name, value in tuned.items():
    at = 100 * tables[name].pruned.reached
    runs[f"{name}, {STEPS} steps more"] = ([at], [value])
js.report.plot_tradeoff(runs, xlabel="sparsity in %", path=args.out / "pretrained.png")
print(f"Wrote pretrained.png and layers.png to {args.out}")
