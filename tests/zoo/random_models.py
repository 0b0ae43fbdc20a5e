"""Models drawn at random: a dozen operations of those that move, mix and split axes.

A model is a list of steps; each reads earlier values `[batch, time, *features]` and
gives another. Nobody would write them, which is the point: what couples axes by
accident here does so somewhere in a real model.
"""

import jax
import jax.numpy as jnp
import numpy as np

BATCH, TIME, WIDTH = 2, 3, 4
SIZES = (2, 3, 4, 6)
LETTERS = "cdefgh"


class Drawn:
    """The steps drawn so far, the shapes of their values, and the parameters."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.params, self.steps, self.log = {}, [], []
        self.shapes = [(WIDTH,)]  # of features
        kernel = self.kernel(WIDTH, 2 * self.size())
        self.add((self.params[kernel].shape[1],), lambda p, v: v[0] @ p[kernel])

    def kernel(self, *shape):
        name = f"w{len(self.params)}"
        self.params[name] = jnp.asarray(0.6 * self.rng.normal(size=shape))
        return name

    def size(self):
        return int(self.rng.choice(SIZES))

    def add(self, features, step, name="in"):
        if np.prod(features) <= 96 and len(features) <= 3:
            self.steps.append(step)
            self.shapes.append(tuple(features))
            self.log.append(f"{len(self.steps)}: {name} {tuple(features)}")

    def alike(self, features, axis=None):
        """A value of the same features, but for one axis."""
        cut = lambda f: f if axis is None else (*f[:axis], *f[axis + 1 :])
        fits = lambda f: len(f) == len(features) and cut(f) == cut(features)
        return int(self.rng.choice([i for i, f in enumerate(self.shapes) if fits(f)]))

    def draw(self):
        late = np.arange(1, len(self.shapes) + 1.0)
        i = int(self.rng.choice(len(self.shapes), p=late / late.sum()))
        name = self.rng.choice(list(STEPS))
        features = self.shapes[i]
        axis = int(self.rng.integers(len(features)))
        STEPS[name](self, lambda shape, f: self.add(shape, f, name), i, features, axis)

    def model(self):
        some = self.rng.choice(len(self.shapes), 2)
        outs = [*range(max(len(self.shapes) - 4, 0), len(self.shapes)), *some]
        heads = {int(i): self.kernel(int(np.prod(self.shapes[i])), 2) for i in outs}

        def apply_fn(params, x):
            values = [x]
            for step in self.steps:
                values.append(step(params, values))
            flat = lambda i: values[i].reshape(BATCH, TIME, -1)
            return sum(flat(i) @ params[w] for i, w in heads.items())

        x = np.random.default_rng(0).normal(size=(BATCH, TIME, WIDTH))
        return apply_fn, self.params, (jnp.asarray(x),)


def contract(d, add, i, f, axis):
    """Some axes with a kernel, to one or two new ones, in any order."""
    gone = sorted(d.rng.permutation(len(f))[: d.rng.integers(1, len(f) + 1)])
    new = [d.size() for _ in range(d.rng.integers(1, 3))]
    sizes = dict(zip(LETTERS, f, strict=False)) | dict(zip("xy", new, strict=False))
    kept = [LETTERS[a] for a in range(len(f)) if a not in gone]
    out = "".join(d.rng.permutation([*kept, *"xy"[: len(new)]]))
    w = d.kernel(*(f[a] for a in gone), *new)
    left = "bt" + LETTERS[: len(f)]
    right = "".join(LETTERS[a] for a in gone) + "xy"[: len(new)]
    equation = f"{left},{right}->bt{out}"
    add([sizes[c] for c in out], lambda p, v: jnp.einsum(equation, v[i], p[w]))


def contract_each(d, add, i, f, axis):
    """A kernel for each index of another axis."""
    if len(f) > 1:
        other = (axis + 1) % len(f)
        w, left = d.kernel(f[other], f[axis], d.size()), LETTERS[: len(f)]
        right = f"{left[other]}{left[axis]}x"
        equation = f"bt{left},{right}->bt{left.replace(left[axis], 'x')}"
        shape = (*f[:axis], d.params[w].shape[2], *f[axis + 1 :])
        add(shape, lambda p, v: jnp.einsum(equation, v[i], p[w]))


def shift(d, add, i, f, axis):
    w, b = d.kernel(*f[axis:]), d.kernel(*f[axis:])
    add(f, lambda p, v: v[i] * p[w] + p[b])


def activate(d, add, i, f, axis):
    acts = (jnp.tanh, jax.nn.relu, jax.nn.silu, jax.nn.sigmoid, jax.nn.softmax)
    act = acts[d.rng.integers(len(acts))]
    add(f, lambda p, v: act(v[i]))


def normalize(d, add, i, f, axis):
    axes = tuple(range(2 + axis, 2 + len(f)))
    scale = lambda y: jax.lax.rsqrt(jnp.mean(y * y, axes, keepdims=True) + 0.1)
    if d.rng.random() < 0.5:
        return add(f, lambda p, v: v[i] * scale(v[i]))
    w = d.kernel(*f[axis:])
    center = lambda y: y - jnp.mean(y, axes, keepdims=True)
    add(f, lambda p, v: center(v[i]) * scale(center(v[i])) * p[w])


def merge(d, add, i, f, axis):
    if axis + 1 < len(f):
        shape = (*f[:axis], f[axis] * f[axis + 1], *f[axis + 2 :])
        add(shape, lambda p, v: v[i].reshape(BATCH, TIME, *shape))


def split(d, add, i, f, axis):
    factors = [n for n in (2, 3) if f[axis] % n == 0 and f[axis] > n]
    if factors:
        n = int(d.rng.choice(factors))
        pair = map(int, d.rng.permutation([n, f[axis] // n]))
        shape = (*f[:axis], *pair, *f[axis + 1 :])
        add(shape, lambda p, v: v[i].reshape(BATCH, TIME, *shape))


def transpose(d, add, i, f, axis):
    order = d.rng.permutation(len(f))
    shape = [f[a] for a in order]
    add(shape, lambda p, v: v[i].transpose(0, 1, *(a + 2 for a in order)))


def join(d, add, i, f, axis):
    j = d.alike(f, axis)
    shape = (*f[:axis], f[axis] + d.shapes[j][axis], *f[axis + 1 :])
    add(shape, lambda p, v: jnp.concatenate([v[i], v[j]], 2 + axis))


def slices(d, add, i, f, axis):
    start = int(d.rng.integers(f[axis]))
    limit, stride = int(d.rng.integers(start, f[axis])) + 1, int(d.rng.choice([1, 2]))
    at = (..., slice(start, limit, stride), *[slice(None)] * (len(f) - axis - 1))
    shape = (*f[:axis], len(range(start, limit, stride)), *f[axis + 1 :])
    add(shape, lambda p, v: v[i][at])


def combine(d, add, i, f, axis):
    j, how = d.alike(f), d.rng.integers(3)
    ways = (jnp.add, lambda a, b: jnp.tanh(a) * b, lambda a, b: jnp.where(a > 0, a, b))
    add(f, lambda p, v: ways[how](v[i], v[j]))


def attend(d, add, i, f, axis):
    if len(f) > 1:
        j, k = d.alike(f), d.alike(f, len(f) - 1)
        c = LETTERS[: len(f)]
        weights = f"bt{c},bs{c}->b{c[:-1]}ts"
        values = f"b{c[:-1]}ts,bs{c[:-1]}z->bt{c[:-1]}z"

        def step(p, v):
            shares = jax.nn.softmax(jnp.einsum(weights, v[i], v[j]))
            return jnp.einsum(values, shares, v[k])

        add((*f[:-1], d.shapes[k][-1]), step)


def convolve(d, add, i, f, axis):
    groups = [g for g in (1, 2, 3, f[0]) if f[0] % g == 0]
    if len(f) == 1:
        g = int(d.rng.choice(groups))
        w = d.kernel(2, f[0] // g, g * int(d.rng.integers(1, 3)))
        options = {"dimension_numbers": ("NWC", "WIO", "NWC"), "feature_group_count": g}
        run = lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), "SAME", **options)
        add((d.params[w].shape[2],), lambda p, v: run(v[i], p[w]))


def stacked(d, add, i, f, axis):
    """A scan over layers, rematerialised or not."""
    hidden, layers = d.size(), int(d.rng.choice([2, 3]))
    up, down = d.kernel(layers, f[-1], hidden), d.kernel(layers, hidden, f[-1])
    bias = d.kernel(layers, hidden)

    def layer(x, w):
        y = jnp.tanh(jnp.einsum("...c,ch->...h", x, w[0]) + w[2])
        return x + jnp.einsum("...h,hc->...c", y, w[1]), None

    layer = jax.checkpoint(layer) if d.rng.random() < 0.5 else layer
    add(f, lambda p, v: jax.lax.scan(layer, v[i], (p[up], p[down], p[bias]))[0])


def stack(d, add, i, f, axis):
    j = d.alike(f)
    shape = (*f[:axis], 2, *f[axis:])
    add(shape, lambda p, v: jnp.stack([v[i], v[j]], 2 + axis))


def repeat(d, add, i, f, axis):
    shape = (*f[:axis], 2 * f[axis], *f[axis + 1 :])
    each = lambda x: jnp.repeat(x, 2, 2 + axis)
    whole = lambda x: jnp.concatenate([x, x], 2 + axis)
    how = each if d.rng.random() < 0.5 else whole
    add(shape, lambda p, v: how(v[i]))


def pad(d, add, i, f, axis):
    before, after = map(int, d.rng.integers(0, 3, 2))
    widths = [(0, 0)] * (2 + len(f))
    widths[2 + axis] = before, after
    shape = (*f[:axis], before + f[axis] + after, *f[axis + 1 :])
    add(shape, lambda p, v: jnp.pad(v[i], widths))


def reduce(d, add, i, f, axis):
    if len(f) > 1:
        how = jnp.mean if d.rng.random() < 0.7 else jnp.max
        add((*f[:axis], *f[axis + 1 :]), lambda p, v: how(v[i], 2 + axis))


def reorder(d, add, i, f, axis):
    ways = (
        lambda x: jnp.flip(x, 2 + axis),
        lambda x: jnp.roll(x, 1, 2 + axis),
        lambda x: jnp.roll(x, 1, 1),
        lambda x: jnp.cumsum(x, 1),
    )
    how = ways[d.rng.integers(len(ways))]
    add(f, lambda p, v: how(v[i]))


def outer(d, add, i, f, axis):
    j = int(d.rng.integers(len(d.shapes)))
    if len(f) == len(d.shapes[j]) == 1:
        shape = (*f, *d.shapes[j])
        add(shape, lambda p, v: jnp.tanh(v[i])[..., None] * v[j][:, :, None])


def mapped(d, add, i, f, axis):
    """An ensemble of kernels on the same value, added up."""
    if len(f) == 1:
        up, down = d.kernel(3, f[0], 4), d.kernel(3, 4, f[0])
        one = lambda x, a, b: jnp.tanh(x @ a) @ b
        run = jax.vmap(one, (None, 0, 0))
        add(f, lambda p, v: run(v[i], p[up], p[down]).sum(0))


STEPS = {
    f.__name__: f
    for f in (
        contract, contract_each, shift, activate, normalize, merge, split, transpose,
        join, slices, combine, attend, convolve, stacked, stack, repeat, pad, reduce,
        reorder, outer, mapped,
    )
}  # fmt: skip
LIKELY = ("contract", "contract_each", "split", "merge", "attend", "stacked")
STEPS |= {f"{name} again": STEPS[name] for name in LIKELY}


def random_model(seed, steps=10):
    """`(apply_fn, params, inputs)`, and what it does in words.

    Args:
      seed: tells models apart.
      steps: how many operations are drawn; some come to nothing.
    """
    drawn = Drawn(seed)
    for _ in range(steps):
        drawn.draw()
    return drawn.model(), drawn.log
