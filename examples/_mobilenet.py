"""MobileNet (version 1, a quarter wide): is there a person in the picture?

The file is `weights/vww96_mobilenetv1_025_keras.npz`, the reference network of MLPerf
Tiny's visual wake words (Apache-2.0). Each of its 13 blocks is a depthwise convolution,
where every channel has a filter of its own, and a pointwise one, a matrix.

    params, stats = load(np.load("weights/vww96_mobilenetv1_025_keras.npz"))
    logits = apply(params, stats, images)  # uint8, [n, 96, 96, 3]
    accuracy(params, stats, images, labels)
    grads = jax.grad(cross_entropy(stats))(params, {"x": images, "y": labels})
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)  # of the depthwise convolutions
POINTWISE = r"^conv2d_\d+/kernel$"
DEPTHWISE = r"^depthwise_conv2d(_\d+)?/depthwise_kernel$"
Flat = dict[str, jax.Array]


def load(file: Mapping[str, np.ndarray]) -> tuple[Flat, Flat]:
    """The parameters, and the moving statistics of the norms, which are none.

    Names and layouts stay those of the file, (height, width, in, out) and (in, out),
    but for depthwise kernels: they are turned from keras's (height, width, channels, 1)
    into JAX's (height, width, 1, channels).

    Args:
      file: what `np.load` gave.

    Returns:
      Two dictionaries from names to arrays.
    """
    params, stats = {}, {}
    for name in file:
        w = jnp.asarray(file[name])
        w = w.swapaxes(2, 3) if name.endswith("depthwise_kernel") else w
        (stats if "moving" in name else params)[name] = w
    return params, stats


def apply(params: Flat, stats: Flat, images: jax.Array | np.ndarray) -> jax.Array:
    """Logits (Howard et al., 2017, arXiv:1704.04861).

    Args:
      params: from `load`, possibly pruned.
      stats: from `load`.
      images: [n, 96, 96, 3], 0 to 255.

    Returns:
      float32 [n, 2]: nobody, somebody.
    """

    def conv(x, layer, norm, stride=1, kernel="kernel"):
        w = params[f"{layer}/{kernel}"]
        x = jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            "SAME",  # as TensorFlow's: an even size at stride 2 is padded at its end
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1] // w.shape[2],  # 1, or each channel alone
        )
        at = _numbered("batch_normalization", norm)
        x = x + params[f"{layer}/bias"] - stats[f"{at}/moving_mean"]
        x = x * jax.lax.rsqrt(stats[f"{at}/moving_variance"] + 1e-3)
        return jax.nn.relu(x * params[f"{at}/gamma"] + params[f"{at}/beta"])

    x = conv(jnp.asarray(images) / 255.0, "conv2d", 0, stride=2)
    for i, stride in enumerate(STRIDES):
        layer = _numbered("depthwise_conv2d", i)
        x = conv(x, layer, 2 * i + 1, stride, "depthwise_kernel")
        x = conv(x, f"conv2d_{i + 1}", 2 * i + 2)
    return x.mean((1, 2)) @ params["dense/kernel"] + params["dense/bias"]


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


def cross_entropy(stats: Flat) -> Callable[[Flat, Mapping], jax.Array]:
    """The loss of a batch `{"x": images, "y": labels}`: a mean over examples.

    The norms use `stats` and not the batch, so examples do not meet.
    """

    def loss_fn(params: Flat, batch: Mapping) -> jax.Array:
        labels = jnp.asarray(batch["y"], jnp.int32)
        found = apply(params, stats, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

    return loss_fn


@jax.jit
def predict(params: Flat, stats: Flat, images: jax.Array | np.ndarray) -> jax.Array:
    """The classes [n]."""
    return jnp.argmax(apply(params, stats, images), axis=-1)


def accuracy(
    params: Flat, stats: Flat, x: np.ndarray, y: np.ndarray, *, size: int = 100
) -> float:
    """The fraction of images whose class is found, `size` images at a time."""
    starts = range(0, len(x), size)
    found = [predict(params, stats, x[i : i + size]) for i in starts]
    return float(np.mean(np.concatenate(found) == y))
