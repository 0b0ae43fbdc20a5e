"""Which parameters pruning leaves alone by default, judged by their names.

Names are all there is without a trace of the model. Those of the common families are
known: flax's, Keras', Haiku's, Equinox's, MaxText's, torch's and Hugging Face's.
"""

import re
from typing import Any

import jax.numpy as jnp

# Words of a name are what `_` or a change of case separates: `WordEmbed_0` has the
# words word and embed. Of a parameter's own name the last one tells what it is:
_VECTORS = {
    **dict.fromkeys(("bias", "beta"), "a bias"),
    **dict.fromkeys(("scale", "norm", "ln", "gamma", "g"), "a scale"),
    "alpha": "a slope",
}
_TABLES = {"emb", "embed", "embedder", "embedding", "wte", "wpe"}
_POSITIONS = {"pos", "position", "positional", "pe", "freqs"}
_TOKENS = {"cls", "token", "probe", "prompt", "latent"}
# These say no more than that it is the weight of a module, whose name counts then.
_PLAIN = {"weight", "kernel", "w", "value", "table"}
_NORMS = {"norm", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "normalization"}
_NORMS |= {"ln", "bn", "gn"}
# Modules that look indices up, though their last word is another one.
_LOOKUP = re.compile(r"^(embed_(token|position|in)|shared)$")
_PLURAL = re.compile(
    r"^(emb|embed|embedding|token|position|prompt|latent|norm|scale|weight|kernel)s$"
)


def default_where(path: str, leaf: Any) -> bool:
    """Select kernels: floating arrays of two or more axes, but no embeddings.

    Biases, norms, embeddings, positions, class tokens and LoRA factors stay dense, as
    in the recipes of the papers (Kurtic et al., 2022), also where they have two axes
    (an attention bias is `(heads, head_dim)`, an embedding `(vocabulary, features)`).
    It decides by names; see `why_dense`. With a trace of the model, as
    `jaxsparse.oneshot.layerwise` has it, use decides.

    Args:
      path: the parameter's path as text.
      leaf: the parameter; only its shape and dtype are read.

    Returns:
      Whether the parameter takes part.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.tree.default_where("dense/kernel", jnp.ones((3, 4)))
      True
      >>> js.tree.default_where("embed_tokens/weight", jnp.ones((3, 4)))
      False
    """
    return why_dense(path, leaf) is None


def why_dense(path: str, leaf: Any) -> str | None:
    """Return why the default selection leaves a parameter dense.

    Args:
      path: the parameter's path as text.
      leaf: the parameter; only its shape and dtype are read. A leaf without a shape
        counts as having fewer than two axes.

    Returns:
      A few words, such as "an embedding"; None for a parameter that takes part.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> js.tree.why_dense("wte/weight", jnp.ones((3, 4)))
      'an embedding'
      >>> js.tree.why_dense("encoder/cls_token", jnp.ones((1, 1, 4)))
      'a token'
    """
    _check_path(path)
    if not hasattr(leaf, "ndim") or leaf.ndim < 2:
        return "fewer than two axes"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return "not of floating point"
    *modules, own = [_words(part) for part in path.split("/")]
    if any("lora" in words for words in (*modules, own)):
        return "a LoRA factor"
    if has_plain_name(path):
        names = [words for words in modules if words]  # lists have no names
        return _module(names[-1], leaf.ndim) if names else None
    return _leaf(own)


def has_plain_name(path: str) -> bool:
    """Return whether a parameter is called `weight`, `kernel` or the like.

    Args:
      path: its path.

    Returns:
      Whether only its module's name says what it is.

    Example:
      >>> import jaxsparse as js
      >>> js.tree.has_plain_name("wte/weight"), js.tree.has_plain_name("cls_token")
      (True, False)
    """
    _check_path(path)
    own = _words(path.rsplit("/", 1)[-1])
    return len(own) == 1 and own[0] in _PLAIN


def _check_path(path: str) -> None:
    if not isinstance(path, str):
        raise TypeError(f"path must be text, such as 'up/kernel'; got {path!r}.")


def _leaf(own: list[str]) -> str | None:
    """By a parameter's own name."""
    if own[-1:] == ["table"] or own[-1:] == ["weight"]:
        own = own[:-1]  # in_proj_weight, relative_position_bias_table
    if not own:
        return None
    if _POSITIONS & set(own):
        return "a position"
    if own[-1] in _VECTORS or own[0] == "bias":  # bias_ih_l0
        return _VECTORS.get(own[-1], "a bias")
    if own[-1] in _TABLES:
        return "an embedding"
    return "a token" if own[-1] == "token" or set(own) <= _TOKENS else None


def _module(words: list[str], ndim: int) -> str | None:
    """By the name of the module whose weight it is."""
    last = words[-1]
    if last in _NORMS or words[0] in _NORMS:
        return "a scale"
    if last == "bias" or (last in _POSITIONS and len(words) == 1):
        return "a position"  # relative_attention_bias
    # Kernels of four axes and more embed patches: they are convolutions.
    table = last in _TABLES or _LOOKUP.search("_".join(words))
    return "an embedding" if table and ndim < 4 else None


def _words(name: str) -> list[str]:
    """The words of a name in lower case, in the singular, without counters."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    words = (re.sub(r"\d+$", "", word) for word in re.split(r"[_.\-~]+", name))
    return [_PLURAL.sub(r"\1", word) for word in words if word]
