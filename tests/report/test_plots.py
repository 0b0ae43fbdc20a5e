"""Figures: what is drawn, what is saved, what is refused."""

import itertools
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.report._order import natural_order

pytest.importorskip("matplotlib")
PIL = pytest.importorskip("PIL.Image")

COUNTED = jnp.asarray(np.arange(1, 9, dtype=np.float32).reshape(2, 4))
PARAMS = {
    "a/kernel": COUNTED,
    "b/kernel": COUNTED,
    "bias": jnp.asarray(np.ones(4, np.float32)),
}
HISTORY = {"step": [0, 10, 20], "sparsity": [0.0, 0.25, 0.5], "loss": [2.0, 1.5, 1.0]}


def make(sparsity, asked=None):
    return js.report.table(*js.prune(PARAMS, sparsity), asked=asked)


def labels(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_bars_have_the_reached_sparsity():
    (axes,) = js.report.plot(
        make({"a/kernel": 0.5, "b/kernel": 0.25, "bias": 0.0})
    ).axes
    # The bias is not pruned by default, so it has no bar.
    assert labels(axes) == ["a/kernel", "b/kernel"]
    assert [bar.get_width() for bar in axes.patches] == [50.0, 25.0]
    assert [text.get_text() for text in axes.texts] == ["50.00 %", "25.00 %"]
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first parameter is on top
    assert axes.get_legend() is None


def test_blocks_are_in_the_order_of_their_numbers():
    kernel = PARAMS["a/kernel"]
    params = {f"block_{i}/{k}": kernel for i in (1, 10, 2) for k in ("w", "v")}
    (axes,) = js.report.plot(js.report.table(*js.prune(params, 0.5))).axes
    blocks = [f"block_{i}/{k}" for i in (1, 2, 10) for k in ("v", "w")]
    assert labels(axes) == blocks


def test_names_without_numbers_keep_the_order_of_the_model():
    paths = ["up", "down", "layer/3", "layer/20", "head", "layer/5"]
    expected = ["up", "down", "layer/3", "layer/5", "layer/20", "head"]
    assert natural_order(paths) == expected


def test_asked_is_a_tick():
    (axes,) = js.report.plot(make(0.5, asked=0.6)).axes
    (ticks,) = axes.collections
    assert [segment[:, 0].tolist() for segment in ticks.get_segments()] == [
        [60.0, 60.0],
        [60.0, 60.0],
    ]
    assert legend(axes) == ["reached", "asked"]


def test_tables_have_one_colour_each():
    tables = {"half": make(0.5, asked=0.5), "quarter": make(0.25)}
    (axes,) = js.report.plot(tables).axes
    assert [bar.get_width() for bar in axes.patches] == [50.0, 50.0, 25.0, 25.0]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert legend(axes) == ["half", "quarter", "asked"]
    spans = sorted((b.get_y(), b.get_y() + b.get_height()) for b in axes.patches)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))


def test_history_of_one_run():
    history = HISTORY | {"loss": jnp.asarray(HISTORY["loss"], jnp.bfloat16)}
    _, loss, sparsity = js.report.plot(make(0.5), history=history).axes
    (curve,) = loss.lines
    assert curve.get_xdata().tolist() == [0, 10, 20]
    assert curve.get_ydata().tolist() == [2.0, 1.5, 1.0]
    (curve,) = sparsity.lines
    assert curve.get_ydata().tolist() == [0.0, 25.0, 50.0]
    assert legend(loss) == ["sparsity", "loss"]


def test_history_of_several_runs_has_the_colours_of_the_tables():
    tables = {"x": make(0.5), "y": make(0.25)}
    shorter = {key: values[:2] for key, values in HISTORY.items()}
    figure = js.report.plot(tables, history={"y": shorter, "x": HISTORY})
    bars, loss, _ = figure.axes
    assert [len(curve.get_xdata()) for curve in loss.lines] == [2, 3]
    assert legend(loss) == ["y: sparsity", "y: loss", "x: sparsity", "x: loss"]
    from matplotlib.colors import to_rgba

    assert to_rgba(loss.lines[1].get_color()) == bars.patches[0].get_facecolor()
    assert to_rgba(loss.lines[0].get_color()) == bars.patches[2].get_facecolor()


def test_saved_png_is_a_picture(tmp_path):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    figure = js.report.plot(make(0.5, asked=0.5), history=HISTORY, path=path)
    assert os.listdir(tmp_path) == ["figure.png"]
    with PIL.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
        assert image.format == "PNG"
    width, height = figure.get_size_inches() * figure.dpi
    assert pixels.shape[:2] == (int(height), int(width))
    blue = np.all(pixels == (0x00, 0x72, 0xB2), axis=-1)
    assert blue.sum() > 10_000  # the bars


def test_failure_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        js.report.plot(make(0.5), path=path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["figure.png"]


def test_sixty_layers_have_room_for_their_names():
    params = {f"block_{i:02d}/attention/$query/kernel": COUNTED for i in range(60)}
    figure = js.report.plot(js.report.table(*js.prune(params, 0.5)), history=HISTORY)
    figure.canvas.draw()
    axes, loss, _ = figure.axes
    boxes = [text.get_window_extent() for text in axes.get_yticklabels()]
    assert len(boxes) == 60
    tops = sorted((box.y0, box.y1) for box in boxes)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(tops))
    assert min(box.x0 for box in boxes) >= 0
    # The curves stay as high as they are wide, or less.
    box = loss.get_window_extent()
    assert 0.4 < box.height / box.width < 1
    assert labels(axes)[0] == "block_00/attention/$query/kernel"


def test_dollar_signs_are_not_mathematics(tmp_path):
    name = r"$\nope$"  # an error, if it were read as a formula
    params = {f"{name}/kernel": COUNTED}
    tables = {name: js.report.table(*js.prune(params, 0.5)), "b": make(0.5)}
    figure = js.report.plot(tables, history={name: HISTORY}, path=tmp_path / "a.png")
    assert labels(figure.axes[0])[0] == f"{name}/kernel"
    assert legend(figure.axes[1]) == [f"{name}: sparsity", f"{name}: loss"]


def test_long_names_keep_their_end():
    path = "a/" * 40 + "query/kernel"
    params = {path: COUNTED}
    (axes,) = js.report.plot(js.report.table(*js.prune(params, 0.5))).axes
    (label,) = labels(axes)
    assert len(label) == 42
    assert label.startswith("…")
    assert label.endswith("/query/kernel")


def test_notebook_gets_a_png():
    figure = js.report.plot(make(0.5))
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_pyplot_is_not_imported():
    code = (
        "import sys, jax.numpy as jnp, jaxsparse as js\n"
        "assert 'jaxsparse.report' not in sys.modules\n"
        "table = js.report.table(*js.prune({'kernel': jnp.ones((2, 4))}, 0.5))\n"
        "assert 'matplotlib' not in sys.modules\n"
        "js.report.plot(table)\n"
        "assert 'matplotlib.figure' in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr


# Bad input


def test_without_matplotlib(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "jaxsparse\[plots\]"'):
        js.report.plot(make(0.5))


def test_history_without_a_key():
    history = {"step": [0], "loss": [1.0]}
    with pytest.raises(ValueError, match=r"history must have .*missing 'sparsity'"):
        js.report.plot(make(0.5), history=history)
    with pytest.raises(ValueError, match=r"history\['x'\] must .*missing 'sparsity'"):
        js.report.plot(make(0.5), history={"x": history})
    with pytest.raises(ValueError, match=r"history\['loss'\] must have the keys"):
        js.report.plot(make(0.5), history={"x": HISTORY, "loss": [1.0]})


def test_history_of_unequal_lengths():
    history = HISTORY | {"loss": [1.0]}
    with pytest.raises(ValueError, match=r"one value for each step.*'loss': \(1,\)"):
        js.report.plot(make(0.5), history=history)
    with pytest.raises(ValueError, match=r"one value for each step.*\(\)"):
        js.report.plot(make(0.5), history=dict.fromkeys(HISTORY, 0.0))


def test_history_in_percent():
    history = HISTORY | {"sparsity": [0, 25, 50]}
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\]; got .* 0 to 50"):
        js.report.plot(make(0.5), history=history)


def test_nothing_pruned():
    table = js.report.table(PARAMS, dict.fromkeys(PARAMS, np.True_))
    with pytest.raises(ValueError, match="No parameter of the table is pruned"):
        js.report.plot(table)


def test_not_a_table():
    with pytest.raises(TypeError, match=r"plot takes .* got a Pruned\."):
        js.report.plot(js.prune(PARAMS, 0.5))
    with pytest.raises(TypeError, match=r"got a int at 'x'\."):
        js.report.plot({"x": 3})


def test_path_of_another_format(tmp_path):
    with pytest.raises(ValueError, match=r"must end in '\.png', got .*a\.pdf"):
        js.report.plot(make(0.5), path=tmp_path / "a.pdf")
    assert os.listdir(tmp_path) == []
