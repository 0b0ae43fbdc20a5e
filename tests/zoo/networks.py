"""Models of several styles, none of them written for pruning."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


class DenseLayer(nn.Module):
    growth: int = 32

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)
        y = nn.Conv(4 * self.growth, (1, 1), use_bias=False)(nn.relu(norm()(x)))
        y = nn.Conv(self.growth, (3, 3), padding=1, use_bias=False)(nn.relu(norm()(y)))
        return jnp.concatenate([x, y], -1)


class DenseNet(nn.Module):
    """DenseNet-121 by default."""

    blocks: tuple[int, ...] = (6, 12, 24, 16)
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)
        x = nn.Conv(64, (7, 7), strides=2, padding=3, use_bias=False)(x)
        x = nn.max_pool(nn.relu(norm()(x)), (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, depth in enumerate(self.blocks):
            for _ in range(depth):
                x = DenseLayer()(x)
            if i + 1 < len(self.blocks):
                x = nn.relu(norm()(x))
                x = nn.Conv(x.shape[-1] // 2, (1, 1), use_bias=False)(x)
                x = nn.pooling.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4
        x = nn.relu(norm()(x)).mean((1, 2))
        return nn.Dense(self.classes)(x)


class Residual(nn.Module):
    features: int
    strides: int = 1
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)
        conv = functools.partial(nn.Conv, use_bias=False)
        out, strides, y = self.features, self.strides, x
        if self.bottleneck:
            out *= 4
            y = nn.relu(norm()(conv(self.features, (1, 1))(y)))
        y = nn.relu(norm()(conv(self.features, (3, 3), strides=strides, padding=1)(y)))
        last = (1, 1) if self.bottleneck else (3, 3)
        y = norm()(conv(out, last, padding=last[0] // 2)(y))
        if x.shape != y.shape:
            x = norm()(conv(out, (1, 1), strides=strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-18 by default; of depths 3, 4, 6, 3 with bottlenecks it is ResNet-50."""

    depths: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), strides=2, padding=3, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, depth in enumerate(self.depths):
            for j in range(depth):
                strides = 2 if i and not j else 1
                x = Residual(64 * 2**i, strides, self.bottleneck)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


class MobileNet(nn.Module):
    """MobileNetV2."""

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)
        conv = functools.partial(nn.Conv, use_bias=False)
        x = nn.relu6(norm()(conv(32, (3, 3), strides=2, padding=1)(x)))
        stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2))
        stages += ((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
        for wider, out, depth, strides in stages:
            for i in range(depth):
                y, hidden = x, wider * x.shape[-1]
                if wider > 1:
                    y = nn.relu6(norm()(conv(hidden, (1, 1))(y)))
                own = {"feature_group_count": hidden, "padding": 1}
                step = strides if i == 0 else 1
                y = nn.relu6(norm()(conv(hidden, (3, 3), strides=step, **own)(y)))
                y = norm()(conv(out, (1, 1))(y))
                x = x + y if x.shape == y.shape else y
        x = nn.relu6(norm()(conv(1280, (1, 1))(x)))
        return nn.Dense(1000)(x.mean((1, 2)))


class ViT(nn.Module):
    """ViT-B/16."""

    layers: int = 12

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(768, (16, 16), strides=16)(x).reshape(x.shape[0], -1, 768)
        first = self.param("cls", nn.initializers.zeros, (1, 1, 768))
        x = jnp.concatenate([jnp.tile(first, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("pos", nn.initializers.zeros, (1, x.shape[1], 768))
        for _ in range(self.layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(12)(y, y)
            x = x + nn.Dense(768)(nn.gelu(nn.Dense(3072)(nn.LayerNorm()(x))))
        return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0])


def llama_params(layers=32, d=4096, heads=32, kv=8, hidden=14336, vocab=128256):
    """Abstract parameters of a Llama-3-8B."""
    s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    hd = d // heads
    layer = lambda: {
        "wq": s(d, heads, hd),
        "wk": s(d, kv, hd),
        "wv": s(d, kv, hd),
        "wo": s(heads, hd, d),
        "w1": s(d, hidden),
        "w3": s(d, hidden),
        "w2": s(hidden, d),
        "norm1": s(d),
        "norm2": s(d),
    }
    return {
        "embed": s(vocab, d),
        "layers": [layer() for _ in range(layers)],
        "norm": s(d),
        "head": s(d, vocab),
    }


def rms(x, scale):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * scale[None, None]


def rope(x):
    t, half = x.shape[1], x.shape[-1] // 2
    at = lambda n: jnp.arange(n, dtype=jnp.float32)
    angle = at(t)[:, None] * 10_000.0 ** (-at(half) / half)[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def llama(params, tokens):
    """Unrolled layers; grouped queries, rotary embedding, gated MLP."""
    x = params["embed"][tokens]
    for p in params["layers"]:
        h = rms(x, p["norm1"])
        q = rope(jnp.einsum("btd,dhk->bthk", h, p["wq"]))
        k = rope(jnp.einsum("btd,dhk->bthk", h, p["wk"]))
        v = jnp.einsum("btd,dhk->bthk", h, p["wv"])
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + jnp.einsum("bthk,hkd->btd", y, p["wo"])
        h = rms(x, p["norm2"])
        x = x + (jax.nn.silu(h @ p["w1"]) * (h @ p["w3"])) @ p["w2"]
    return rms(x, params["norm"]) @ params["head"]
