"""stories260K, a small language model of LLaMA's architecture, as pure functions.

The file is `weights/stories260K.npz`: 260,032 parameters that A. Karpathy trained on
TinyStories (llama2.c, MIT). Names and layouts stay those of the file: matrices are
(out, in), so whoever needs their axes has to be told
(`js.Axes(input=(1,), output=(0,))`).

    params = load(np.load("weights/stories260K.npz"))
    stories = windows(np.load("text/tinystories_dev_tok512.npz"), 1716, 2015)
    perplexity(params, stories)  # 4.923

The same network once more, with its layers stacked along axis 0 and run by a scan, as
large models are written: `load_stacked` and `logits_scanned`.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

HEADS, KV_HEADS, EPSILON, THETA = 8, 4, 1e-5, 1e4
Params = dict
File = Mapping[str, np.ndarray]  # what `np.load` gave

# The seven matrices of each layer, in a nested dictionary as in a stacked one.
MATRICES = r"^layers/.*/w[123qkvo]/weight$"


# Weights


def load(file: File) -> Params:
    """The parameters as a nested dictionary.

    Paths are the names of the file with slashes for dots, for instance
    `layers/0/attention/wq/weight` (out, in).
    """
    params: Params = {}
    for name in file:
        at, *names = name.split(".")
        node = params
        for below in names:
            node, at = node.setdefault(at, {}), below
        node[at] = jnp.asarray(file[name])
    return params


def load_stacked(file: File) -> Params:
    """The parameters, layers as one: `layers/attention/wq/weight` is [5, out, in]."""
    params = load(file)
    layers = [params["layers"][str(i)] for i in range(len(params["layers"]))]
    return {**params, "layers": jax.tree.map(lambda *w: jnp.stack(w), *layers)}


# The network


def logits(params: Params, tokens: jax.Array) -> jax.Array:
    """What comes after each token.

    LLaMA (Touvron et al., 2023, arXiv:2302.13971): norms before each block, without
    means; rotary positions; SwiGLU; two query heads share a key and a value head; the
    embedding is the last layer too.

    Args:
      params: from `load`, possibly pruned.
      tokens: int [..., length], at most 512 long.

    Returns:
      float32 [..., length, 512].
    """
    x = params["tok_embeddings"]["weight"][tokens]
    for i in range(len(params["layers"])):
        x = block(params["layers"][str(i)], x)
    return _last(params, x)


def logits_scanned(params: Params, tokens: jax.Array) -> jax.Array:
    """The same of `load_stacked`'s parameters: one layer is compiled, not five."""
    x = params["tok_embeddings"]["weight"][tokens]
    x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, params["layers"])
    return _last(params, x)


def block(layer: Params, x: jax.Array) -> jax.Array:
    """One layer, from hidden states [..., length, 64] to the next ones."""
    x = x + _attend(layer["attention"], _norm(layer["attention_norm"], x))
    y, p = _norm(layer["ffn_norm"], x), layer["feed_forward"]
    return x + _linear(p["w2"], jax.nn.silu(_linear(p["w1"], y)) * _linear(p["w3"], y))


def _attend(p: Params, x: jax.Array) -> jax.Array:
    *batch, length, width = x.shape
    split = lambda name: _linear(p[name], x).reshape(*batch, length, KV_HEADS, -1, size)
    size = width // HEADS
    query, key, value = _turn(split("wq")), _turn(split("wk")), split("wv")
    # s: the query heads that share the key and value head h
    found = jnp.einsum("...qhsd,...khtd->...hsqk", query, key) * size**-0.5
    past = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(past, found, -jnp.inf))
    x = jnp.einsum("...hsqk,...khtd->...qhsd", weights, value)
    return _linear(p["wo"], x.reshape(*batch, length, width))


def _turn(x: jax.Array) -> jax.Array:
    """Rotates the pairs (0, 1), (2, 3), ... of [..., length, heads, share, size]."""
    length, size = x.shape[-4], x.shape[-1]
    angles = np.outer(np.arange(length), THETA ** -(np.arange(0, size, 2) / size))
    angles = angles[:, None, None]
    cos, sin = (jnp.asarray(f(angles), x.dtype) for f in (np.cos, np.sin))
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = (even * cos - odd * sin, even * sin + odd * cos)
    return jnp.stack(pairs, -1).reshape(x.shape)


def _linear(p: Params, x: jax.Array) -> jax.Array:
    return x @ p["weight"].T


def _norm(p: Params, x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + EPSILON) * p["weight"]


def _last(params: Params, x: jax.Array) -> jax.Array:
    return _linear(params["tok_embeddings"], _norm(params["norm"], x))


# Stories


def windows(
    data: File, first_story: int, last_story: int, length: int = 512
) -> np.ndarray:
    """Some stories one after another, cut into pieces that do not overlap.

    Args:
      data: what `np.load` gave for `text/tinystories_dev_tok512.npz`. Each story
        begins with a token of its own.
      first_story: from 0 to 2015.
      last_story: this one is taken too.
      length: of the pieces' inputs.

    Returns:
      int32 [n, length + 1]: each piece with the first token of the next one, which is
      its last target. What is left at the end is dropped.
    """
    cuts = data["offsets"]
    ids = data["ids"][cuts[first_story] : cuts[last_story + 1]].astype(np.int32)
    starts = range(0, len(ids) - length, length)
    return np.stack([ids[i : i + length + 1] for i in starts])


def cross_entropy(params: Params, batch: jax.Array, *, apply=logits) -> jax.Array:
    """The loss: the mean over all tokens of pieces [n, length + 1], in nats."""
    found = apply(params, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(found, batch[:, 1:]).mean()


_cross_entropy = jax.jit(cross_entropy, static_argnames="apply")


def perplexity(
    params: Params, windows: np.ndarray, batch: int = 8, *, apply: Callable = logits
) -> float:
    """The perplexity, `exp` of the mean cross entropy over all tokens.

    Args:
      params: from `load`, possibly pruned.
      windows: from `windows`.
      batch: pieces at a time.
      apply: `logits_scanned` for parameters of `load_stacked`.
    """
    parts = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    losses = [_cross_entropy(params, part, apply=apply) for part in parts]
    return math.exp(np.average(losses, weights=[len(part) for part in parts]))
