"""Tensors cross between processes in memory that both have mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from inferq.shared.errors import EngineError
from inferq.workers.models.engine import Batch
from inferq.workers.user_code.memory import KEPT_BYTES, Shared, new_file
from inferq.workers.user_code.tensors import ALIGN, read_arrays, write_arrays, write_batch

Sides = tuple[Shared, Shared]


@pytest.fixture
def sides() -> Iterator[Sides]:
    """Who writes and who reads, each with a descriptor and a mapping of its own."""
    file = new_file("test")
    writer, reader = Shared(file, 1 << 30), Shared(os.dup(file), 1 << 30)
    yield writer, reader
    writer.close()
    reader.close()
    reader.close()


def test_arrays_arrive_as_they_are_and_begin_at_aligned_places(sides: Sides) -> None:
    writer, reader = sides
    arrays = {
        "a": np.arange(7, dtype=np.uint8),
        "b": np.arange(6, dtype=np.complex128).reshape(2, 3)[:, ::-1],
        "scalar": np.array(3.5, np.float16),
        "none": np.zeros((2, 0, 3), np.int64),
    }
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    places, size = write_arrays(writer, arrays, dtypes)
    assert all(place.offset % ALIGN == 0 for place in places)
    for copy in (True, False):
        found = read_arrays(reader, places, size, copy=copy)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape
            assert np.array_equal(found[name], array)
    found["a"][:] = 9  # user code may write to its inputs
    assert read_arrays(writer, places, size, copy=False)["a"].tolist() == [9] * 7


def test_a_copy_stays_as_it_is_when_the_memory_is_written_again(sides: Sides) -> None:
    writer, reader = sides
    places, size = write_arrays(writer, {"a": np.ones(4)}, {"a": "float64"})
    found = read_arrays(reader, places, size, copy=True)["a"]
    write_arrays(writer, {"a": np.zeros(4)}, {"a": "float64"})
    assert found.tolist() == [1] * 4


def test_a_batch_is_joined_and_padded_with_its_last_row(sides: Sides) -> None:
    writer, reader = sides
    parts = [{"x": np.full((rows, 2), rows, np.float32)} for rows in (1, 2)]
    places, size = write_batch(writer, Batch(parts, 3, 5), {"x": "float32"})
    found = read_arrays(reader, places, size, copy=False)["x"]
    assert found[:, 0].tolist() == [1, 2, 2, 2, 2]


def test_text_and_bytes_arrive_as_they_are(sides: Sides) -> None:
    writer, reader = sides
    text = np.array([["", "é"], ["日本", "\ud800"]], object)
    data = np.array([b"", b"\x00", b"abc\x00"], object)
    places, size = write_arrays(writer, {"t": text, "b": data}, {"t": "string", "b": "bytes"})
    found = read_arrays(reader, places, size, copy=True)
    assert found["t"].tolist() == text.tolist()
    assert found["b"].tolist() == data.tolist()
    parts = [{"t": text[:1]}, {"t": text[1:]}]
    places, size = write_batch(writer, Batch(parts, 2, 3), {"t": "string"})
    found = read_arrays(reader, places, size, copy=False)
    assert found["t"].tolist() == [*text.tolist(), text[1].tolist()]


def test_memory_grows_as_it_is_asked_to_and_never_beyond_its_limit() -> None:
    file = new_file("test")
    writer, reader = Shared(file, 1 << 20), Shared(os.dup(file), 1 << 20)
    for count in (10, 100_000, 1 << 20, 5):
        array = np.arange(count, dtype=np.uint32).astype(np.uint8)
        places, size = write_arrays(writer, {"a": array}, {"a": "uint8"})
        assert np.array_equal(read_arrays(reader, places, size, copy=True)["a"], array)
    with pytest.raises(EngineError, match=r"are 1048640 bytes; expected at most 1048576, which is"):
        write_arrays(writer, {"a": np.zeros((1 << 20) + 1, np.uint8)}, {"a": "uint8"})
    with pytest.raises(EngineError, match="tells of 9999999 bytes of"):
        reader.read(9_999_999)
    with pytest.raises(PermissionError):  # who reads it would be killed
        os.ftruncate(file, 0)
    writer.close()
    reader.close()


def test_what_a_large_batch_took_is_given_back(sides: Sides) -> None:
    writer, reader = sides
    large = np.ones(KEPT_BYTES + (32 << 20), np.uint8)
    places, size = write_arrays(writer, {"a": large}, {"a": "uint8"})
    assert read_arrays(reader, places, size, copy=False)["a"][-1] == 1
    before = os.fstat(writer._file).st_blocks * 512
    writer.give_back(size)
    assert before >= len(large)
    assert os.fstat(writer._file).st_blocks * 512 <= KEPT_BYTES
