"""Flipped bits, cut files and missing ones: named, and never restored."""

import json
import shutil
import zlib

import damage
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse._checksums import checksum, checksums
from jaxsparse.checkpoint import _files

save, restore, steps = js.checkpoint.save, js.checkpoint.restore, js.checkpoint.steps
RNG = np.random.default_rng(0)
# Noise, which does not compress: most bits are of arrays.
PARAMS = {
    "dense": {"kernel": jnp.asarray(RNG.standard_normal((16, 24)), jnp.float32)},
    "half": jnp.asarray(RNG.standard_normal(64), jnp.bfloat16),
    "host": RNG.standard_normal(32),
    "empty": np.zeros((0, 3)),
}
MASKS = {
    "dense": {"kernel": jnp.asarray(RNG.random((16, 24)) < 0.5)},
    "half": np.array(True),
    "host": RNG.random(32) < 0.5,
    "empty": np.array(True),
}
STATE = (jax.random.key(3), 7, jnp.asarray(RNG.random((40, 9)) < 0.5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    for step in (1, 2, 3):
        save(directory, step=step, params=PARAMS, opt_state=STATE, masks=MASKS)
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def read(directory, step=None):
    got = restore(directory, params=PARAMS, opt_state=STATE, step=step)
    return got.params, got.opt_state, got.masks


def bits(tree):
    def of_leaf(x):
        if jnp.issubdtype(getattr(x, "dtype", int), jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).tobytes()

    return list(map(of_leaf, jax.tree.leaves(tree)))


def files_of(path, *names):
    files = [file for name in names for file in (path / name).rglob("*")]
    return [f for f in files if f.is_file() and f.name != "commit_success.txt"]


# Once reading has failed, tensorstore has no one to tell of the rest.
quiet = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


@quiet
@pytest.mark.parametrize("item", ["params", "opt_state", "masks", "stamp"])
@pytest.mark.parametrize(
    "count", [10, pytest.param(100, marks=pytest.mark.exhaustive)], ids=str
)
def test_a_flipped_bit_is_an_error_or_changes_nothing(directory, item, count):
    expected = bits((PARAMS, STATE, MASKS))
    found = 0
    for file, bit in damage.places(files_of(directory / "3", item), count):
        got = []
        with damage.flipped(file, bit):
            said = damage.error_of(lambda got=got: got.append(read(directory)))
        if said is None:
            assert bits(got) == expected, (file, bit)
            continue
        found += 1
        assert str(directory / "3") in said, (file, bit)
        # A later version is not damaged.
        if "Upgrade jaxsparse" not in said and "no format" not in said:
            assert "is damaged" in said, (file, bit)
            assert item in said, (file, bit)
            assert "step that is whole is 2" in said, (file, bit)
    assert found > count / 6  # others are left from writing, and not read
    assert bits(read(directory)) == expected


def data_file(path):
    """The file with the arrays, of those that orbax reads."""
    return max((path / "d").iterdir(), key=lambda file: file.stat().st_size)


def corrupted(directory, step):
    """Another array under a checkpoint's stamp, in whole files."""
    other = jax.tree.map(lambda x: x, PARAMS)
    other["dense"] = {"kernel": PARAMS["dense"]["kernel"].at[3, 4].mul(-1)}
    own = directory.with_name("other")
    save(own, step=step, params=other, opt_state=STATE, masks=MASKS)
    shutil.rmtree(directory / str(step) / "params")
    shutil.copytree(own / str(step) / "params", directory / str(step) / "params")
    _files.list_files(directory / str(step))


def test_an_array_that_is_not_what_was_saved(directory):
    corrupted(directory, 3)
    assert steps(directory) == [1, 2, 3], "which does not read arrays"
    with pytest.raises(
        ValueError,
        match=r"run/3 is damaged: params dense/kernel is not what was saved: its CRC-32"
        r".*in the folder params\. The newest older step that is whole is 2: restore",
    ):
        read(directory)
    shutil.rmtree(directory.with_name("other"))
    corrupted(directory, 2)
    with pytest.raises(ValueError, match=r"older step that is whole is 1: restore"):
        read(directory)
    with pytest.raises(ValueError, match=r"run/2 is damaged.*that is whole is 1"):
        read(directory, step=2)
    assert bits(read(directory, step=1)) == bits((PARAMS, STATE, MASKS))


@quiet
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: data_file(p / "params").write_bytes(b""), r"has 0 bytes, \d+ bytes"),
        (lambda p: data_file(p / "masks").unlink(), r"masks/d/\w+ is missing"),
        (lambda p: shutil.rmtree(p / "opt_state"), r"opt_state/\S+ is missing"),
        (lambda p: (p / "stamp/metadata").write_text("{"), r"metadata cannot be read"),
        (lambda p: (p / "stamp/metadata").unlink(), r"stamp/metadata cannot be read"),
    ],
    ids=["cut", "file", "folder", "stamp", "no stamp"],
)
def test_what_is_not_whole_is_not_listed(directory, harm, message):
    harm(directory / "3")
    assert steps(directory) == [1, 2]
    assert js.checkpoint.latest_step(directory) == 2
    with pytest.raises(ValueError, match=rf"run/3 is damaged: .*{message}.*whole is 2"):
        read(directory)
    assert bits(read(directory, step=2)) == bits((PARAMS, STATE, MASKS))
    # The training goes on from there, and saves that step once more.
    save(directory, step=3, params=PARAMS, opt_state=STATE, masks=MASKS, keep=2)
    assert steps(directory) == [2, 3]
    assert bits(read(directory)) == bits((PARAMS, STATE, MASKS))


@pytest.mark.parametrize("harm", [r"stamp/files.json", "opt_state/_METADATA"])
def test_what_is_damaged_and_not_needed_is_a_warning(directory, harm):
    (directory / "3" / harm).write_text("{}")
    assert steps(directory) == [1, 2]
    with pytest.warns(UserWarning, match=rf"run/3: {harm} .*asked for is as it was"):
        restored = restore(directory, params=PARAMS)
    assert bits(restored.params) == bits(PARAMS)


def test_damaged_ones_do_not_count_among_those_to_keep(directory):
    data_file(directory / "2" / "params").write_bytes(b"")
    save(directory, step=4, params=PARAMS, keep=3)
    assert steps(directory) == [1, 3, 4]
    assert not (directory / "2").exists()


def test_the_first_step_is_damaged(tmp_path):
    path = save(tmp_path, step=1, params=PARAMS)
    data_file(path / "params").write_bytes(b"")
    assert steps(tmp_path) == []
    with pytest.raises(ValueError, match=r"/1 is damaged.*no older step that is whole"):
        restore(tmp_path, params=PARAMS)


def test_a_damaged_replacement_does_not_take_the_place_of_a_whole_step(directory):
    shutil.copytree(directory / "3", directory / "3.replacement")
    data_file(directory / "3.replacement" / "params").unlink()
    assert steps(directory) == [1, 2, 3]
    assert bits(read(directory)) == bits((PARAMS, STATE, MASKS))
    save(directory, step=4, params=PARAMS)
    assert steps(directory) == [1, 2, 3, 4]
    assert not (directory / "3.replacement").exists()
    assert bits(read(directory, step=3)) == bits((PARAMS, STATE, MASKS))


def without_checksums(path):
    """A checkpoint as the version before wrote it."""
    (path / "stamp" / "files.json").unlink()
    file = path / "stamp" / "metadata"
    stamp = json.loads(file.read_text())
    file.write_text(json.dumps({k: stamp[k] for k in stamp.keys() - NEW}))


NEW = {"crc32", "checksums"}


def test_a_checkpoint_without_checksums_is_read(directory):
    without_checksums(directory / "3")
    assert steps(directory) == [1, 2, 3]
    assert bits(read(directory)) == bits((PARAMS, STATE, MASKS))
    shutil.rmtree(directory / "3" / "masks")
    assert steps(directory) == [1, 2]


def test_a_killed_save_whose_files_are_not_listed_is_whole(directory):
    (directory / "3" / "stamp" / "files.json").unlink()
    assert steps(directory) == [1, 2, 3]
    assert bits(read(directory)) == bits((PARAMS, STATE, MASKS))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"shape": [24, 16]},
            r"got a mask bool\[24, 16\], expected a bool mask",
        ),
        ({"shape": [16]}, r"dense/kernel: got a mask bool\[16\]"),
        ({"dtype": "float32"}, r"got a mask float32\[16, 24\]"),
        (None, r"only params or only masks have dense/kernel"),
    ],
    ids=["transposed", "an axis less", "floats", "missing"],
)
def test_a_stamp_whose_masks_are_not_of_its_parameters(directory, record, message):
    file = directory / "3" / "stamp" / "metadata"
    stamp = json.loads(file.read_text())
    masks = stamp["leaves"]["masks"]
    if record is None:
        del masks["dense/kernel"]
    else:
        masks["dense/kernel"] |= record
    file.write_text(json.dumps(_files.sealed(stamp)))
    _files.list_files(directory / "3")
    with pytest.raises(ValueError, match=r"run/3: its masks do not fit .*" + message):
        read(directory)


def test_a_mask_packed_along_another_axis(directory):
    without_checksums(directory / "3")
    file = directory / "3" / "stamp" / "metadata"
    stamp = json.loads(file.read_text())
    record = stamp["leaves"]["masks"]["dense/kernel"]
    record["packed_axis"] = 1 - record["packed_axis"]
    file.write_text(json.dumps(stamp))
    with pytest.raises(ValueError, match=r"masks dense/kernel is uint8\[.*its stamp"):
        read(directory)


SPECS = [P(), P("x"), P(None, "y"), P("y", "x"), P(("x", "y")), P(None, ("x", "y"))]


@pytest.mark.parametrize("shape", [(16, 48), (8, 8), (24, 16, 2), (8, 16, 3, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.bool_, jnp.bfloat16])
def test_a_checksum_is_that_of_the_bytes_on_any_devices(shape, dtype):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    values = (10 * RNG.standard_normal(shape)).astype(dtype)
    expected = zlib.crc32(values.tobytes())
    arrays = {s: jax.device_put(values, NamedSharding(mesh, s)) for s in SPECS}
    arrays["host"], arrays["turned"] = values, values.T.copy().T
    assert set(checksums(arrays).values()) == {expected}
    assert checksum(values) == expected


def test_checksums_of_many_short_rows():
    mesh = jax.make_mesh((8,), ("x",))
    values = RNG.standard_normal((20_000, 8)).astype(np.float32)
    spread = jax.device_put(values, NamedSharding(mesh, P(None, "x")))
    assert checksums({"": spread}) == {"": zlib.crc32(values.tobytes())}


@pytest.mark.parametrize("name", ["int4", "uint4", "int2"])
def test_bits_that_are_no_part_of_a_narrow_number_do_not_count(name):
    dtype = jnp.dtype(name)
    values = np.array([1, 0, 1]).astype(dtype)
    odd = (values.view(np.uint8) | np.uint8(0b1010_0000)).view(dtype)
    np.testing.assert_array_equal(odd.astype(np.float32), values.astype(np.float32))
    assert checksum(odd) == checksum(values)


def test_saved_on_eight_devices_and_checked_on_others(tmp_path):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    place = lambda spec: NamedSharding(mesh, spec)
    put = lambda x, spec: jax.device_put(x, place(spec))
    w = RNG.standard_normal((16, 24)).astype(np.float32)
    save(tmp_path, step=1, params={"w": put(w, P("x", "y"))})
    other = {"w": put(w + 1, P("x", "y"))}
    save(tmp_path, step=2, params=other)
    shutil.rmtree(tmp_path / "2" / "params")
    shutil.copytree(tmp_path / "1" / "params", tmp_path / "2" / "params")
    _files.list_files(tmp_path / "2")
    for sharding in (place(P("y", "x")), place(P()), place(P(None, "x")), None):
        template = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)}
        got = restore(tmp_path, params=template, step=1).params["w"]
        np.testing.assert_array_equal(np.asarray(got), w)
        with pytest.raises(ValueError, match=r"params w is not what was saved"):
            restore(tmp_path, params=template)
