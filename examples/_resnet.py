"""ResNets for CIFAR-10 (20, 32 or 56 layers) as pure functions of loaded weights.

The files are those of `weights/resnet*_cifar10*.npz`: torch's names and layouts. Two
families are among them, and a network's names tell which it is of:

- `linear` as classifier: stride-2 shortcuts without weights (channels padded with
  zeros), images normalised by the mean and deviation of ImageNet;
- `fc` as classifier, the network of the M-FAC paper (Frantar et al., 2021,
  arXiv:2107.03356): shortcuts of a 1 x 1 convolution and a norm (`downsample`), images
  scaled to [-1, 1].

    params, stats = load(np.load("weights/resnet20_cifar10.npz"))
    logits, _ = forward(params, stats, images)  # uint8, [n, 32, 32, 3]
    accuracy(params, stats, images, labels)
    grads = jax.grad(cross_entropy(stats))(params, {"x": images, "y": labels})
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import _training
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import decode, find
from _training import trainer

Flat = dict[str, jax.Array]


def load(file: Mapping[str, np.ndarray]) -> tuple[Flat, Flat]:
    """The parameters, and the running statistics of the norms, which are none.

    The names stay those of the file; kernels are turned from torch's layout (out, in,
    height, width) into JAX's (height, width, in, out), matrices into (in, out).

    Args:
      file: what `np.load` gave.

    Returns:
      Two dictionaries from names to arrays.
    """
    params, stats = {}, {}
    for name in file:
        w = jnp.asarray(file[name])
        w = w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T if w.ndim == 2 else w
        (stats if "running" in name else params)[name] = w
    return params, stats


def forward(
    params: Flat, stats: Flat, images: jax.Array | np.ndarray, *, train: bool = False
) -> tuple[jax.Array, Flat]:
    """Logits, and the statistics with those of this batch mixed in if it trains.

    Args:
      params: from `load`, possibly pruned.
      stats: from `load`.
      images: [n, 32, 32, 3], 0 to 255.
      train: normalise by the batch and not by `stats`.

    Returns:
      Logits [n, 10], and `stats`, moved by a tenth towards the batch if `train`.
    """
    moved = dict(stats)

    def conv_norm(x, layer, norm, stride=1):
        kernel = params[f"{layer}.weight"]
        side = kernel.shape[0] // 2
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((side, side), (side, side)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        mean, var = stats[f"{norm}.running_mean"], stats[f"{norm}.running_var"]
        if train:
            now = x.mean((0, 1, 2)), x.var((0, 1, 2))
            moved[f"{norm}.running_mean"] = 0.9 * mean + 0.1 * now[0]
            moved[f"{norm}.running_var"] = 0.9 * var + 0.1 * now[1]
            mean, var = now
        x = (x - mean) * jax.lax.rsqrt(var + 1e-5)
        return x * params[f"{norm}.weight"] + params[f"{norm}.bias"]

    def shortcut(x, at):
        if f"{at}.downsample.0.weight" in params:
            return conv_norm(x, f"{at}.downsample.0", f"{at}.downsample.1", 2)
        side = x.shape[-1] // 2  # no weights: the new channels are 0
        return jnp.pad(x[:, ::2, ::2], [(0, 0)] * 3 + [(side, side)])

    x = jax.nn.relu(conv_norm(normalise(params, images), "conv1", "bn1"))
    for stage in (1, 2, 3):
        for block in range(blocks(params)):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = jax.nn.relu(conv_norm(x, f"{at}.conv1", f"{at}.bn1", stride))
            y = conv_norm(y, f"{at}.conv2", f"{at}.bn2")
            x = jax.nn.relu((shortcut(x, at) if stride == 2 else x) + y)
    last = "fc" if "fc.weight" in params else "linear"
    return x.mean((1, 2)) @ params[f"{last}.weight"] + params[f"{last}.bias"], moved


def normalise(params: Flat, images: jax.Array | np.ndarray) -> jax.Array:
    """Images as this network had them when it was trained."""
    x = jnp.asarray(images) / 255.0
    if "fc.weight" in params:
        return (x - 0.5) / 0.5
    return (x - jnp.array([0.485, 0.456, 0.406])) / jnp.array([0.229, 0.224, 0.225])


def blocks(params: Flat) -> int:
    """How many blocks a stage has: 3, 5 and 9 in ResNet-20, -32 and -56."""
    return sum(f"layer1.{i}.conv1.weight" in params for i in range(len(params)))


def cross_entropy(stats: Flat) -> Callable[[Flat, Mapping], jax.Array]:
    """The loss whose gradients a Fisher matrix is made of.

    The norms use `stats` and not the batch, so examples do not meet: the gradient of a
    batch is the mean of the gradients of its examples.

    Args:
      stats: from `load`.

    Returns:
      A function of `params` and a batch `{"x": images, "y": labels}` (the names in the
      files of images): the mean cross entropy, a scalar.
    """

    def loss_fn(params: Flat, batch: Mapping) -> jax.Array:
        logits, _ = forward(params, stats, batch["x"])
        labels = jnp.asarray(batch["y"], jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn


@jax.jit
def predict(params: Flat, stats: Flat, images: jax.Array | np.ndarray) -> jax.Array:
    """The classes [n]."""
    return jnp.argmax(forward(params, stats, images)[0], axis=-1)


def accuracy(
    params: Flat, stats: Flat, x: np.ndarray, y: np.ndarray, *, size: int = 200
) -> float:
    """The fraction of images whose class is found, `size` images at a time."""
    starts = range(0, len(x), size)
    found = [predict(params, stats, x[i : i + size]) for i in starts]
    return float(np.mean(np.concatenate(found) == y))


def hits(apply_fn: Callable, variables: Any, x: np.ndarray, y: np.ndarray) -> float:
    """The same of any function of variables and images that gives logits."""
    run = jax.jit(lambda v, images: jnp.argmax(apply_fn(v, images), -1))
    found = [run(variables, x[i : i + 200]) for i in range(0, len(x), 200)]
    return float(np.mean(np.concatenate(found) == y))


# What the examples share


class Setting(NamedTuple):
    """A pretrained ResNet-20, images to test it, and images to train it."""

    params: Flat
    stats: Flat
    x: np.ndarray
    y: np.ndarray
    x_train: np.ndarray
    y_train: np.ndarray


def setting(*, test: int, train: int | None, skip_missing: bool = False) -> Setting:
    """The network that was adapted to jpeg images, and such images.

    Args:
      test: how many test images.
      train: how many jpeg images to train with, 4,000 png ones if it is None or pillow
        is missing.
      skip_missing: leave with exit code 0 and not with 2 where a file is missing.
    """
    names = ["weights/resnet20_cifar10_jpeg_adapted.npz"]
    names += [f"images/cifar10_{n}.npz" for n in ("jpeg_test8k", "png_train4k")]
    names += ["images/cifar10_jpeg_train.npz"] if train else []
    weights, images, png, *jpeg = map(np.load, find(*names, skip_missing=skip_missing))
    trained = png["x"], png["y"]
    try:
        trained = decode(jpeg[0], train) if jpeg and train else trained
    except ImportError:
        print("Without pillow: 4,000 png images to train with, not jpeg ones.")
    return Setting(*load(weights), images["x"][:test], images["y"][:test], *trained)


def batches(x: np.ndarray, y: np.ndarray, size: int = 64) -> Iterator[dict]:
    """Random batches without end, as `cross_entropy` takes them."""
    rng = np.random.default_rng(0)
    while True:
        rows = rng.integers(0, len(x), size)
        yield {"x": x[rows], "y": y[rows].astype(np.int32)}


def training_loss(params: Flat, stats: Flat, batch: tuple) -> tuple[jax.Array, Flat]:
    """The mean cross entropy by the batch's statistics, and the moved statistics."""
    logits, moved = forward(params, stats, batch[0], train=True)
    return _training.cross_entropy(logits, batch[1]), moved


def sgd(steps: int) -> optax.GradientTransformation:
    """The optimizer that trains it a little more."""
    rate = optax.cosine_decay_schedule(0.02, steps)
    return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, momentum=0.9))


def tune(apply_fn: Callable, variables: Any, images: Iterator, steps: int) -> Any:
    """Trains variables for a function that gives logits and moved statistics.

    Args:
      apply_fn: of variables `{"params": ..., "stats": ...}` and images.
      variables: where to start.
      images: batches of images and labels.
      steps: how many.
    """

    def loss_fn(params, stats, batch):
        logits, moved = apply_fn({"params": params, "stats": stats}, batch[0])
        return _training.cross_entropy(logits, batch[1]), moved

    fit, start = trainer(loss_fn, sgd(steps)), variables["stats"]
    found = fit(variables["params"], images, steps, state=start)
    return {"params": found.params, "stats": found.state}


def milliseconds(
    networks: Sequence[tuple[Callable, Any]], images: np.ndarray, *, turns: int
) -> np.ndarray:
    """The median times of a batch of images, compiled; all networks in turn.

    Args:
      networks: functions of variables and images, and the variables.
      images: one batch.
      turns: the first one compiles, and is left out.
    """
    runs = [(jax.jit(apply_fn), variables) for apply_fn, variables in networks]
    times = np.zeros((turns, len(runs)))
    for turn in times:
        for i, (run, variables) in enumerate(runs):
            start = time.perf_counter()
            run(variables, images).block_until_ready()
            turn[i] = 1e3 * (time.perf_counter() - start)
    return np.median(times[1:], axis=0)
