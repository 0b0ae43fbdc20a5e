"""Pictures of results: what is drawn, in which order, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

pytest.importorskip("matplotlib")

rng = np.random.default_rng(0)
PARAMS = {
    f"block_{i}": {"kernel": jnp.asarray(rng.standard_normal((8, 8)).astype("f4"))}
    for i in (1, 2, 10)
}
IN_ORDER = ["block_1/kernel", "block_2/kernel", "block_10/kernel"]
labels = lambda axes: [text.get_text() for text in axes.get_yticklabels()]
legend = lambda axes: [text.get_text() for text in axes.get_legend().get_texts()]


def loss(params):
    """Of which the second block is most, and the third least."""
    weights = {"block_1": 3.0, "block_2": 5.0, "block_10": 1.0}
    lost = {k: np.sum(np.asarray(w["kernel"]) == 0) for k, w in params.items()}
    return 7.0 + sum(weights[k] * n for k, n in lost.items())


def sensitivity():
    magnitude = js.scores.magnitude(PARAMS)
    return js.allocations.sensitivity(PARAMS, magnitude, loss, [0.25, 0.5])


def test_one_parameter_alone_is_pruned():
    found = sensitivity()
    assert (found.dense, found.sparsities) == (7.0, (0.25, 0.5))
    assert {path: x.tolist() for path, x in found.losses.items()} == {
        "block_1/kernel": [7 + 3 * 16, 7 + 3 * 32],
        "block_2/kernel": [7 + 5 * 16, 7 + 5 * 32],
        "block_10/kernel": [7 + 16, 7 + 32],
    }


def test_sensitivity_is_of_what_is_selected():
    magnitude = js.scores.magnitude(PARAMS)
    found = js.allocations.sensitivity(
        PARAMS, magnitude, loss, np.array([0.5]), where="block_2", pattern=js.Channel()
    )
    assert list(found.losses) == ["block_2/kernel"]
    assert found.losses["block_2/kernel"].tolist() == [7 + 5 * 32]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sparsities": []}, ValueError, "sparsities is empty"),
        ({"sparsities": [50]}, ValueError, r"write 0\.5"),
        ({"sparsities": 0.5}, TypeError, "sparsities is a sequence"),
        ({"pattern": js.Unstructured("global")}, ValueError, "one parameter alone"),
        ({"pattern": js.NM(2, 4)}, ValueError, "one parameter alone"),
        ({"loss_fn": lambda p: np.ones(2)}, TypeError, "loss_fn must return a scalar"),
    ],
)
def test_what_has_no_sensitivity_is_refused(change, error, message):
    given = {
        "params": PARAMS,
        "scores": js.scores.magnitude(PARAMS),
        "loss_fn": loss,
        "sparsities": [0.5],
    }
    with pytest.raises(error, match=message):
        js.allocations.sensitivity(**given | change)


def test_the_most_sensitive_parameters_have_names():
    (axes,) = js.report.plot_sensitivity(sensitivity(), named=2).axes
    assert legend(axes) == ["block_1/kernel", "block_2/kernel", "dense"]
    by_colour = {line.get_color(): line.get_ydata() for line in axes.get_lines()}
    assert list(by_colour["#aaaaaa"]) == [23.0, 39.0]
    assert list(by_colour["#222222"]) == [7.0, 7.0]


def test_runs_are_sorted_along_x_and_have_marks():
    runs = {"ours": ([90, 0, 50], [0.5, 0.9, 0.8]), "dense": ([0], [0.91])}
    (axes,) = js.report.plot_tradeoff(runs, xlabel="sparsity in %").axes
    first, second = axes.get_lines()
    assert list(first.get_xdata()) == [0, 50, 90]
    assert list(first.get_ydata()) == [0.9, 0.8, 0.5]
    assert first.get_marker() != second.get_marker()
    assert first.get_color() != second.get_color()
    assert legend(axes) == ["ours", "dense"]


def test_errors_of_layers_and_what_the_solver_gained():
    x = [jnp.asarray(rng.standard_normal((16, 8)).astype(np.float32))]

    def apply_fn(params, x):
        for i in (1, 2, 10):
            x = jnp.tanh(x @ params[f"block_{i}"]["kernel"])
        return x

    found = js.oneshot.layerwise(apply_fn, PARAMS, x, sparsity=0.5, show=False)
    (axes,) = js.report.plot_errors(found.info).axes
    assert labels(axes) == IN_ORDER
    masked, solved = axes.get_lines()
    for line, name in ((masked, "masked_error"), (solved, "relative_error")):
        expected = [float(getattr(found.info[path], name)) for path in IN_ORDER]
        np.testing.assert_allclose(line.get_xdata(), expected)


def test_sparsity_over_steps_is_in_natural_order():
    history = {}
    for step, sparsity in ((0, 0.0), (10, 0.25), (30, 0.5)):
        pruned = js.prune(PARAMS, sparsity, where="block_1")
        history[step] = js.patterns.sparsity_of(pruned.masks, PARAMS)
    axes, bar = js.report.plot_sparsity(history).axes
    assert labels(axes) == ["block_1/kernel", "block_10/kernel"]  # 2 was never pruned
    (mesh,) = axes.collections
    expected = [[0, 25, 50]] * 2
    np.testing.assert_array_equal(np.reshape(mesh.get_array(), (2, 3)), expected)
    assert bar.get_ylim() == (0, 100)


def test_histograms_say_how_many_zeros_there_are():
    pruned = js.prune(PARAMS, 0.75, where="block_2").params
    figure = js.report.plot_weights(PARAMS, pruned, where="block_[12]/")
    assert [axes.get_title("left") for axes in figure.axes] == [
        "block_1/kernel: 0.0 % → 0.0 % zeros",
        "block_2/kernel: 0.0 % → 75.0 % zeros",
    ]


def test_they_are_shown_in_notebooks_and_saved(tmp_path):
    path = tmp_path / "x.png"
    for draw in (
        lambda: js.report.plot_sensitivity(sensitivity(), path=path),
        lambda: js.report.plot_weights(PARAMS, PARAMS, path=path),
        lambda: js.report.plot_tradeoff({"a": ([1], [2])}, xlabel="x", path=path),
        lambda: js.report.plot_sparsity({0: {"a": 0.5}}, path=path),
    ):
        figure = draw()
        assert path.read_bytes().startswith(b"\x89PNG")
        assert figure._repr_png_().startswith(b"\x89PNG")
        path.unlink()


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda r: r.plot_sensitivity(3), TypeError, "js.allocations.sensitivity"),
        (lambda r: r.plot_sensitivity(sensitivity(), named=9), ValueError, "at most 7"),
        (lambda r: r.plot_tradeoff({}, xlabel="x"), ValueError, "1 to 7"),
        (lambda r: r.plot_tradeoff({"a": [1]}, xlabel="x"), TypeError, r"'a'.*a pair"),
        (
            lambda r: r.plot_tradeoff({"a": ([1], [1, 2])}, xlabel="x"),
            ValueError,
            r"runs\['a'\] must have one y for each x",
        ),
        (
            lambda r: r.plot_tradeoff({"a": ([0], [1])}, xlabel="x", logx=True),
            ValueError,
            "must be positive on a logarithmic axis",
        ),
        (lambda r: r.plot_sparsity({}), ValueError, "history is empty"),
        (lambda r: r.plot_sparsity([1]), TypeError, "history must be a mapping"),
        (lambda r: r.plot_sparsity({0: {"a": 0.0}}), ValueError, "no parameter was"),
        (lambda r: r.plot_sparsity({0: {"a": 1.5}}), ValueError, "a must"),
        (
            lambda r: r.plot_sparsity({0: {"a": 0.5}, 1: {"b": 0.5}}),
            ValueError,
            "different parameters",
        ),
        (lambda r: r.plot_errors({}), ValueError, "info is empty"),
        (lambda r: r.plot_errors({"a": 1}), TypeError, "a: info must hold"),
        (lambda r: r.plot_weights(PARAMS, {}), ValueError, "after"),
        (
            lambda r: r.plot_weights(PARAMS, PARAMS, path="x.svg"),
            ValueError,
            r"path must end in '\.png'",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, error, message):
    with pytest.raises(error, match=message):
        draw(js.report)
