"""Small models of many styles, each a pure function of its parameters.

Each entry gives `(apply_fn, params, inputs)` in float64. None is written for pruning.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
Dense = functools.partial(nn.Dense, **F64)
Conv = functools.partial(nn.Conv, **F64)
BatchNorm = functools.partial(nn.BatchNorm, use_running_average=True, **F64)
LayerNorm = functools.partial(nn.LayerNorm, **F64)


def array(*shape, seed=0):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape))


def filled(tree, seed=1):
    """Random numbers in place of all, so that nothing is zero or one by chance."""
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten(tree)
    fill = lambda x: jax.device_put(rng.normal(size=x.shape) * 0.5)
    return jax.tree.unflatten(treedef, [fill(x) for x in leaves])


def of_shapes(**shapes):
    """Parameters of these shapes, in dictionaries of any depth."""
    leaf = lambda s: isinstance(s, tuple)
    return filled(jax.tree.map(np.zeros, shapes, is_leaf=leaf))


def loosely(function):
    """As flax expects to be run: it mixes types and ranks."""

    def run(*args):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args)

    return run


def linen(module, *inputs):
    init = loosely(lambda *xs: module.init(jax.random.key(0), *xs))
    variables = jax.eval_shape(init, *inputs)
    rest = {k: v for k, v in variables.items() if k != "params"}
    # Running variances must be positive.
    rest = jax.tree.map(lambda x: abs(x) + 0.5, filled(rest))
    apply_fn = lambda params, *xs: module.apply({"params": params, **rest}, *xs)
    return loosely(apply_fn), filled(variables["params"]), inputs


class Net(nn.Module):
    """A model of one function of the module and its input."""

    body: object

    @nn.compact
    def __call__(self, *xs):
        return self.body(*xs)


def net(body, *inputs):
    return linen(Net(body), *inputs)


def mlp():
    def body(x):
        return Dense(5)(nn.relu(Dense(12)(nn.gelu(Dense(16)(x)))))

    return net(body, array(3, 6))


def residual():
    def body(x):
        x = nn.relu(BatchNorm()(Conv(8, (3, 3))(x)))
        for width, stride in ((8, 1), (12, 2)):
            y = nn.relu(BatchNorm()(Conv(6, (3, 3), strides=stride)(x)))
            y = BatchNorm()(Conv(width, (3, 3))(y))
            if stride > 1:
                x = BatchNorm()(Conv(width, (1, 1), strides=stride)(x))
            x = nn.relu(x + y)
        return Dense(4)(x.mean((1, 2)))

    return net(body, array(2, 8, 8, 3))


def depthwise():
    def body(x):
        x = jnp.clip(BatchNorm()(Conv(6, (3, 3))(x)), 0, 6)
        x = nn.relu6(BatchNorm()(Conv(6, (3, 3), feature_group_count=6)(x)))
        x = nn.relu6(BatchNorm()(Conv(12, (3, 3), feature_group_count=6)(x)))
        return Dense(4)(nn.relu(Conv(8, (1, 1))(x)).mean((1, 2)))

    return net(body, array(2, 6, 6, 3))


def padded():
    """A shortcut without weights: its new channels are zeros."""

    def body(x):
        x = nn.relu(BatchNorm()(Conv(4, (3, 3))(x)))
        y = nn.relu(BatchNorm()(Conv(6, (3, 3), strides=2)(x)))
        y = BatchNorm()(Conv(10, (3, 3))(y))
        x = nn.relu(y + jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (4, 2))))
        return Dense(4)(x.mean((1, 2)))

    return net(body, array(2, 8, 8, 3))


def grouped():
    def body(x):
        x = nn.relu(Conv(16, (3, 3))(x))
        x = nn.GroupNorm(4, **F64)(Conv(24, (3, 3), feature_group_count=8)(x))
        return Dense(4)(nn.relu(x).mean((1, 2)))

    return net(body, array(2, 6, 6, 3))


def dense_concat():
    def body(x):
        x = Conv(6, (3, 3))(x)
        for _ in range(2):
            y = Conv(4, (3, 3))(nn.relu(BatchNorm()(x)))
            x = jnp.concatenate([x, y], -1)
        x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
        return Dense(4)(x.reshape(x.shape[0], -1))

    return net(body, array(2, 4, 4, 3))


def squeeze_excite():
    def body(x):
        x = nn.swish(Conv(8, (3, 3))(x))
        gate = nn.sigmoid(Dense(8)(nn.relu(Dense(4)(x.mean((1, 2))))))
        x = x * gate[:, None, None]
        x = nn.ConvTranspose(6, (2, 2), strides=(2, 2), **F64)(x)
        a, b = jnp.split(x, 2, -1)
        return Dense(4)(nn.hard_swish(jnp.concatenate([b, a], -1)).mean((1, 2)))

    return net(body, array(2, 4, 4, 3))


def heads(x, count):
    return x.reshape(*x.shape[:-1], count, -1)


def attend(q, k, v):
    """[..., T, H, d] with as many or fewer heads of keys and values."""
    if q.shape[-2] != k.shape[-2]:
        q = q.reshape(*q.shape[:-2], k.shape[-2], -1, q.shape[-1])
        weights = nn.softmax(jnp.einsum("btgrd,bsgd->bgrts", q, k) / q.shape[-1] ** 0.5)
        out = jnp.einsum("bgrts,bsgd->btgrd", weights, v)
    else:
        weights = nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5)
        out = jnp.einsum("bhts,bshd->bthd", weights, v)
    return out.reshape(*out.shape[:2], -1)


def transformer(attention):
    def body(x):
        x = Dense(12)(x)
        x = x + attention(LayerNorm()(x))
        x = x + Dense(12)(nn.gelu(Dense(20)(LayerNorm()(x))))
        return Dense(5)(LayerNorm()(x))

    return net(body, array(2, 5, 6))


def attention_separate():
    def attention(x):
        q, k, v = (heads(Dense(8)(x), 4) for _ in range(3))
        return Dense(12)(attend(q, k, v))

    return transformer(attention)


def attention_split():
    def attention(x):
        q, k, v = (heads(y, 4) for y in jnp.split(Dense(24)(x), 3, -1))
        return Dense(12)(attend(q, k, v))

    return transformer(attention)


def attention_three_first():
    def attention(x):
        qkv = Dense(24)(x).reshape(2, 5, 3, 4, 2)
        return Dense(12)(attend(*(qkv[:, :, i] for i in range(3))))

    return transformer(attention)


def attention_heads_first():
    def attention(x):
        qkv = Dense(24)(x).reshape(2, 5, 4, 6)
        return Dense(12)(attend(*jnp.split(qkv, 3, -1)))

    return transformer(attention)


def attention_flax():
    def attention(x):
        return nn.MultiHeadDotProductAttention(4, qkv_features=8, **F64)(x)

    return transformer(attention)


def attention_gqa():
    def attention(x):
        q, k, v = heads(Dense(16)(x), 8), heads(Dense(4)(x), 2), heads(Dense(4)(x), 2)
        return Dense(12)(attend(q, k, v))

    return transformer(attention)


def rms(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def rotate(x, interleaved):
    """[B, T, H, d]."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10.0 ** -(jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def llama(interleaved):
    """Tied embeddings, grouped queries, rotary positions, a fused gate."""
    d, q_heads, kv_heads, width, hidden = 12, 4, 2, 4, 10
    layer = {
        "q": (d, q_heads * width),
        "kv": (d, 2 * kv_heads * width),
        "o": (q_heads * width, d),
        "norm": (d,),
        "gate_up": (d, 2 * hidden),
        "down": (hidden, d),
        "norm2": (d,),
    }
    params = of_shapes(embed=(7, d), norm=(d,), layers=[layer, dict(layer)])

    def apply_fn(params, tokens):
        x = params["embed"][tokens]
        for p in params["layers"]:
            y = rms(x, p["norm"])
            q = rotate(heads(y @ p["q"], q_heads), interleaved)
            k, v = (heads(z, kv_heads) for z in jnp.split(y @ p["kv"], 2, -1))
            x = x + attend(q, rotate(k, interleaved), v) @ p["o"]
            gate, up = jnp.split(rms(x, p["norm2"]) @ p["gate_up"], 2, -1)
            x = x + (nn.silu(gate) * up) @ p["down"]
        return rms(x, params["norm"]) @ params["embed"].T

    return loosely(apply_fn), params, (jnp.asarray([[1, 4, 2], [0, 6, 3]]),)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.MultiHeadDotProductAttention(3, qkv_features=12, **F64)(LayerNorm()(x))
        x = x + y
        return x + Dense(12)(nn.gelu(Dense(16)(LayerNorm()(x)))), None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Encoder, prevent_cse=False) if self.remat else Encoder
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(layer, length=4, **axes)()(Dense(12)(x), None)
        return Dense(5)(LayerNorm()(x))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = Conv(12, (4, 4), strides=(4, 4), padding="VALID")(images)
        x = x.reshape(x.shape[0], -1, 12)
        token = self.param("cls", nn.initializers.zeros, (1, 1, 12), jnp.float64)
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("pos", nn.initializers.zeros, (1, 5, 12), jnp.float64)
        for _ in range(2):
            x, _ = Encoder()(x)
        return Dense(5)(LayerNorm()(x)[:, 0])


def moe():
    """Experts by einsum, chosen by the two largest logits."""
    experts = {"gate": (4, 8, 10), "up": (4, 8, 10), "down": (4, 10, 8)}
    params = of_shapes(**{"in": (6, 8)}, router=(8, 4), **experts, out=(8, 3))

    def apply_fn(p, x):
        x = x @ p["in"]
        weight, chosen = jax.lax.top_k(x @ p["router"], 2)
        weight = jnp.einsum("tk,tke->te", nn.softmax(weight), nn.one_hot(chosen, 4))
        hidden = nn.silu(jnp.einsum("td,edf->tef", x, p["gate"]))
        hidden = hidden * jnp.einsum("td,edf->tef", x, p["up"])
        y = jnp.einsum("tef,efd,te->td", hidden, p["down"], weight)
        return (x + y) @ p["out"]

    return loosely(apply_fn), params, (array(7, 6),)


def lora():
    params = of_shapes(w=(8, 12), a=(8, 4), b=(4, 12), out=(12, 3), **{"in": (5, 8)})

    def apply_fn(p, x):
        x = x @ p["in"]
        return nn.relu(x @ (p["w"] + p["a"] @ p["b"])) @ p["out"]

    return apply_fn, params, (array(3, 5),)


def recurrent(cell):
    return net(lambda x: Dense(4)(nn.RNN(cell(8, **F64))(Dense(6)(x))), array(2, 5, 3))


def nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 12, rngs=rngs, **F64)
            self.norm = nnx.BatchNorm(12, use_running_average=True, rngs=rngs, **F64)
            self.attention = nnx.MultiHeadAttention(
                3, 12, decode=False, rngs=rngs, **F64
            )
            self.out = nnx.Linear(12, 4, rngs=rngs, **F64)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.linear(x)))
            return self.out(x + self.attention(x))

    graph, state, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    rest = jax.tree.map(
        lambda x: abs(x) + 0.5 if jnp.issubdtype(x.dtype, jnp.floating) else x, rest
    )
    apply_fn = lambda params, x: nnx.merge(graph, params, rest)(x)
    return loosely(apply_fn), filled(state), (array(2, 5, 6),)


ZOO = {
    "mlp": mlp,
    "residual": residual,
    "depthwise": depthwise,
    "padded": padded,
    "grouped": grouped,
    "dense_concat": dense_concat,
    "squeeze_excite": squeeze_excite,
    "attention_separate": attention_separate,
    "attention_split": attention_split,
    "attention_three_first": attention_three_first,
    "attention_heads_first": attention_heads_first,
    "attention_flax": attention_flax,
    "attention_gqa": attention_gqa,
    "rope_halves": lambda: llama(False),
    "rope_interleaved": lambda: llama(True),
    "vit": lambda: linen(ViT(), array(2, 8, 8, 3)),
    "scan": lambda: linen(Stack(), array(2, 5, 6)),
    "scan_remat": lambda: linen(Stack(remat=True), array(2, 5, 6)),
    "moe": moe,
    "lora": lora,
    "lstm": lambda: recurrent(nn.LSTMCell),
    "optimized_lstm": lambda: recurrent(nn.OptimizedLSTMCell),
    "gru": lambda: recurrent(nn.GRUCell),
    "nnx": nnx_model,
}
