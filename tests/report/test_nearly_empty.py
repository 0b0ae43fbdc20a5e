import numpy as np

import jaxsparse as js


def masks_keeping(counts, shape=(20, 20)):
    mask = lambda n: (np.arange(np.prod(shape)) < n).reshape(shape)
    return {f"layer_{n}": mask(n) for n in counts}


def test_layers_that_keep_next_to_nothing_are_marked():
    masks = masks_keeping([0, 1, 2, 3, 400])  # sqrt(400) / 10 = 2
    params = {k: np.where(m, 1.0, 0.0).astype(np.float32) for k, m in masks.items()}
    table = js.report.table(params, masks)
    marked = [row.path for row in table.rows if row.nearly_empty]
    assert marked == ["layer_0", "layer_1", "layer_2"]
    assert "layer_1 (1 of 400)" in table.note
    assert "min_keep" in table.note
    assert table.warning == ""
    for text in (str(table), table.to_html()):
        assert "1 !" in text
        assert "layer_2 (2 of 400)" in " ".join(text.split())


def test_channels_count_where_a_mask_has_one_number_for_each():
    mask = np.arange(64)[None] == 5
    params = {"w": np.where(mask, 1.0, 0.0) * np.ones((500, 64), np.float32)}
    (row,) = js.report.table(params, {"w": mask}).rows
    assert row.kept == 500
    assert row.nearly_empty


def test_what_is_not_pruned_or_keeps_enough_is_not_marked():
    params = {"scalar": np.float32(1), "one": np.ones(1, np.float32)}
    params["w"] = np.ones((20, 20), np.float32)
    masks = {"scalar": np.True_, "one": np.ones(1, bool), "w": np.ones((20, 20), bool)}
    table = js.report.table(params, masks)
    assert not any(row.nearly_empty for row in table.rows)
    assert table.note == ""
