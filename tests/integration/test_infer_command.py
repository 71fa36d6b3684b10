"""``inferq infer``: array files in, array files, JSON or a few lines out."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.repository import fake_model, numbered
from helpers.worker import Worker
from redis import Redis

from inferq.shared.errors import ConfigError
from inferq.shared.names import Names
from inferq.shared.schema import MAX_TENSORS
from inferq.workers.cli import inferq
from inferq.workers.commands import infer as infer_command
from inferq.workers.models import array_files

Infer = Callable[..., Result]


@pytest.fixture
def infer(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Infer:
    """``infer("m", "x.npz", stdin=b"")`` runs the command."""
    monkeypatch.setenv("INFERQ_REDIS_URL", redis_url)
    return lambda *args, stdin=b"": CliRunner().invoke(
        inferq, ["infer", *map(str, args)], input=stdin
    )


@pytest.fixture
def served(redis_url: str, tmp_path: Path) -> Iterator[None]:
    """A worker that serves `m`, which echoes its input x, and `wide` with 4,096 columns."""
    fake_model(tmp_path / "models", "m", knobs="warm_up = false")
    fake_model(tmp_path / "models", "wide", knobs="warm_up = false", width=4096)
    with Worker(redis_url, tmp_path / "models"):
        yield


def _saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.usefixtures("served")
def test_arrays_come_from_npy_npz_and_standard_input_and_go_to_npz(
    infer: Infer, tmp_path: Path
) -> None:
    x = np.array([[1.5, -2.0, np.nan, np.inf], [5, 6, 7, 8]], np.float32)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    npz = _saved(tmp_path / "in.npz", x=x)
    out = tmp_path / "out.npz"
    run = infer("m", "--input", f"x={tmp_path / 'x.npy'}", "--output", out)
    assert (run.exit_code, run.stderr) == (0, "")
    first, written, took, by = run.stdout.splitlines()
    assert first == "x: float32[2, 4] 1.5 -2 nan inf 5 6 7 8"
    assert written == f"written to {out}"
    assert "compute " in took
    assert "m version 1 on fake, in a batch of 2 rows and " in by
    with np.load(out) as found:
        np.testing.assert_array_equal(found["x"], x)
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~_umask()
    for args, stdin in (([npz], b""), (["-"], npz.read_bytes())):
        run = infer("m", *args, "--json", stdin=stdin)
        assert (run.exit_code, run.stderr) == (0, "")
        told = json.loads(run.stdout)
        assert told["outputs"]["x"] == {
            "dtype": "float32",
            "shape": [2, 4],
            "data": [[1.5, -2.0, "NaN", "Infinity"], [5.0, 6.0, 7.0, 8.0]],
        }
        assert (told["model"], told["receipt"]["engine"], told["output"]) == ("m", "fake", None)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.usefixtures("served")
def test_many_values_are_no_json_but_go_into_a_file(infer: Infer, tmp_path: Path) -> None:
    npz = _saved(tmp_path / "in.npz", x=np.ones((32, 4096), np.float32))
    run = infer("wide", npz, "--json")
    assert run.exit_code == 1
    assert run.stderr == (
        "Error: the outputs are 131072 values; expected at most 100000 with --json; "
        "--output OUT.npz takes any number\n"
    )
    run = infer("wide", npz, "--json", "--output", tmp_path / "out.npz")
    assert json.loads(run.stdout)["outputs"]["x"]["data"] is None
    with np.load(tmp_path / "out.npz") as found:
        assert found["x"].shape == (32, 4096)
    assert infer("wide", npz).stdout.startswith("x: float32[32, 4096] 1 1 1 1 1 1 1 1 …\n")


@pytest.mark.usefixtures("served")
def test_a_request_that_cannot_be_served_is_one_line(infer: Infer, tmp_path: Path) -> None:
    good = _saved(tmp_path / "good.npz", x=numbered(1))
    for args, error in (
        (["nobody", good], "model 'nobody': no worker serves it"),
        (["bad name", good], "model 'bad name'; expected at most 100 letters"),
        (["m", _saved(tmp_path / "y.npz", y=numbered(1))], "'y'"),
        (["m", _saved(tmp_path / "d.npz", x=np.ones((1, 4)))], "float64"),
        (["m", good, "--output", tmp_path / "no" / "out.npz"], "cannot be written: No such file"),
    ):
        run = infer(*args)
        assert (run.exit_code, run.stdout) == (1, ""), args
        assert run.stderr.startswith("Error: ")
        assert error in run.stderr
        assert run.stderr.count("\n") == 1


def test_without_a_worker_it_waits_as_long_as_it_is_told(
    redis_url: str, redis: Redis, infer: Infer, tmp_path: Path
) -> None:
    fake_model(tmp_path / "models", "m", knobs="warm_up = false")
    with Worker(redis_url, tmp_path / "models"):
        pass
    run = infer("m", _saved(tmp_path / "in.npz", x=numbered(1)), "--timeout", "0.5")
    assert run.exit_code == 1
    assert run.stderr.startswith("Error: ")
    assert redis.llen(Names().queue("m")) == 1
    with Worker(redis_url, tmp_path / "models"):
        pass
    assert redis.llen(Names().queue("m")) == 0, "its deadline has passed: it is not computed"


@pytest.mark.parametrize(
    ("args", "status", "error"),
    [
        (["m"], 1, "no inputs; expected a FILE.npz, - for standard input, or --input"),
        (["m", "-i", "x"], 1, "--input 'x'; expected NAME=FILE.npy"),
        (["m", "-i", "x=/no/file.npy"], 1, "/no/file.npy cannot be read: No such file"),
        (["m", "/no/file.npz"], 1, "/no/file.npz cannot be read: No such file"),
        (["m", "-"], 1, "standard input is no .npz"),
        (["m", "-", "--timeout", "0"], 2, "--timeout"),
    ],
)
def test_inputs_that_are_none_are_one_line(
    infer: Infer, args: list[str], status: int, error: str
) -> None:
    run = infer(*args)
    assert run.exit_code == status
    assert error in run.stderr


def test_an_input_that_is_given_twice_is_refused(infer: Infer, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbered(1))
    npz = _saved(tmp_path / "in.npz", x=numbered(1))
    run = infer("m", npz, "-i", f"x={tmp_path / 'x.npy'}")
    assert "'x' is given twice; expected once" in run.stderr


def test_a_redis_that_is_away_is_one_line(infer: Infer, tmp_path: Path) -> None:
    npz = _saved(tmp_path / "in.npz", x=numbered(1))
    run = infer("m", npz, "--redis-url", "redis://127.0.0.1:1/0")
    assert (run.exit_code, run.stderr.count("\n")) == (1, 1)
    assert infer("m", npz, "--redis-url", "http://x").stderr.startswith("Error: Redis URL")


def _npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "is no .npy"),
        (b"\x93NUMPY\x01\x00\xff\xff", "is no .npy"),
        (b"\x93NUMPY\x07\x00" + b" " * 200, "is no .npy"),
        (_npy(np.ones(3)).replace(b"(3,)", b"(4,)"), "has 24 bytes of data; expected 32"),
        (_npy(np.ones(3)).replace(b"(3,), ", b"(9**9,"), "is no .npy"),
        (
            _npy(np.ones(3)).replace(b"(3,), }     ", b"(-3,-1), }  "),
            "expected 24 for shape (-3, -1)",
        ),
        (_npy(np.ones(3))[:-1], "has 23 bytes of data; expected 24"),
        (_npy(np.array([print], object), allow_pickle=True), "holds Python objects"),
    ],
)
def test_a_file_that_is_no_array_is_refused(tmp_path: Path, data: bytes, error: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        array_files.read_npy(path)
    assert error in refused.value.message
    assert str(path) in refused.value.message


@pytest.mark.parametrize(
    "array",
    [
        np.float32(3),
        np.ones((0, 4), np.int8),
        np.ones((2, 0)),
        np.arange(6).reshape(2, 3).T,
        np.array([1 + 2j]),
        np.array([True, False]),
        np.arange(3, dtype=">i4"),
        np.ones((1, 2, 3), np.float16),
    ],
)
def test_arrays_survive_both_files(tmp_path: Path, array: Any) -> None:
    np.save(tmp_path / "x.npy", array)
    read = array_files.read_npy(tmp_path / "x.npy")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)
    array_files.write_npz(tmp_path / "x.npz", {"file": read, "a/b": read})
    again = array_files.read_npz(tmp_path / "x.npz")
    assert list(again) == ["file", "a/b"]
    np.testing.assert_array_equal(again["file"], array)
    with np.load(tmp_path / "x.npz") as numpys:
        np.testing.assert_array_equal(numpys["a/b"], array)
    assert list(tmp_path.glob(".*")) == []


def test_what_is_too_large_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_files, "MAX_BYTES", 100_000)
    np.save(tmp_path / "x.npy", np.zeros(200_000, np.uint8))
    with pytest.raises(ConfigError, match=r"too large; expected at most 100000 bytes"):
        array_files.read_npy(tmp_path / "x.npy")
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(200_000, np.uint8))
    with pytest.raises(ConfigError, match=r"unpacks to 200128 bytes; expected at most 100000"):
        array_files.read_npz(tmp_path / "bomb.npz")
    monkeypatch.setattr(array_files, "MAX_BYTES", 1_000_000)
    with zipfile.ZipFile(tmp_path / "many.npz", "w") as archive:
        for n in range(MAX_TENSORS + 1):
            archive.writestr(f"x{n}.npy", _npy(np.ones(1)))
    with pytest.raises(ConfigError, match="has 513 arrays; expected at most 512"):
        array_files.read_npz(tmp_path / "many.npz")


def test_an_archive_that_is_damaged_is_refused(tmp_path: Path) -> None:
    whole = _saved(tmp_path / "in.npz", x=numbered(1)).read_bytes()
    path = tmp_path / "damaged.npz"
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            found = array_files.read_npz(path)
        except ConfigError:
            continue
        assert all(isinstance(each, np.ndarray) for each in found.values())


def test_values_that_json_lacks_are_spelled() -> None:
    told = infer_command._lists(np.array([[1 + 2j, complex(np.nan, -np.inf)]]))
    assert told == [[[1.0, 2.0], ["NaN", "-Infinity"]]]
    assert infer_command._lists(np.array(True)) is True


@pytest.mark.usefixtures("served")
def test_it_stands_in_a_pipe(redis_url: str, tmp_path: Path) -> None:
    npz = _saved(tmp_path / "in.npz", x=numbered(3))
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with npz.open("rb") as stdin:
        done = subprocess.run(
            [sys.executable, "-m", "inferq.workers.cli", "infer", "m", "-", "--json"],
            env={**os.environ, "INFERQ_REDIS_URL": redis_url, "PYTHONPATH": path},
            stdin=stdin, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"]["x"]["data"] == [[3.0] * 4]
