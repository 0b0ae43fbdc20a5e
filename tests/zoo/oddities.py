"""More models, each of which once was, or could be, hard to follow.

As in `models.py` each entry gives `(apply_fn, params, inputs)` in float64.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from zoo.models import (
    F64,
    Conv,
    Dense,
    array,
    attend,
    heads,
    loosely,
    net,
    of_shapes,
    rms,
    rotate,
    transformer,
)


def conv(x, w):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)


def modulated():
    """Kernels that are scaled for each sample (StyleGAN2): a mapped convolution."""
    params = of_shapes(
        const=(4, 4, 6), style=(5, 6), w=(3, 3, 6, 8), style2=(5, 8),
        w2=(3, 3, 8, 6), rgb=(6, 3),
    )  # fmt: skip

    def modulate(x, w, style):
        w = w * (style + 1)[:, None]
        w = w * jax.lax.rsqrt(jnp.sum(w * w, (0, 1, 2)) + 1e-3)
        return nn.leaky_relu(conv(x[None], w)[0])

    def one(p, z):
        x = modulate(p["const"], p["w"], z @ p["style"])
        return modulate(x, p["w2"], z @ p["style2"]) @ p["rgb"]

    apply_fn = jax.vmap(one, (None, 0))
    return loosely(apply_fn), params, (array(3, 5),)


def mixed_kernels():
    """Kernels that are mixed for each sample (CondConv)."""
    params = of_shapes(a=(1, 1, 3, 6), mix=(6, 4), w=(4, 3, 3, 6, 8), out=(8, 2))

    def apply_fn(p, x):
        x = nn.relu(conv(x, p["a"]))
        shares = nn.sigmoid(x.mean((1, 2)) @ p["mix"])
        kernels = jnp.einsum("bk,khwio->bhwio", shares, p["w"])
        y = jax.vmap(lambda x, w: conv(x[None], w)[0])(x, kernels)
        return nn.relu(y).mean((1, 2)) @ p["out"]

    return loosely(apply_fn), params, (array(2, 5, 5, 3),)


def attention_width_first():
    """Heads lie faster than their widths, in which each may lose other indices."""

    def attention(x):
        qkv = Dense(36)(x).reshape(2, 5, 4, 3, 3)
        q, k, v = (qkv[..., i].swapaxes(2, 3) for i in range(3))
        out = nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k)) @ v.swapaxes(1, 2)
        return Dense(12)(out.transpose(0, 2, 3, 1).reshape(2, 5, 12))

    return transformer(attention)


def scan_bare():
    """Nothing but kernels in the scan, which all have the stream's width."""
    params = of_shapes(i=(5, 6), up=(4, 6, 8), down=(4, 8, 6), out=(6, 2))
    layer = lambda x, p: (x + jnp.tanh(x @ p[0]) @ p[1], None)

    def apply_fn(p, x):
        return jax.lax.scan(layer, x @ p["i"], (p["up"], p["down"]))[0] @ p["out"]

    return loosely(apply_fn), params, (array(3, 5),)


def crossed():
    """Two axes, in each of which lie copies of what lies in the other."""
    params = of_shapes(a=(5, 6), w=(2 * 4, 3 * 4), x=(3, 4, 5), z=(2, 4, 2))

    def apply_fn(p, x):
        w = p["w"].reshape(2, 4, 3, 4)
        y = jnp.einsum("bwy,wxyz->bwxyz", (x @ p["a"]).reshape(-1, 2, 3), w)
        y = jnp.einsum("bwxyz,yxo->bwzo", jnp.tanh(y), p["x"])
        return jnp.einsum("bwzo,wzk->bok", jnp.tanh(y), p["z"])

    return loosely(apply_fn), params, (array(3, 5),)


def summed_copies():
    """Sums over copies leave an axis of the copies that comes from elsewhere."""
    params = of_shapes(a=(5, 4), b=(4, 6, 3), out=(4, 6, 3, 2))

    def apply_fn(p, x):
        x = jnp.tanh(x @ p["a"])
        y = jnp.einsum("bi,bj,jkl->bikl", x, x, p["b"])
        return jnp.einsum("bikl,iklo->bo", jnp.tanh(y), p["out"])

    return loosely(apply_fn), params, (array(3, 5),)


def flipped_copies():
    """Copies in another order are no longer the same copies."""
    params = of_shapes(a=(5, 4, 6), b=(4, 6, 2))

    def apply_fn(p, x):
        x = jnp.tanh(jnp.einsum("bi,ihk->bhk", x, p["a"]))
        return jnp.einsum("bhk,hko->bo", x + jnp.flip(x, 1), p["b"])

    return loosely(apply_fn), params, (array(3, 5),)


def single_slices():
    """One index of many, a roll, a split that goes through a factor."""
    params = of_shapes(a=(5, 6), b=(1, 6), c=(4, 8), d=(8, 12), e=(6, 6), out=(6, 2))

    def apply_fn(p, x):
        x = jnp.tanh(x @ p["a"])
        y = x[:, 5:6:2] @ p["b"] + x[:, 4:5] @ p["b"]
        z = (x[:, :4] + jnp.roll(x[:, :4], 1, -1)).reshape(-1, 2, 2).swapaxes(1, 2)
        z = jnp.tanh((z.reshape(-1, 4) @ p["c"]) @ p["d"]).reshape(-1, 4, 3)
        left, right = jnp.split(jnp.tanh(z * z).reshape(-1, 12), 2, -1)
        return (y + left @ p["e"] + right) @ p["out"]

    return loosely(apply_fn), params, (array(3, 5),)


def mamba():
    """A selective state space with an associative scan."""
    params = of_shapes(
        i=(6, 8), norm=(8,), in_proj=(8, 24), conv=(4, 1, 12), x_proj=(12, 3 + 2 * 4),
        dt=(3, 12), bias=(12,), a=(12, 4), d=(12,), out=(12, 8), head=(8, 3),
    )  # fmt: skip

    def apply_fn(p, x):
        x = x @ p["i"]
        u, z = jnp.split(rms(x, p["norm"]) @ p["in_proj"], 2, -1)
        numbers = ("NWC", "WIO", "NWC")
        u = jax.lax.conv_general_dilated(
            u, p["conv"], (1,), [(3, 0)], dimension_numbers=numbers,
            feature_group_count=12,
        )  # fmt: skip
        u = nn.silu(u)
        dt, b, c = jnp.split(u @ p["x_proj"], [3, 7], -1)
        dt = nn.softplus(dt @ p["dt"] + p["bias"])
        decay = jnp.exp(-dt[..., None] * jnp.exp(p["a"]))
        new = (dt * u)[..., None] * b[:, :, None]
        combine = lambda s, t: (s[0] * t[0], t[0] * s[1] + t[1])
        _, h = jax.lax.associative_scan(combine, (decay, new), axis=1)
        y = jnp.einsum("btdn,btn->btd", h, c) + u * p["d"]
        return (x + (y * nn.silu(z)) @ p["out"]) @ p["head"]

    return loosely(apply_fn), params, (array(2, 5, 6),)


def latent_attention():
    """Keys and values of one low-rank latent; a rotary part that all heads share."""
    heads_, latent, width, rotary = 3, 6, 4, 4
    params = of_shapes(
        embed=(9, 12), norm=(12,), down=(12, latent + rotary), norm2=(latent,),
        up=(latent, heads_ * 2 * width), q=(12, heads_ * (width + rotary)),
        o=(heads_ * width, 12), head=(12, 9),
    )  # fmt: skip

    def apply_fn(p, tokens):
        x = p["embed"][tokens]
        y = rms(x, p["norm"])
        c, shared = jnp.split(y @ p["down"], [latent], -1)
        k, v = jnp.split(heads(rms(c, p["norm2"]) @ p["up"], heads_), 2, -1)
        q, turned = jnp.split(heads(y @ p["q"], heads_), [width], -1)
        shape = (*tokens.shape, heads_, rotary)
        shared = jnp.broadcast_to(rotate(shared[:, :, None], False), shape)
        q = jnp.concatenate([q, rotate(turned, False)], -1)
        x = x + attend(q, jnp.concatenate([k, shared], -1), v) @ p["o"]
        return x @ p["head"]

    return loosely(apply_fn), params, (jnp.asarray([[1, 4, 2], [0, 6, 3]]),)


def unet():
    def block(x, width):
        for _ in range(2):
            x = nn.relu(nn.GroupNorm(2, **F64)(Conv(width, (3, 3))(x)))
        return x

    def body(x):
        a = block(x, 8)
        b = block(nn.max_pool(a, (2, 2), (2, 2)), 12)
        c = jax.image.resize(b, (*a.shape[:-1], 12), "bilinear")
        c = block(jnp.concatenate([c, a], -1), 8)
        return Conv(2, (1, 1))(c)

    return net(body, array(2, 8, 8, 3))


def random_features():
    """Numbers that the model draws itself, always the same."""
    params = of_shapes(a=(16, 8), b=(8, 2))

    def apply_fn(p, x):
        features = jax.random.normal(jax.random.key(3), (5, 16))
        return nn.relu(jnp.cos(x @ features) @ p["a"]) @ p["b"]

    return loosely(apply_fn), params, (array(3, 5),)


def dropout(stacked):
    """Masks that are drawn for each layer, in a scan or mapped."""
    params = of_shapes(a=(4, 5, 8), b=(4, 8, 5), out=(5, 2))

    def layer(x, a, b, key):
        y = nn.relu(x @ a)
        return (y * jax.random.bernoulli(key, 0.5, y.shape)) @ b

    def apply_fn(p, x, key):
        keys = jax.random.split(key, 4)
        if stacked:
            add = lambda x, p: (x + layer(x, *p), None)
            x, _ = jax.lax.scan(add, x, (p["a"], p["b"], keys))
        else:
            x = jax.vmap(layer, (None, 0, 0, 0))(x, p["a"], p["b"], keys).sum(0)
        return x @ p["out"]

    return loosely(apply_fn), params, (array(3, 5), jax.random.key(0))


@jax.custom_vjp
def rounded(x):
    """A straight-through estimator, with a gradient of its own."""
    return jnp.round(4 * x) / 4


rounded.defvjp(
    lambda x: (rounded(x), abs(x) < 1),
    lambda inside, g: (jnp.where(inside, 3 * g, 0.0),),
)


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda kept, g: (2 * g @ kept[1].T, 3 * kept[0].T @ g),
)


def own_gradients():
    params = of_shapes(a=(5, 8), b=(8, 6), out=(6, 2))

    def apply_fn(p, x):
        x = jnp.tanh(product(x, rounded(p["a"])))
        return rounded(product(x, p["b"])) @ p["out"]

    return loosely(apply_fn), params, (array(3, 5),)


ODDITIES = {
    "modulated": modulated,
    "mixed_kernels": mixed_kernels,
    "attention_width_first": attention_width_first,
    "scan_bare": scan_bare,
    "crossed": crossed,
    "summed_copies": summed_copies,
    "flipped_copies": flipped_copies,
    "single_slices": single_slices,
    "mamba": mamba,
    "latent_attention": latent_attention,
    "unet": unet,
    "random_features": random_features,
    "dropout_scan": lambda: dropout(stacked=True),
    "dropout_vmap": lambda: dropout(stacked=False),
    "own_gradients": own_gradients,
}
