# %% [markdown]
# # A pretrained network on real images
#
# ResNet-20, trained by others on CIFAR-10, is pruned in one shot and then, at 80 %,
# trained a little more. The network is one function, in `_resnet.py`: it keeps the
# names of the file and turns the kernels into JAX's layout; running means and variances
# are not parameters. Weights and images are not part of jaxsparse: `_data.py` says
# where they are looked for.

# %%
import optax
from _common import arguments, show, show_curves
from _data import augmented
from _resnet import accuracy, forward, setting, sgd, training_loss
from _training import trainer

import jaxsparse as js

text, small = "Prune a pretrained ResNet-20.", "few images, few steps"
args = arguments(text, small=small, out="out/pretrained", needs_files=True)
IMAGES, STEPS, BATCH = (200, 6, 32) if args.small else (2_000, 150, 128)
SPARSITIES = (0.0, 0.5, 0.8) if args.small else (0.0, 0.3, 0.5, 0.6, 0.7, 0.8)
TRAIN = min(STEPS * BATCH, 20_000)
resnet = setting(test=IMAGES, train=TRAIN, skip_missing=args.skip_missing)
params, stats = resnet.params, resnet.stats
measure = lambda params, stats=stats: accuracy(params, stats, resnet.x, resnet.y)

# %% [markdown]
# By magnitude, per layer and in the global scope, on the first test images.
# Convolutions and the linear layer take part, norms and biases do not: that is the
# default.

# %%
scopes = {"per layer": js.Unstructured(), "global": js.Unstructured(scope="global")}
cuts = lambda p: [js.prune(params, s, pattern=p).params for s in SPARSITIES]
curves = {name: [*map(measure, cuts(pattern))] for name, pattern in scopes.items()}
title = f"Accuracy after one-shot pruning, {IMAGES:,} jpeg test images"
show_curves(title, SPARSITIES, curves, path=args.out / "pretrained.png")

# %% [markdown]
# 2 of every 4: the groups run along the inputs, which the trace of the model finds:
# height x width x channels, channels fastest. The first convolution has 27 inputs,
# which 4 does not divide; all others have 144, 288, 576 or 64.

# %%
apply_fn = lambda params, x: forward(params, stats, x)[0]
trace = js.trace(apply_fn, params, resnet.x[:1])
pattern, others = js.NM(keep=2, of=4), r"^(layer.*conv.|linear)\.weight$"
try:
    js.prune(params, pattern=pattern, trace=trace)
except ValueError as error:
    print("All kernels:", error, sep="\n  ")
two_four = js.prune(params, pattern=pattern, where=others, trace=trace)
masks, axes = two_four.masks, trace.axes
js.patterns.verify(masks, params, pattern=pattern, where=others, axes=axes)

# %% [markdown]
# A little training repairs much. `keep_sparse`, the last member of the chain, holds the
# masks, in its state: one compiled step serves all three networks.

# %%
starts = {f"80 % {n}": js.prune(params, 0.8, pattern=p) for n, p in scopes.items()}
optimizer = lambda masks: optax.chain(sgd(STEPS), js.keep_sparse(masks))
train = trainer(training_loss, optimizer(masks))
rows, tables = [("dense", "0.00%", f"{measure(params):.4f}", "")], {}
for name, cut in {**starts, "2:4": two_four}.items():
    how = {"state": stats, "opt_state": optimizer(cut.masks).init(cut.params)}
    images = augmented(resnet.x_train, resnet.y_train, BATCH)
    tuned, moved, opt_state = train(cut.params, images, STEPS, name=name, **how)
    js.assert_sparse(opt_state, tuned)
    tables[name] = js.report.table(tuned, cut.masks, title=name)
    found = f"{measure(cut.params):.4f}", f"{measure(tuned, moved):.4f}"
    rows.append((name, f"{tables[name].pruned.reached:.2%}", *found))
columns = ("", "sparsity", "one-shot", f"after {STEPS} steps")
show(f"Accuracy on {IMAGES:,} jpeg test images", columns, rows)
js.report.plot(tables, path=args.out / "layers.png")
