import argparse
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from published_files import contiguous, global_op, mapping, tensor, text, torch_zip

from v3d_jax.errors import UserError
from v3d_jax.weights import pickles


class Payload:
    """Unpickled by the standard library, this would run a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def write(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_nested_numpy_arrays(tmp_path, protocol):
    rng = np.random.default_rng(0)
    value = {
        "a": {"kernel": rng.standard_normal((3, 4)).astype(np.float32)},
        "half": [rng.standard_normal(5).astype(np.float16), np.arange(6, dtype=">i4")],
        "fortran": np.asfortranarray(rng.standard_normal((2, 3))),
        "scalar": np.float32(1.5),
        "plain": (1, 2.5, "x", None, True, b"raw"),
        "ordered": OrderedDict(b=np.zeros((0, 3), np.uint8)),
    }
    read = pickles.load(write(tmp_path / "x.ckpt", value, protocol))
    np.testing.assert_array_equal(read["a"]["kernel"], value["a"]["kernel"])
    np.testing.assert_array_equal(read["half"][0], value["half"][0])
    np.testing.assert_array_equal(read["half"][1], np.arange(6))
    np.testing.assert_array_equal(read["fortran"], value["fortran"])
    assert read["half"][0].dtype == np.float16
    assert read["scalar"] == np.float32(1.5)
    assert read["plain"] == value["plain"]
    assert read["ordered"]["b"].shape == (0, 3)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("wrap", ["bare", "zip"])
def test_planted_command_is_refused_and_never_runs(tmp_path, foreign, wrap):
    marker = tmp_path / "ran"
    payload = pickle.dumps({"weight": Payload(f"touch {marker}")}, 2)
    path = tmp_path / "evil.ckpt"
    if wrap == "bare":
        path.write_bytes(payload)
    else:
        torch_zip(path, payload[2:-1], {})
    with pytest.raises(pickles.RefusedError, match=rf"evil\.ckpt: refused.*{os.name}\.system"):
        pickles.load(path, foreign=foreign)
    assert not marker.exists()
    if wrap == "bare":
        pickle.loads(payload)
        assert marker.exists(), "the payload does nothing even where it is allowed to run"


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__", "open"])
def test_dangerous_builtins_are_refused(tmp_path, name):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02" + global_op("builtins", name) + b".")
    with pytest.raises(pickles.RefusedError, match=f"builtins.{name}"):
        pickles.load(path, foreign=True)


def test_arrays_of_objects_are_refused(tmp_path):
    path = write(tmp_path / "x.pkl", np.array([None, "a"], object))
    with pytest.raises(pickles.RefusedError, match="refused"):
        pickles.load(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_reads_torch_tensors(tmp_path, compression):
    values = np.arange(24, dtype=np.float32)
    half = np.arange(4, dtype=np.float32).astype(ml_dtypes.bfloat16)
    content = mapping(
        {
            "whole": tensor("FloatStorage", "0", 24, 0, (2, 3, 4), (12, 4, 1)),
            "transposed": tensor("FloatStorage", "0", 24, 4, (4, 3), (1, 4)),
            "half": tensor("BFloat16Storage", "1", 4, 0, (4,), (1,)),
            "scalar": tensor("LongStorage", "2", 1, 0, (), ()),
        }
    )
    storages = {"0": values.tobytes(), "1": half.tobytes(), "2": np.int64(7).tobytes()}
    read = pickles.state_dict(torch_zip(tmp_path / "x.pt", content, storages, compression))
    np.testing.assert_array_equal(read["whole"], values.reshape(2, 3, 4))
    np.testing.assert_array_equal(read["transposed"], values[4:16].reshape(3, 4).T)
    np.testing.assert_array_equal(read["half"].astype(np.float32), np.arange(4))
    assert read["scalar"] == 7
    assert read["whole"].dtype == np.float32
    if compression == zipfile.ZIP_STORED:
        base = read["whole"]
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap) or not base.flags.owndata


def test_lightning_bookkeeping_is_inert(tmp_path):
    foreign = global_op("pytorch_lightning.callbacks", "ModelCheckpoint") + b")R"
    foreign += b"}" + text("best") + b"K\x01s" + b"b"
    weight = tensor("FloatStorage", "0", 2, 0, (2,), (1,))
    content = mapping({"state_dict": mapping({"w": weight}), "callbacks": foreign})
    path = torch_zip(tmp_path / "x.ckpt", content, {"0": np.float32([1, 2]).tobytes()})
    np.testing.assert_array_equal(pickles.state_dict(path)["w"], [1, 2])
    assert isinstance(pickles.load(path, foreign=True)["callbacks"], pickles.Foreign)
    with pytest.raises(pickles.RefusedError, match="ModelCheckpoint"):
        pickles.load(path)


def test_many_tensors_keep_few_files_open(tmp_path):
    resource = pytest.importorskip("resource")
    values = np.arange(4, dtype=np.float32)
    names = [f"w{i}" for i in range(2000)]
    content = mapping({name: contiguous("float32", name, (4,)) for name in names})
    path = torch_zip(tmp_path / "x.pt", content, dict.fromkeys(names, values.tobytes()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        read = pickles.state_dict(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(read) == 2000
    np.testing.assert_array_equal(read["w1999"], values)
    pickles.release(read["w1999"])
    np.testing.assert_array_equal(read["w1999"], values)


@pytest.mark.parametrize(
    ("offset", "size", "stride", "length"),
    [(0, (5,), (1,), 4), (2, (3,), (1,), 4), (0, (2, 2), (3, 1), 4), (0, (2,), (1,), 9)],
)
def test_tensors_beyond_their_memory_are_errors(tmp_path, offset, size, stride, length):
    content = mapping({"w": tensor("FloatStorage", "0", length, offset, size, stride)})
    path = torch_zip(tmp_path / "x.pt", content, {"0": np.zeros(4, np.float32).tobytes()})
    with pytest.raises(UserError, match=r"x\.pt: (damaged|cut short)"):
        pickles.state_dict(path)


def test_negative_strides_are_errors(tmp_path):
    content = mapping({"w": tensor("FloatStorage", "0", 4, 0, (2,), (-1,))})
    path = torch_zip(tmp_path / "x.pt", content, {"0": np.zeros(4, np.float32).tobytes()})
    with pytest.raises(UserError, match="damaged"):
        pickles.state_dict(path)


def test_unreadable_files_are_user_errors(tmp_path):
    whole = pickle.dumps({"a": np.arange(100.0)})
    cases = {
        "empty": b"",
        "text": b"hello, this is no pickle",
        "cut": whole[:-40],
        "old": b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: ") as caught:
            pickles.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"old: .*before 1\.6"):
        pickles.load(tmp_path / "old")
    with pytest.raises(UserError, match="No such file"):
        pickles.load(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no named tensors"):
        pickles.state_dict(write(tmp_path / "none", {"state_dict": {}}))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(UserError, match=r"not one of torch\.save"):
        pickles.load(tmp_path / "other.zip")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reads_what_torch_saves(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "whole": base,
        "view": base[1].T,
        "parameter": torch.nn.Parameter(torch.randn(3, 5)),
        "half": torch.randn(4).half(),
        "bfloat16": torch.randn(7, 2).bfloat16(),
        "long": torch.tensor(12345678901),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    lightning = {
        "state_dict": OrderedDict(state),
        "global_step": 3,
        "hyper_parameters": argparse.Namespace(rate=1e-4, where=Path("x"), kind=torch.float32),
        "loops": defaultdict(list, a=[torch.Size([1, 2])]),
    }
    torch.save(lightning, tmp_path / "x.ckpt")
    read = pickles.state_dict(tmp_path / "x.ckpt")
    assert list(read) == list(state)
    for name, saved in state.items():
        array = read[name]
        assert array.shape == tuple(saved.shape)
        assert array.dtype == str(saved.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(np.float64), saved.detach().double().numpy())
    assert pickles.load(tmp_path / "x.ckpt", foreign=True)["global_step"] == 3
    with pytest.raises(pickles.RefusedError, match=r"argparse\.Namespace"):
        pickles.load(tmp_path / "x.ckpt")
    torch.save(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before 1\.6"):
        pickles.load(tmp_path / "old.ckpt")
