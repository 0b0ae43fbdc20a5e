"""Vision transformers for CIFAR-10 and for MNIST, as pure functions of their weights.

The files are `weights/vit_cifar10.npz` (811,146 parameters) and `weights/vit_mnist.npz`
(213,642); a network's names tell which of the two it is. Queries, keys and values come
from one matrix in both, in this order.

- CIFAR-10: patches of 4 x 4 pixels, 64 tokens, norms after each sum, ReLU;
- MNIST: patches of 7 x 7 pixels, 16 tokens, norms before each block, GELU.

    params = load(np.load("weights/vit_cifar10.npz"))
    logits = apply(params, images)  # uint8, [n, 32, 32, 3]
    accuracy(params, images, labels)
    grads = jax.grad(cross_entropy)(params, {"x": images, "y": labels})
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

HEADS = 8
Flat = dict[str, jax.Array]

# The matrices of the layers: neither embeddings nor the classifier.
MATRICES = r"(in_proj_|out_proj\.|linear\d\.|to_qkv\.|to_out\.|net\.\d\.)weight$"


def load(file: Mapping[str, np.ndarray]) -> Flat:
    """The parameters by the names of the file.

    Kernels are turned from torch's layout (out, in, height, width) into JAX's (height,
    width, in, out), matrices from (out, in) into (in, out).

    Args:
      file: what `np.load` gave.
    """
    params = {}
    for name in file:
        w = jnp.asarray(file[name])
        w = w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T if w.ndim == 2 else w
        params[name] = w
    return params


def apply(params: Flat, images: jax.Array | np.ndarray) -> jax.Array:
    """Logits (Dosovitskiy et al., 2020, arXiv:2010.11929).

    Args:
      params: from `load`, possibly pruned.
      images: 0 to 255, [n, 32, 32, 3] or [n, 28, 28].

    Returns:
      float32 [n, 10].
    """
    network = _cifar10 if "patch_embed.proj.weight" in params else _mnist
    return network(params, jnp.asarray(images) / 255.0)


def layers(params: Flat) -> int:
    """How many layers there are: 6 in both."""
    at = {name.split(".")[2] for name in params if name.startswith("transformer.")}
    return len(at)


def _cifar10(p: Flat, x: jax.Array) -> jax.Array:
    mean, sd = jnp.array([0.4914, 0.4822, 0.4465]), jnp.array([0.2023, 0.1994, 0.2010])
    x = jax.lax.conv_general_dilated(
        (x - mean) / sd,
        p["patch_embed.proj.weight"],
        (4, 4),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = x + p["patch_embed.proj.bias"]
    x = _tokens(p, x.reshape(len(x), 64, -1), p["pos_embed"])
    for i in range(layers(p)):
        at = f"transformer.layers.{i}"
        qkv = (
            x @ p[f"{at}.self_attn.in_proj_weight"] + p[f"{at}.self_attn.in_proj_bias"]
        )
        y = _attend(qkv, scale=(x.shape[-1] // HEADS) ** -0.5)
        x = _norm(p, f"{at}.norm1", x + _dense(p, f"{at}.self_attn.out_proj", y))
        y = jax.nn.relu(_dense(p, f"{at}.linear1", x))
        x = _norm(p, f"{at}.norm2", x + _dense(p, f"{at}.linear2", y))
    return _dense(p, "mlp_head.1", _norm(p, "mlp_head.0", x[:, 0]))


def _mnist(p: Flat, x: jax.Array) -> jax.Array:
    x = ((x - 0.1307) / 0.3081).reshape(-1, 4, 7, 4, 7)
    x = x.transpose(0, 1, 3, 2, 4).reshape(-1, 16, 49)
    x = _tokens(p, _dense(p, "patch_to_embedding", x), p["pos_embedding"])
    gelu = lambda x: jax.nn.gelu(x, approximate=False)
    for i in range(layers(p)):
        at = f"transformer.layers.{i}"
        y = _norm(p, f"{at}.0.fn.norm", x) @ p[f"{at}.0.fn.fn.to_qkv.weight"]
        y = _attend(y, scale=x.shape[-1] ** -0.5)  # all of it, not that of a head
        x = x + _dense(p, f"{at}.0.fn.fn.to_out", y)
        y = _dense(p, f"{at}.1.fn.fn.net.0", _norm(p, f"{at}.1.fn.norm", x))
        x = x + _dense(p, f"{at}.1.fn.fn.net.2", gelu(y))
    return _dense(p, "mlp_head.2", gelu(_dense(p, "mlp_head.0", x[:, 0])))


def _tokens(p: Flat, patches: jax.Array, positions: jax.Array) -> jax.Array:
    """The class token, which the classifier reads at the end, comes first."""
    first = jnp.broadcast_to(p["cls_token"], (len(patches), 1, patches.shape[-1]))
    return jnp.concatenate([first, patches], axis=1) + positions


def _attend(qkv: jax.Array, *, scale: float) -> jax.Array:
    n, length, width = qkv.shape
    query, key, value = jnp.moveaxis(qkv.reshape(n, length, 3, HEADS, -1), 2, 0)
    weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", query, key) * scale)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, value).reshape(n, length, width // 3)


def _dense(p: Flat, at: str, x: jax.Array) -> jax.Array:
    return x @ p[f"{at}.weight"] + p[f"{at}.bias"]


def _norm(p: Flat, at: str, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
    return x * p[f"{at}.weight"] + p[f"{at}.bias"]


def cross_entropy(params: Flat, batch: Mapping) -> jax.Array:
    """The loss of a batch `{"x": images, "y": labels}`: a mean over examples."""
    labels = jnp.asarray(batch["y"], jnp.int32)
    found = apply(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()


@jax.jit
def predict(params: Flat, images: jax.Array | np.ndarray) -> jax.Array:
    """The classes [n]."""
    return jnp.argmax(apply(params, images), axis=-1)


def accuracy(params: Flat, x: np.ndarray, y: np.ndarray, *, size: int = 200) -> float:
    """The fraction of images whose class is found, `size` images at a time."""
    found = [predict(params, x[i : i + size]) for i in range(0, len(x), size)]
    return float(np.mean(np.concatenate(found) == y))
