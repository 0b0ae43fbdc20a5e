"""Every number of a table, counted by hand on small trees."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import jaxsparse as js
from jaxsparse.report._tables import percent, size_text

VALUES = np.array([[3.0, 0.0, 2.0], [0.0, 4.0, 0.0]], np.float32)
KERNEL, MASK = jnp.asarray(VALUES), jnp.asarray(VALUES != 0)
PARAMS = {"bias": jnp.asarray(np.array([1.0, 0.0, 0.0], np.float32)), "kernel": KERNEL}
MASKS = {"bias": jnp.asarray(np.array(True)), "kernel": MASK}


def ones(*shape, dtype="float32"):
    return jnp.asarray(np.ones(shape, dtype))


def row_of(table, path):
    (row,) = (row for row in table.rows if row.path == path)
    return row


def test_every_field_by_hand():
    table = js.report.table(PARAMS, MASKS, asked={"bias": 0.0, "kernel": 0.4})
    # 3 values of 4 bytes and 6 bits, which take one byte.
    kernel = js.report.Row(
        path="kernel",
        shape=(2, 3),
        dtype="float32",
        asked=0.4,
        reached=0.5,
        kept=3,
        size=6,
        dense_bytes=24,
        packed_bytes=13,
        leaked=0,
        pruned=True,
    )
    bias = js.report.Row(
        "bias", (3,), "float32", 0.0, 0.0, 3, 3, 12, 12, 0, pruned=False
    )
    assert table.rows == (bias, kernel)
    assert table.pruned == kernel._replace(path="pruned parameters", shape=())
    assert table.total == js.report.Row(
        path="total",
        shape=(),
        dtype="float32",
        asked=pytest.approx(0.4 * 6 / 9),
        reached=3 / 9,
        kept=6,
        size=9,
        dense_bytes=36,
        packed_bytes=25,
        leaked=0,
        pruned=True,
    )
    assert (table.title, table.state_leaked, table.warning) == ("Sparsity", 0, "")


def test_fields_are_python_numbers():
    row = js.report.table(PARAMS, MASKS, asked=np.float32(0.5)).rows[1]
    assert [type(x) for x in row] == [
        str, tuple, str, float, float, int, int, int, int, int, bool, bool, str
    ]  # fmt: skip


def test_it_says_what_the_default_leaves_dense_and_why():
    shapes = {"wte/weight": (64, 8), "cls": (1, 1, 8), "up/kernel": (8, 8), "b": (8,)}
    params = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
    table = js.report.table(*js.prune(params, 0.5))
    said = "Left dense: cls (a token), wte/weight (an embedding)."
    assert table.left_dense == said
    assert said in str(table)
    assert said in table.to_html()
    chosen = js.prune(params, 0.5, where="cls|wte|up")
    assert js.report.table(*chosen).left_dense == ""


def test_a_number_is_asked_of_pruned_parameters_only():
    table = js.report.table(PARAMS, MASKS, asked=0.5)
    assert [row.asked for row in table.rows] == [None, 0.5]
    assert table.pruned.asked == 0.5
    assert table.total.asked == pytest.approx(3 / 9)


def test_an_allocation_is_asked():
    params = {"a": ones(4, 8), "b": ones(8, 16), "bias": ones(3)}
    asked = js.allocations.erk(params, 0.75)
    table = js.report.table(*js.prune(params, asked), asked=asked)
    assert [row.asked for row in table.rows] == [asked["a"], asked["b"], 0.0]
    assert table.pruned.asked == pytest.approx(0.75)


def test_channel_mask_counts_its_broadcast():
    mask = np.array([[True, False, False]])
    table = js.report.table({"k": ones(4, 3)}, {"k": jnp.asarray(mask)})
    row = table.rows[0]
    assert (row.kept, row.size, row.leaked) == (4, 12, 8)
    assert row.packed_bytes == 4 * 4 + 2  # 12 bits take two bytes
    assert row.reached == pytest.approx(2 / 3)


def test_scalar_masks():
    params = {"off": jnp.asarray(0 * VALUES), "on": ones(2, 3)}
    table = js.report.table(params, {"off": np.False_, "on": np.True_})
    off, on = table.rows
    assert (off.kept, off.reached, off.packed_bytes, off.pruned) == (0, 1.0, 1, True)
    assert (on.kept, on.reached, on.packed_bytes, on.pruned) == (6, 0.0, 24, False)


def test_full_mask_of_true_is_pruned_at_zero():
    """A schedule that has not begun: a bitmap already costs its bits."""
    table = js.report.table({"k": ones(2, 3)}, {"k": ones(2, 3, dtype=bool)})
    row = table.rows[0]
    assert (row.reached, row.packed_bytes, row.pruned) == (0.0, 25, True)


@pytest.mark.parametrize(
    ("dtype", "item"),
    [(jnp.bfloat16, 2), (jnp.float16, 2), (jnp.float32, 4), (jnp.float8_e4m3fn, 1)],
)
def test_bytes_of_types(dtype, item):
    params = {"k": jnp.asarray(VALUES.astype(dtype))}
    row = js.report.table(params, {"k": MASK}).rows[0]
    assert row.dtype == np.dtype(dtype).name
    assert (row.dense_bytes, row.packed_bytes) == (6 * item, 3 * item + 1)
    assert row.leaked == 0


def test_mixed_types_in_the_total():
    params = {"a": KERNEL, "b": jnp.asarray(VALUES.astype(jnp.bfloat16))}
    table = js.report.table(params, {"a": MASK, "b": MASK})
    assert table.total.dtype == "mixed"
    assert table.total.dense_bytes == 24 + 12


def test_without_masks_zeros_of_selected_parameters_are_removed():
    table = js.report.table(PARAMS)
    assert row_of(table, "kernel").kept == 3
    # The bias has two zeros, but takes no part by default.
    assert row_of(table, "bias").kept == 3
    assert not row_of(table, "bias").pruned


def test_numpy_and_sharded_parameters_count_alike():
    mesh = jax.make_mesh((8,), ("x",))
    kernel = np.arange(16 * 4, dtype=np.float32).reshape(16, 4) % 3
    mask = kernel != 1
    sharding = NamedSharding(mesh, P("x", None))
    sharded = [{"k": jax.device_put(x, sharding)} for x in (kernel, mask)]
    expected = js.report.table({"k": kernel}, {"k": mask})
    assert expected.rows[0].kept == int(mask.sum())
    assert expected.rows[0].leaked == int((kernel == 1).sum()) > 0
    assert js.report.table(*sharded) == expected


def test_small_float64_of_numpy_is_not_zero():
    params = {"k": np.array([[1e-300, 1.0]])}
    assert js.report.table(params).rows[0].kept == 2
    leaky = js.report.table(params, {"k": np.array([[False, True]])})
    assert leaky.rows[0].leaked == 1


def test_shapes_alone():
    shapes = jax.eval_shape(lambda: PARAMS)
    table = js.report.table(shapes, MASKS)
    assert table.rows[1] == js.report.table(PARAMS, MASKS).rows[1]
    assert (
        js.report.table(shapes, {**MASKS, "kernel": ~np.asarray(MASK)}).total.leaked
        == 0
    )


def test_other_dtypes_take_no_part():
    params = {"key": jax.random.key(0), "k": KERNEL, "step": jnp.int32(3)}
    table = js.report.table(params)
    assert [row.pruned for row in table.rows] == [True, False, False]


# Leaks


def test_leaked_counts_nonzero_weights_under_false():
    kernel = VALUES.copy()
    kernel[0, 1], kernel[1, 2] = np.nan, -1
    table = js.report.table({"kernel": jnp.asarray(kernel)}, {"kernel": MASK})
    assert (table.rows[0].leaked, table.total.leaked) == (2, 2)
    assert table.warning.startswith("2 pruned weights are not zero at this moment.")
    for view in (str(table), table.to_html()):
        assert "js.enforce" in view
        assert "js.apply_updates(params" in " ".join(view.split())
        assert "leaked" in view


def test_no_leak_no_warning():
    table = js.report.table(PARAMS, MASKS)
    for view in (str(table), table.to_html()):
        assert "enforce" not in view
        assert "leaked" not in view


def test_literal_chain_leaks_and_apply_updates_does_not():
    prune = js.prune_schedule(0.5, every=1)
    params = {"kernel": jnp.asarray(np.array([[3.0, 1.0]], np.float32))}
    literal = optax.chain(prune, optax.sgd(0.1))
    start = jax.jit(literal.init)(params)
    updates, state = jax.jit(literal.update)(params, start, params)
    leaky = js.report.table(optax.apply_updates(params, updates), opt_state=state)
    assert leaky.total.leaked == 1
    assert "1 pruned weight is not zero at this moment" in leaky.warning
    held = js.report.table(js.apply_updates(params, updates, state), opt_state=state)
    assert (held.total.leaked, held.total.kept) == (0, 1)


def test_counter_of_the_state_is_in_the_warning():
    prune = js.prune_schedule(0.5, every=1)
    params = {"kernel": jnp.asarray(np.array([[3.0, 0.0]], np.float32))}
    start = jax.jit(prune.init)(params)
    state = jax.jit(prune.update)(params, start, params)[1]
    state = state._replace(leaked=jnp.int32(1234))
    table = js.report.table(params, opt_state=(state,))
    assert (table.total.leaked, table.state_leaked) == (0, 1234)
    assert "up to 1,234 pruned weights were found nonzero" in table.warning
    assert "js.enforce" in str(table)


# NNX


def nnx_model():
    class Model(nnx.Module):
        def __init__(self):
            kernel = lambda *_: jnp.asarray(np.arange(1, 9, dtype="f4").reshape(2, 4))
            self.layer = nnx.Linear(2, 4, kernel_init=kernel, rngs=nnx.Rngs(0))

    return Model()


def test_nnx_parameters_with_masks_of_the_optimizer():
    model = nnx_model()
    tx = js.enforce(optax.chain(js.prune_schedule(0.5, every=1), optax.sgd(0.1)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    nnx.jit(lambda optimizer, model: optimizer.update(model, gradients))(
        optimizer, model
    )
    params = nnx.state(model, nnx.Param)
    masks = js.masks_of(optimizer.opt_state)
    table = js.report.table(params, masks, asked=js.allocations.uniform(params, 0.5))
    assert [row.path for row in table.rows] == ["layer/bias", "layer/kernel"]
    kernel = table.rows[1]
    assert (kernel.kept, kernel.size, kernel.asked, kernel.leaked) == (4, 8, 0.5, 0)
    assert kernel.packed_bytes == 4 * 4 + 1
    from_state = js.report.table(params, opt_state=optimizer.opt_state)
    assert [r.kept for r in from_state.rows] == [r.kept for r in table.rows]
    assert js.report.table(params).rows == from_state.rows


def test_nnx_masks_in_variables():
    """What js.prune makes of a State is a State of variables again."""
    pruned = js.prune(nnx.state(nnx_model(), nnx.Param), 0.25)
    table = js.report.table(*pruned)
    assert [(row.path, row.kept) for row in table.rows] == [
        ("layer/bias", 4),
        ("layer/kernel", 6),
    ]
    assert js.report.table(pruned.params).total.kept == 10


# Views


EXPECTED = """\
Run 7

  parameter           shape    dtype     reached   kept   weights   dense   packed
 ----------------------------------------------------------------------------------
  bias                (3,)     float32         -      3         3    12 B     12 B
  kernel              (2, 3)   float32   50.00 %      3         6    24 B     13 B

  pruned parameters            float32   50.00 %      3         6    24 B     13 B
  total                        float32   33.33 %      6         9    36 B     25 B

packed: what the kept weights and one bit for each weight would take. Arrays with
masks take what dense ones do, and are as slow.
""".replace("--", "──")


def test_text_is_exact():
    table = js.report.table(PARAMS, MASKS, title="Run 7")
    assert str(table).splitlines() == EXPECTED.splitlines()
    asked = str(js.report.table(PARAMS, MASKS, asked=0.4)).splitlines()
    assert asked[2].split()[3:5] == ["asked", "reached"]
    assert asked[4].split()[2:5] == ["float32", "-", "-"]
    assert asked[5].split()[4:8] == ["40.00", "%", "50.00", "%"]
    assert asked[8].split()[2:6] == ["26.67", "%", "33.33", "%"]


def test_blocks_are_shown_by_their_numbers():
    params = {f"block_{i}": {"b": KERNEL, "a": KERNEL} for i in (1, 2, 10)}
    table = js.report.table(*js.prune(params, 0.5))
    assert [row.path for row in table.rows][:4:2] == ["block_1/a", "block_10/a"]
    for text in (str(table), table.to_html()):
        at = [text.index(f"block_{i}/{k}") for i in (1, 2, 10) for k in "ab"]
        assert at == sorted(at)


def test_the_packed_column_has_a_legend_where_something_is_pruned():
    pruned, dense = (
        js.report.table(PARAMS, m) for m in (MASKS, {**MASKS, "kernel": MASKS["bias"]})
    )
    for view in (str, lambda table: table.to_html()):
        assert "packed: what the kept weights and" in " ".join(view(pruned).split())
        assert "packed: " not in view(dense)


def test_text_cuts_nothing_and_obeys_no_markup():
    path = "a_very_long_name_" * 20 + "[red]x[/red]"
    assert path in str(js.report.table({path: KERNEL}, {path: MASK}))


def rendered(table, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_narrow_terminal_leaves_out_columns_and_cuts_no_number():
    params = {f"block_{i}/kernel": ones(64, 100) for i in range(2)}
    table = js.report.table(*js.prune(params, 0.5), asked=0.5)
    wide, narrow = rendered(table, 200), rendered(table, 60)
    assert "dtype" in wide
    assert "(64, 100)" in wide
    assert "dtype" not in narrow
    for text in ("50.00 %", "3,200", "6,400", "13.3 KiB", "block_1/kernel"):
        assert text in narrow
    assert max(map(len, narrow.splitlines())) <= 60


def test_long_path_folds_before_a_number_does():
    params = {"layers/" * 12 + "kernel": ones(64, 100)}
    text = rendered(js.report.table(*js.prune(params, 0.5), asked=0.5), 44)
    for number in ("50.00 %", "3,200", "13.3 KiB"):
        assert text.count(number) == (4 if number == "50.00 %" else 2)


def test_text_in_a_notebook(monkeypatch):
    expected = str(js.report.table(PARAMS, MASKS))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(js.report.table(PARAMS, MASKS)) == expected


def test_all_pruned_has_one_total():
    text = str(js.report.table({"kernel": KERNEL}, {"kernel": MASK}))
    assert "pruned parameters" not in text
    assert "total" in text


def test_html_escapes():
    path = "<script>alert(1)</script>"
    table = js.report.table({path: KERNEL}, {path: MASK}, title="<b>&")
    text = table.to_html()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;&amp;" in text
    assert table._repr_html_() == text


def test_html_has_a_cell_for_every_number():
    text = js.report.table(PARAMS, MASKS, asked=0.5).to_html()
    assert text.startswith("<table")
    assert text.endswith("</table>")
    assert text.count("<tr") == 1 + 2 + 2 + 1  # the last is the legend
    assert text.count("<td") == 4 * 9 + 1
    assert text.count("<th ") == 9
    for cell in ("50.00 %", "33.33 %", "(2, 3)", "13 B", "kernel"):
        assert f">{cell}<" in text


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.9, "90.00 %"),
        (0.0, "0.00 %"),
        (1.0, "100.00 %"),
        (0.999996, "99.9996 %"),
        (0.000002, "0.0002 %"),
        (None, "-"),
    ],
)
def test_percent(x, text):
    assert percent(x) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (int(2.5 * 1024**3), "2.5 GiB"),
        (5000 * 1024**4, "5000.0 TiB"),
    ],
)
def testsize_text(n, text):
    assert size_text(n) == text


# Bad input


def test_masks_of_another_structure():
    with pytest.raises(ValueError, match=r"masks must have exactly.*missing 'bias'"):
        js.report.table(PARAMS, {"kernel": MASK})


def test_masks_that_do_not_broadcast():
    with pytest.raises(ValueError, match=r"kernel: a mask of shape \(3, 2\)"):
        js.report.table(PARAMS, {**MASKS, "kernel": np.asarray(MASK).T})


def test_masks_of_floats():
    with pytest.raises(TypeError, match="kernel: a mask holds bools"):
        js.report.table(PARAMS, {**MASKS, "kernel": VALUES})


def test_asked_outside():
    with pytest.raises(ValueError, match=r"asked must lie in \[0, 1\).*write 0\.9"):
        js.report.table(PARAMS, MASKS, asked=90)
    with pytest.raises(ValueError, match="kernel: asked must lie in"):
        js.report.table(PARAMS, MASKS, asked={"bias": 0.0, "kernel": 1.5})
    with pytest.raises(ValueError, match="asked must have exactly the structure"):
        js.report.table(PARAMS, MASKS, asked={"kernel": 0.5, "weight": 0.5})
    assert js.report.table(PARAMS, MASKS, asked={"^k": 0.5}).pruned.asked == 0.5
    with pytest.raises(TypeError, match="asked must be a number"):
        js.report.table(PARAMS, MASKS, asked=lambda step: 0.5)


def test_state_without_pruning():
    state = optax.adam(1e-3).init(PARAMS)
    with pytest.raises(ValueError, match="No pruning transformation"):
        js.report.table(PARAMS, opt_state=state)


def test_shapes_without_masks():
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(ValueError, match=r"kernel: without masks.*no values"):
        js.report.table(shapes)


def test_not_an_array():
    with pytest.raises(TypeError, match=r"name: a parameter is an array.*'x'"):
        js.report.table({"name": "x"}, {"name": np.True_})


def test_under_jit():
    with pytest.raises(ValueError, match=r"bias: .*outside jit"):
        jax.jit(lambda p: js.report.table(p, MASKS).total.kept)(PARAMS)
    with pytest.raises(ValueError, match=r"kernel: its mask .*outside jit"):
        jax.jit(lambda m: js.report.table({"kernel": KERNEL}, m).total.kept)({
            "kernel": MASK
        })
