"""Rows that count by sample or by token, and weights that fit no row."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxsparse as js

IDS = np.array([[3, 4, 5, 0, 0, 0, 0, 0], [6, 7, 8, 9, 1, 0, 0, 0]])
MASK = (IDS > 0).astype(np.float32)


@functools.cache
def params():
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    return {
        "emb": {"embedding": normal(10, 6)},
        "w1": normal(6, 4),
        "heads": normal(2, 2, 3),
        "conv": normal(3, 6, 2),
        "pooled": normal(6, 2),
        "mix": normal(1, 3),
    }


def embedded(p, ids):
    return p["emb"]["embedding"][ids]


def plain(p, ids, mask):
    return embedded(p, ids) @ p["w1"]


def flattened(p, ids, mask):
    """Tokens in one axis with samples, then as heads, then turned around."""
    x = embedded(p, ids).reshape(-1, 6) @ p["w1"]
    x = x.reshape(*ids.shape, 2, 2).transpose(2, 1, 0, 3)
    return jnp.einsum("htbd,hdf->hbtf", x, p["heads"])


def convolved(p, ids, mask):
    numbers = ("NHC", "HIO", "NHC")
    x = embedded(p, ids)
    return lax.conv_general_dilated(
        x, p["conv"], (1,), "SAME", dimension_numbers=numbers
    )


def pooling(p, ids, mask):
    return embedded(p, ids).mean(1) @ p["pooled"]


def pairing(p, ids, mask):
    x = embedded(p, ids)
    return jnp.einsum("bsd,btd->bst", x, x)[..., None] @ p["mix"]


def calibrated(apply_fn, weight, where, **options):
    trace = js.trace(apply_fn, params(), IDS, MASK)
    batches = [(IDS, MASK)]
    return js.calibration.run(
        trace, params(), batches, weight=weight, where=where, **options
    )


by_token = lambda ids, mask: mask


def real_rows():
    table = np.asarray(params()["emb"]["embedding"], np.float64)
    return table[IDS[IDS > 0]]


@pytest.mark.parametrize("apply_fn", [plain, flattened])
def test_a_mask_of_tokens_leaves_padding_out(apply_fn):
    rows = real_rows()
    known = calibrated(apply_fn, by_token, "w1").of("w1")
    assert known.count == 8
    np.testing.assert_allclose(known.gram, rows.T @ rows / 8, rtol=1e-5, atol=1e-5)


def test_heads_of_turned_axes_have_their_tokens_too():
    known = calibrated(flattened, by_token, "heads").of("heads")
    x = (real_rows() @ np.asarray(params()["w1"], np.float64)).reshape(-1, 2, 2)
    wanted = np.einsum("nhi,nhj->hij", x, x) / 8
    assert known.count.tolist() == [8, 8]
    np.testing.assert_allclose(known.gram, wanted, rtol=1e-5, atol=1e-5)


def test_masks_of_bools_and_integers_are_weights():
    for kind in (bool, np.int32):
        weight = lambda ids, mask, kind=kind: np.asarray(mask).astype(kind)
        assert calibrated(plain, weight, "w1", gram=False).of("w1").count == 8


def test_layerwise_sees_the_same_rows():
    pruned = js.oneshot.layerwise(
        plain,
        params(),
        [(IDS, MASK)],
        sparsity=0.5,
        solver=js.solvers.magnitude,
        where="w1",
        weight=by_token,
    )
    assert pruned.info["w1"].rows == 8


def test_patches_of_a_convolution_count_by_sample():
    weight = lambda ids, mask: jnp.array([0.0, 2.0])
    assert calibrated(convolved, weight, "conv").of("conv").count == 16


@pytest.mark.parametrize(
    ("apply_fn", "path"), [(convolved, "conv"), (pooling, "pooled"), (pairing, "mix")]
)
def test_rows_of_several_tokens_cannot_be_weighted_by_token(apply_fn, path):
    with pytest.raises(ValueError, match=r"\(2, 8\).* do not each belong to one index"):
        calibrated(apply_fn, by_token, path)


@pytest.mark.parametrize(
    "shape", [(), (3,), (8,), (1,), (2, 5), (8, 2), (2, 1), (2, 8, 6)]
)
def test_a_weight_of_another_shape_is_refused_with_both_shapes(shape):
    pattern = r"batch 0.*\(2, 8\).*" + str(shape).replace("(", r"\(").replace(
        ")", r"\)"
    )
    with pytest.raises(ValueError, match=pattern):
        calibrated(plain, lambda ids, mask: np.ones(shape), "w1")


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_weights_are_finite_and_not_negative(bad):
    weight = lambda ids, mask: np.where(np.arange(8) == 2, bad, mask)
    with pytest.raises(ValueError, match="finite numbers of at least 0; for batch 0"):
        calibrated(plain, weight, "w1")
    with pytest.raises(ValueError, match="finite numbers of at least 0; for batch 0"):
        js.oneshot.layerwise(
            plain, params(), [(IDS, MASK)], sparsity=0.5, where="w1", weight=weight
        )
