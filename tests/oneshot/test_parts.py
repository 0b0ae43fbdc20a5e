"""Large models are scored and chosen from by parts: with what memory, and the same."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse import _parts
from jaxsparse.oneshot import _places


def params() -> dict:
    rng = np.random.default_rng(0)
    kernels = {
        f"l{i}": {"kernel": jnp.asarray(rng.standard_normal(s).astype(np.float32))}
        for i, s in enumerate([(8, 8), (6, 12), (8, 8), (5, 7), (12, 6)])
    }
    return {**kernels, "bias": jnp.ones(3)}


CALLS = {
    "prune": lambda p: js.prune(p, {"l1": 0.25, "kernel": 0.5}).masks,
    "prune in cuts": lambda p: js.prune(p, 0.6, steps=2, where=r"l[0-3]").masks,
    "init": lambda p: js.masks_of(
        js.prune_schedule(0.7, every=1, min_keep=3).wrap(optax.sgd(0.1)).init(p)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_masks_are_the_same_in_parts(name, monkeypatch):
    whole = CALLS[name](params())
    seen = []

    def parts(sizes, least):
        taken = list(sizes)
        seen.append(taken)
        return [taken[:2], taken[2:]]

    monkeypatch.setattr(_parts, "parts_of", parts)
    found = CALLS[name](params())
    assert seen
    jax.tree.map(np.testing.assert_array_equal, found, whole)


def test_parts_hold_what_is_selected_once_and_are_small():
    sizes = [3 * 2**20, 10, 2**20, 2**20, 2**24, 2**19]
    least = 2**22
    parts = _parts.parts_of(dict(enumerate(sizes)), least)
    assert [i for part in parts for i in part] == [0, 1, 2, 3, 4, 5]
    most = max(least, sum(sizes) // _parts._PARTS)
    sums = [sum(sizes[i] for i in part) for part in parts]
    assert all(n <= most or len(part) == 1 for n, part in zip(sums, parts, strict=True))
    assert len(_parts.parts_of(dict(enumerate(sizes[2:4])), least)) == 1
    assert _parts.parts_of({"empty": 0}, least) == [["empty"]]


def test_scores_of_a_part_are_gone_before_those_of_the_next(monkeypatch):
    monkeypatch.setattr(_parts, "_LEAST", 64)
    made, alive = [], []

    def score(xs):
        alive.append(sum(x() is not None for x in made))
        found = [jnp.abs(x) for x in xs]
        made.extend(map(weakref.ref, found))
        return found

    def choose(scored, taken):
        keep = lambda x, yes: x > 1 if yes else jnp.ones((), bool)
        return jax.tree.map(keep, scored, taken)

    start = {f"l{i}": jnp.ones((8, 8)) for i in range(6)}
    masks = _parts.in_parts(score, choose, start, dict.fromkeys(start, True))
    assert alive == [0] * 6
    assert all(mask.shape == (8, 8) for mask in masks.values())


def test_looking_for_nan_makes_no_array_of_integers():
    found = jax.jit(jax.named_call(js._checks._values._any_nan)).lower(
        jax.ShapeDtypeStruct((1024, 1024), np.float32)
    )
    scratch = found.compile().memory_analysis().temp_size_in_bytes
    assert scratch <= 1.1 * 2**20


def test_one_layer_of_a_stack_is_put_back_without_a_copy():
    axes = js.Axes(input=(1,), output=(2,), batch=(0,))
    view = js.tree.matrix_view((6, 32, 16), axes)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    given = shape(6, 32, 16), np.array([4]), shape(1, 16, 32)
    used = _places.replaced_in_place.lower(*given, view).compile().memory_analysis()
    one = 4 * 32 * 16
    assert used.alias_size_in_bytes == 6 * one
    assert used.temp_size_in_bytes <= one


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 3, 5), (2, 2, 5, 3), (5, 4, 3)])
def test_some_matrices_are_taken_and_put_back(shape):
    batch = (1,) if shape[0] == 5 else tuple(range(len(shape) - 2))
    rest = [a for a in range(len(shape)) if a not in batch]
    view = js.tree.matrix_view(
        shape, js.Axes(input=(rest[0],), output=(rest[1],), batch=batch)
    )
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    whole = js.tree.to_matrices(w, view).reshape(4, view.d_out, view.d_in)
    for places in (np.array([2]), np.array([3, 0])):
        some = _places.matrices_at(jnp.asarray(w), places, view)
        np.testing.assert_array_equal(some, whole[places])
        new = np.array(whole)
        new[places] = -new[places]
        back = _places.replaced(jnp.asarray(w), places, -some, view)
        new = new.reshape(*view.batch, view.d_out, view.d_in)
        np.testing.assert_array_equal(back, js.tree.from_matrices(new, view))
