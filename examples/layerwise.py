# %% [markdown]
# # A language model pruned layer by layer
#
# A small Llama (260,032 parameters, trained on TinyStories) loses half of the weights
# of its layers, in one pass over a few stories and without any training. At each kernel
# the pass stops: what arrives there, through the kernels that were pruned before it,
# says how the weights that stay make up for those that go. Weights and texts are not
# part of jaxsparse: `_data.py` says where they are looked for.

# %%
import jax.numpy as jnp
import numpy as np
from _common import arguments, show
from _data import find
from _pictures import draw_errors
from _stories import MATRICES, load, logits, perplexity, windows

import jaxsparse as js

small = "one layer, few stories"
args = arguments("Layer by layer.", small=small, out="out/layerwise", needs_files=True)
names = ("weights/stories260K.npz", "text/tinystories_dev_tok512.npz")
weights, texts = map(np.load, find(*names, skip_missing=args.skip_missing))
params = load(weights)
COUNT, SIZE, LAST = (8, 8, 1720) if args.small else (128, 16, 2015)
WHERE = r"^layers/4/.*/w[123qkvo]/weight$" if args.small else MATRICES
calibration = windows(texts, 0, 1715)[:COUNT, :-1]
batches = [jnp.asarray(calibration[i : i + SIZE]) for i in range(0, COUNT, SIZE)]
dev = windows(texts, 1716, LAST)
print(f"dense: perplexity {perplexity(params, dev):.3f}")

# %% [markdown]
# The trace says what the model does with its parameters; nothing is computed for that,
# and nothing depends on names. These kernels are read as `x @ w.T`, so their inputs are
# the last axis. `wq`, `wk` and `wv` read the same numbers.

# %%
trace = js.trace(logits, params, batches[0])
print("\n".join(str(trace).splitlines()[:8]))
assert trace.kernels["layers/0/attention/wk/weight"].input.endswith("wq/weight")

# %% [markdown]
# Magnitude and Wanda only choose; SparseGPT goes column by column and corrects what
# follows; ALPS looks for the weights that stay by ADMM and then finds their best
# values.

# %%
SOLVERS = {
    "magnitude": (js.solvers.magnitude, js.Unstructured()),
    "wanda": (js.solvers.wanda, js.Unstructured(scope="output")),
    "sparsegpt": (js.solvers.sparsegpt, js.Unstructured()),
    "alps": (js.solvers.alps, js.Unstructured()),
}
rows, errors = [], {}
for name in ("magnitude", "sparsegpt") if args.small else SOLVERS:
    solver, pattern = SOLVERS[name]
    how = {"solver": solver, "pattern": pattern, "where": WHERE, "show": False}
    pruned = js.oneshot.layerwise(logits, params, batches, sparsity=0.5, **how)
    errors[name] = [float(info.relative_error) for info in pruned.info.values()]
    found = f"{perplexity(pruned.params, dev):.3f}", f"{np.mean(errors[name]):.4f}"
    rows.append((name, *found))
columns = ("solver", "perplexity", "mean relative error of a kernel")
show("half of the weights pruned", columns, rows)
print(js.report.layer_table(pruned.info))
draw_errors(errors, args.out / "errors.png")
