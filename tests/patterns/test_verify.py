import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

stacked = js.Axes(input=(1,), output=(2,), batch=(0,))
CASES = [
    (js.Unstructured(), (8, 6), None),
    (js.NM(2, 4), (8, 6), None),
    (js.NM(2, 4), (2, 6, 5), js.Axes(input=(0, 1), output=(2,))),
    (js.Block((4, 2)), (8, 6), None),
    (js.Block((2, 2)), (3, 4, 4), stacked),
    (js.Balanced((2, 2)), (3, 8, 4), stacked),
    (js.Channel(), (8, 6), None),
    (js.Channel(), (3, 4, 4), stacked),
]


def verify(mask, pattern, axes=None):
    js.patterns.verify(
        {"block": {"w": jnp.asarray(mask)}},
        {"block": {"w": np.zeros(np.shape(mask), np.float32)}},
        pattern=pattern,
        axes=axes,
    )


@pytest.mark.parametrize(("pattern", "shape", "axes"), CASES)
def test_what_masks_makes_is_verified(pattern, shape, axes):
    scores = np.random.default_rng(0).random(shape).astype(np.float32)
    params = {"block": {"w": scores}}
    masks = js.patterns.masks(params, 0.5, pattern=pattern, axes=axes)
    js.patterns.verify(masks, params, pattern=pattern, axes=axes)


def test_the_first_group_that_keeps_too_many_is_named():
    mask = np.zeros((8, 6), bool)
    mask[4:7, 1] = True  # groups in row-major order: (0, 0) ... (0, 5) (1, 0) (1, 1)
    with pytest.raises(ValueError, match="block/w: group 7 keeps 3 of 4"):
        verify(mask, js.NM(2, 4))


def test_a_group_may_keep_fewer():
    verify(np.zeros((8, 6), bool), js.NM(2, 4))


def test_groups_run_along_the_stated_input_axis():
    mask = np.zeros((2, 8), bool)
    mask[:, ::2] = True
    verify(mask, js.NM(2, 4), js.Axes(input=(1,), output=(0,)))
    mask[1, 3] = True
    with pytest.raises(ValueError, match="group 2 keeps 3 of 4"):
        verify(mask, js.NM(2, 4), js.Axes((1,), (0,)))


@pytest.mark.parametrize("hole", [(0, 0), (5, 3), (7, 5)])
def test_a_tile_kept_in_part_is_named(hole):
    mask = np.ones((8, 6), bool)
    mask[hole] = False
    tile = hole[0] // 4 * 3 + hole[1] // 2
    with pytest.raises(ValueError, match=rf"block/w: unit {tile} is kept in part"):
        verify(mask, js.Block((4, 2)))


def test_a_channel_kept_in_part_is_named():
    mask = np.ones((8, 6), bool)
    mask[2, 4] = False
    with pytest.raises(ValueError, match=r"block/w: unit 4 is kept in part"):
        verify(mask, js.Channel())


def test_one_weight_of_many_is_enough_to_break_a_channel():
    # A mean in float32 would be rounded to 1.
    mask = np.ones((2**25, 1), bool)
    mask[3] = False
    with pytest.raises(ValueError, match="unit 0 is kept in part"):
        verify(mask, js.Channel())


def test_stacked_layers_may_keep_different_channels():
    mask = np.zeros((3, 4, 4), bool)
    mask[0, :, 1] = mask[1, :, 2] = True
    verify(mask, js.Channel(), stacked)
    with pytest.raises(ValueError, match="kept in part"):
        verify(mask, js.Channel())


def test_an_axis_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"block/w: .* asks for axis 5"):
        verify(np.ones((8, 6), bool), js.Channel(axis=5))


def test_what_is_not_selected_is_not_looked_at():
    mask = np.zeros((8, 6), bool)
    masks = {"bias": jnp.asarray(~mask[:, 0]), "w": jnp.asarray(mask)}
    params = {"bias": np.ones(8), "w": np.ones((8, 6))}
    js.patterns.verify(masks, params, pattern=js.NM(2, 4))


def test_masks_of_another_model_are_refused():
    with pytest.raises(ValueError, match="exactly the structure of params"):
        js.patterns.verify(
            {"a": np.array(True)}, {"b": np.ones((4, 4))}, pattern=js.NM(2, 4)
        )


def test_a_group_of_outputs_with_another_count_is_named():
    mask = np.zeros((2, 8, 6), bool)
    mask[:, :4] = True
    axes = js.Axes(input=(1,), output=(2,), batch=(0,))
    verify(mask, js.Balanced((2, 3)), axes)
    mask[1, 4:6, 3:] = True
    message = "block/w: group 1 of 3 outputs keeps 3 tiles, the first .* keeps 2"
    with pytest.raises(ValueError, match=message):
        verify(mask, js.Balanced((2, 3)), axes)
    with pytest.raises(ValueError, match=r"block/w: unit .* is kept in part"):
        verify(mask, js.Balanced((4, 3)), axes)
