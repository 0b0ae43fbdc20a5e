"""Files that others made: what is wrong is said, whatever their checksums say."""

import json
import re
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxsparse as js
from jaxsparse.checkpoint import _files

PARAMS = {"w": np.ones((8, 4), np.float32), "n": 3}
MASKS = {"w": np.ones((8, 4), bool), "n": np.array(True)}
ENDINGS = [".npz", ".safetensors"]
ESCAPE = "\x1b[2Jw\u202e"
SHOWN = "%1B[2Jw%E2%80%AE"


@pytest.fixture
def saved(tmp_path):
    return js.checkpoint.save(tmp_path, step=1, params=PARAMS, masks=MASKS)


def forged(path, change):
    """A stamp that was changed, with checksums that are right."""
    file = path / "stamp" / "metadata"
    stamp = json.loads(file.read_text())
    changed = change(stamp)
    stamp = stamp if changed is None else changed
    if isinstance(stamp, dict):
        stamp = _files.sealed(stamp)
    file.write_text(json.dumps(stamp))
    (path / "stamp" / "files.json").unlink(missing_ok=True)


def record(**changes):
    return lambda stamp: stamp["leaves"]["params"]["w"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [1], r"holds no dictionary"),
        (lambda s: None if s.pop("leaves") else s, r"its leaves is no dictionary"),
        (lambda s: s.update(leaves={}), r"it has no leaves of params"),
        (lambda s: s["leaves"].update(params=[1]), r"its params is no dictionary"),
        (lambda s: s["leaves"]["params"].update(w=7), r"of params w it says 7"),
        (lambda s: s.update(extra=None), r"its extra is no dictionary"),
        (lambda s: s.update(opt_state_has_masks=1), r"whether the opt_state has"),
        (lambda s: s.update(checksums=[]), r"its checksums is no dictionary"),
        (
            lambda s: s["checksums"]["params"].update(w="x"),
            r"CRC-32 of params w is 'x'",
        ),
        (record(shape=[8, -4]), r"the shape of params w is \[8, -4\]"),
        (record(shape=None), r"the shape of params w is None"),
        (record(dtype="getpid"), r"the type 'getpid' is none that this version knows"),
        (record(dtype=["f4"]), r"the type of params w is \['f4'\]"),
        (record(value=[1]), r"the value of params w is \[1\], no float32"),
        (record(packed_axis=-1), r"along which params w is packed is -1"),
        (record(impl=5), r"the generator of params w is 5"),
    ],
)
def test_a_stamp(tmp_path, saved, change, message):
    forged(saved, change)
    assert js.checkpoint.steps(tmp_path) == []
    with pytest.raises(ValueError, match=rf"/1 is damaged: stamp/metadata.*{message}"):
        js.checkpoint.restore(tmp_path, params=PARAMS)


def test_a_stamp_that_is_nested_too_deeply(tmp_path, saved):
    (saved / "stamp" / "metadata").write_text("[" * 100_000)
    assert js.checkpoint.latest_step(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"its files is no dictionary"),
        ({"a": 3}, r"of the file a it says 3"),
        ({"a": [3, "x"]}, r"of the file a it says"),
        ({"../../a": [3, None]}, r"the file \.\./\.\./a is not one of the checkpoint"),
    ],
)
def test_a_list_of_files(tmp_path, saved, files, message):
    content = _files.sealed({"files": files})
    (saved / "stamp" / "files.json").write_text(json.dumps(content))
    assert js.checkpoint.steps(tmp_path) == []
    with pytest.warns(UserWarning, match=rf"/1: stamp/files\.json .*{message}"):
        js.checkpoint.restore(tmp_path, params=PARAMS)


def rewritten(file, arrays, note):
    """An export with another text, and its right checksum."""
    text = json.dumps(note)
    crc = zlib.crc32(text.encode())
    if file.suffix == ".npz":
        named = {f"params/{name}": x for name, x in arrays.items()}
        np.savez(file, note=np.array(text), note_crc32=np.uint32(crc), **named)
    else:
        metadata = {"jaxsparse": text, "jaxsparse_crc32": str(crc)}
        save_file(arrays, file, metadata)


NOTE = {
    "types": {"w": "float32"},
    "shapes": {"w": [2]},
    "crc32": {"w": zlib.crc32(np.ones(2, np.float32).tobytes())},
}
DROP = {"indices": {"g": [0, 1]}, "sizes": {"g": 4}}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("note", "message"),
    [
        ([1], r"it holds list, no dictionary"),
        ({}, r"it has no dictionary 'types'"),
        ({"types": ["w"]}, r"it has no dictionary 'types'"),
        (NOTE | {"types": {"w": 7}}, r"types of w is 7, no str"),
        (NOTE | {"types": {"w": "finfo"}}, r"of w, the type 'finfo' is none that"),
        (NOTE | {"types": {"w": "object"}}, r"of w, the type 'object' is none that"),
        (NOTE | {"types": {"w": "iinfo"}}, r"of w, the type 'iinfo' is none that"),
        (NOTE | {"shapes": {}}, r"of w it says no shape or no CRC-32"),
        (NOTE | {"shapes": {"w": ["x"]}}, r"of w it says no shape"),
        (NOTE | {"shapes": None}, r"it has no dictionary 'shapes'"),
        (NOTE | {"crc32": 1}, r"it has no dictionary 'crc32'"),
        (NOTE | {"drop": 3}, r"its drop is no dictionary"),
        (NOTE | {"drop": {}}, r"it has no dictionary 'sizes'"),
        (NOTE | {"drop": DROP | {"sizes": {}}}, r"are of different groups"),
        (NOTE | {"drop": DROP | {"sizes": {"g": 1}}}, r"different indices below 1"),
        (NOTE | {"drop": DROP | {"indices": {"g": [1, 1]}}}, r"different indices"),
        (NOTE | {"drop": DROP | {"indices": {"g": ["a"]}}}, r"not integers in rows"),
        (NOTE | {"drop": DROP | {"indices": {"g": [[1], [1, 2]]}}}, r"not integers"),
    ],
)
def test_the_text_of_an_export(tmp_path, ending, note, message):
    file = tmp_path / f"m{ending}"
    arrays = {"w": np.ones(2, np.float32)}
    rewritten(file, arrays, NOTE | {"drop": DROP})
    assert js.checkpoint.load_export(file).drop.sizes == {"g": 4}
    rewritten(file, arrays, note)
    with pytest.raises(ValueError, match=rf"m\{ending}: its text cannot .*{message}"):
        js.checkpoint.load_export(file)


def compressed(file):
    """The same archive, as small as it gets."""
    with np.load(file) as read:
        np.savez_compressed(file, **dict(read))


def test_an_archive_that_unpacks_to_much_more(tmp_path):
    file = tmp_path / "m.npz"
    params = {"w": np.zeros((512, 512)), "v": np.arange(4)}
    js.checkpoint.export(file, params)
    js.checkpoint.load_export(file)
    compressed(file)
    with pytest.raises(ValueError, match=r"m\.npz: .* unpack to 2,\d+,\d+,.*max_bytes"):
        js.checkpoint.load_export(file)
    read = js.checkpoint.load_export(file, max_bytes=1 << 22).params
    np.testing.assert_array_equal(read["w"], params["w"])
    with pytest.raises(ValueError, match=r"max_bytes must be at least 1, got 0"):
        js.checkpoint.load_export(file, max_bytes=0)


@pytest.mark.parametrize("shape", [(1 << 40,), (3,), (2, -2)])
def test_a_header_that_promises_another_size(tmp_path, shape):
    file = tmp_path / "m.npz"
    js.checkpoint.export(file, {"w": np.ones(2)})
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    data = entries["params/w.npy"]
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"
    entries["params/w.npy"] = (
        data[:10] + header.ljust(117).encode() + b"\n" + data[128:]
    )
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"w cannot be read .*header promises float64"):
        js.checkpoint.load_export(file)


def test_two_entries_of_one_name(tmp_path):
    file = tmp_path / "m.npz"
    js.checkpoint.export(file, {"w": np.ones(2)})
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Dupl"):
        archive.writestr("params/w.npy", b"another")
    with pytest.raises(ValueError, match="two of its entries have one name"):
        js.checkpoint.load_export(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1], r"its header is no dictionary"),
        ({"w": {"dtype": "F99"}}, r"says of w .*no known type"),
        ({"w": {"dtype": ["F32"]}}, r"says of w .*no known type"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, r"says of w"),
        ({"w": {"dtype": "F32", "shape": [2]}}, r"its header says of w"),
        (
            {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
            r"its arrays would end after 4398046511104 bytes of 8",
        ),
        (
            {
                name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
                for name in "wv"
            },
            r"shares bytes with another",
        ),
    ],
)
def test_the_header_of_safetensors(tmp_path, header, message):
    file = tmp_path / "m.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=message):
        js.checkpoint.load_export(file)


@pytest.mark.parametrize("ending", ENDINGS)
def test_masks_of_other_shapes(tmp_path, ending):
    file = tmp_path / f"m{ending}"
    pruned = js.prune({"w": jnp.ones((4, 6)), "b": jnp.ones(6)}, 0.5)
    js.checkpoint.export(file, pruned)
    assert set(js.checkpoint.load_export(file).params) == {
        *("params/w", "params/b", "masks/w", "masks/b")
    }
    for masks, message in (
        ({"w": np.ones((6, 4), bool)}, r"masks/w is a mask of shape \[6, 4\]"),
        ({"v": np.ones((4, 6), bool)}, r"masks/v is a mask without a parameter"),
    ):
        tree = {"params": {"w": np.ones((4, 6))}, "masks": masks}
        with pytest.raises(ValueError, match=message):
            js.checkpoint.export(tmp_path / f"other{ending}", tree)
        arrays = {
            "params/w": np.ones((4, 6)),
            **{f"masks/{name}": mask for name, mask in masks.items()},
        }
        note = {
            "types": {name: x.dtype.name for name, x in arrays.items()},
            "shapes": {name: x.shape for name, x in arrays.items()},
            "crc32": {name: zlib.crc32(x.tobytes()) for name, x in arrays.items()},
        }
        rewritten(file, arrays, note)
        with pytest.raises(ValueError, match=message):
            js.checkpoint.load_export(file)


def test_what_is_no_drop(tmp_path):
    export = lambda drop: js.checkpoint.export(tmp_path / "m.npz", PARAMS, drop=drop)
    with pytest.raises(TypeError, match=r"drop: expected a js\.coupling\.Drop, as js"):
        export({"g": [1]})
    with pytest.raises(
        ValueError, match=r"drop: what is dropped of g is not different"
    ):
        export(js.coupling.Drop({"g": np.array([4])}, {"g": 4}))


@pytest.mark.parametrize("ending", ENDINGS)
def test_control_characters_are_escaped_where_they_are_shown(tmp_path, ending, capsys):
    tree = {ESCAPE: np.ones((2, 2), np.float32)}
    file = tmp_path / f"m{ending}"
    js.checkpoint.export(file, tree)
    assert list(js.checkpoint.load_export(file).params) == [ESCAPE]
    assert js.tree.leaves_with_paths(tree)[0][0] == SHOWN
    print(js.report.table(tree))
    assert SHOWN in capsys.readouterr().out
    data = bytearray(file.read_bytes())
    at = data.index(tree[ESCAPE].tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    errors = []
    for error, action in (
        (ValueError, lambda: js.checkpoint.load_export(file)),
        (TypeError, lambda: js.checkpoint.export(file, {ESCAPE: "text"})),
        (TypeError, lambda: js.checkpoint.save(tmp_path, step=1, params={ESCAPE: 1j})),
        (ValueError, lambda: js.prune(tree, 2.0)),
        (ValueError, lambda: js.patterns.check_masks({ESCAPE: np.ones(3, bool)}, tree)),
    ):
        with pytest.raises(error) as caught:
            action()
        errors.append(str(caught.value))
    js.checkpoint.save(tmp_path / "run", step=1, params=tree)
    assert list(js.checkpoint.restore(tmp_path / "run", params=tree).params) == [ESCAPE]
    for template in ({"w": 1}, {ESCAPE: np.ones(3)}):
        with pytest.raises(ValueError, match=re.escape(SHOWN)) as caught:
            js.checkpoint.restore(tmp_path / "run", params=template)
        errors.append(str(caught.value))
    assert all(said.isprintable() for said in errors), errors


@pytest.mark.parametrize("ending", ENDINGS)
def test_names_that_end_alike(tmp_path, ending):
    tree = {name: np.full(2, i) for i, name in enumerate(["w", "w.npy", "w.npy.npy"])}
    js.checkpoint.export(tmp_path / f"m{ending}", tree)
    read = js.checkpoint.load_export(tmp_path / f"m{ending}").params
    assert {name: x.tolist() for name, x in read.items()} == {
        name: x.tolist() for name, x in tree.items()
    }


def test_bools_packed_along_an_axis_that_is_not_there(tmp_path, saved):
    forged(saved, lambda s: s["leaves"]["masks"]["w"].update(packed_axis=5))
    with pytest.raises(
        ValueError, match=r"/1 is damaged: stamp/metadata says .*axis 5"
    ):
        js.checkpoint.restore(tmp_path, params=PARAMS)
