"""Safetensors files that are read and written one tensor at a time."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from v3d_jax.errors import UserError
from v3d_jax.weights import tensors

VALUES = {
    "half": np.arange(3, dtype=np.float16),
    "brain": np.arange(5).astype(ml_dtypes.bfloat16).reshape(5, 1),
    "single": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "codes": np.arange(-2, 3, dtype=np.int8),
    "scalar": np.float32(2.5).reshape(()),
    "empty": np.zeros((0, 4), np.float32),
    "long": np.arange(2, dtype=np.int64),
}


class Told:
    """Takes the place of a progress bar."""

    def __init__(self):
        self.total, self.bytes = 0, []

    def reset(self, total):
        self.total = total

    def update(self, n):
        self.bytes.append(n)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(np.asarray(found[name]), values, err_msg=name)


def test_files_are_those_of_the_library(tmp_path):
    told = Told()
    tensors.write(tmp_path / "a.safetensors", VALUES, {"format": "pt"}, told)
    assert_same(safetensors_numpy.load_file(tmp_path / "a.safetensors"), VALUES)
    assert sum(told.bytes) == sum(values.nbytes for values in VALUES.values())
    found, metadata = tensors.open_file(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"}
    assert_same(found, VALUES)
    safetensors_numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in VALUES.items()}, tmp_path / "b.safetensors"
    )
    assert_same(tensors.open_file(tmp_path / "b.safetensors")[0], VALUES)


def test_every_tensor_starts_at_a_multiple_of_its_element(tmp_path):
    tensors.write(tmp_path / "a.safetensors", VALUES)
    data = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % VALUES[name].itemsize == 0, name


def test_values_are_read_when_they_are_asked_for(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors.write(path, VALUES)
    found, _ = tensors.open_file(path)
    changed = VALUES | {"codes": np.full(5, 7, np.int8)}
    tensors.write(path, changed)
    assert_same(found, changed)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="cut short"):
        [np.asarray(tensor) for tensor in found.values()]
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        np.asarray(found["single"])


def test_types_that_numpy_lacks_are_refused_by_name(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match=r"w has the unsupported type F8_E4M3"):
        tensors.open_file(path)


@pytest.mark.parametrize("data", [b"", b"\x08", (10**9).to_bytes(8, "little") + b"{}"])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        tensors.open_file(path)


def test_a_tensor_that_is_not_as_announced_is_an_error(tmp_path):
    lying = tensors.Lazy((3,), np.dtype(np.float32), lambda: np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="not as announced"):
        tensors.write(tmp_path / "a.safetensors", {"w": lying})


def test_several_files_and_their_index(tmp_path):
    values = {f"w{i}": np.full(10, i, np.float32) for i in range(5)}
    tensors.write_shards(tmp_path, "m", values, 80, index=True)
    places = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    assert places["metadata"] == {"total_size": 200}
    assert places["weight_map"]["w2"] == "m-00002-of-00003.safetensors"
    for name, file in places["weight_map"].items():
        np.testing.assert_array_equal(
            safetensors_numpy.load_file(tmp_path / file)[name], values[name]
        )
    tensors.write_shards(tmp_path, "n", values, 10**6, index=True)
    assert [path.name for path in tmp_path.glob("n*")] == ["n.safetensors"]


def test_types_change_and_large_values_stay():
    given = {
        "wide": np.float32([1.0, 1e5]),
        "brain": np.asarray([2.0, 3e38], ml_dtypes.bfloat16),
        "fine": np.float32([1.0, 2.0**-30]),
        "double": np.float64([0.1]),
    }
    halves = tensors.cast(given, "float16")
    assert {name: str(x.dtype) for name, x in halves.items()} == {
        "wide": "float32",
        "brain": "float32",
        "fine": "float16",
        "double": "float16",
    }
    np.testing.assert_array_equal(np.asarray(halves["fine"]), np.float16([1.0, 2.0**-30]))
    kept = tensors.cast(given, None)
    assert [str(x.dtype) for x in kept.values()] == ["float32", "bfloat16", "float32", "float32"]
    assert np.asarray(kept["double"]) == np.float32(0.1)


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused_by_name(kind, bad, monkeypatch):
    monkeypatch.setattr(tensors, "_PROBED", 2)
    values = np.zeros(7, kind)
    values[5] = bad
    with pytest.raises(UserError, match="w holds NaN or infinite"):
        np.asarray(tensors.cast({"w": values}, "float16")["w"])


def test_a_full_disk_is_said_beforehand(tmp_path):
    told = Told()
    tensors.begin(tmp_path / "new" / "model", VALUES.values(), told)
    assert told.total == sum(values.nbytes for values in VALUES.values())
    huge = tensors.Lazy((10**9, 10**9), np.dtype(np.int8), lambda: np.zeros(0))
    with pytest.raises(UserError, match=r"needs 1000000000\.00 GB, but the disk has"):
        tensors.begin(tmp_path / "new" / "model", [huge])
