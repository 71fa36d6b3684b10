"""An installed package adds an engine by entry points; what is wrong with one harms no other."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import onnx_models
from helpers.installed import install

from inferq.shared.errors import ConfigError
from inferq.workers.models import registry
from inferq.workers.models.folders import look_through
from inferq.workers.models.registry import (
    ENGINES,
    FILES_GROUP,
    GROUP,
    engine_class,
    engines,
    model_files,
)
from inferq.workers.models.repository import load_models

ENGINE = """
from inferq.workers.engines.fake import FakeEngine

class Engine(FakeEngine):
    name = "other"
"""
TABLE = '[other]\ninputs = [{ name = "x", dtype = "float32", shape = ["batch", 4] }]\n'

Add = Callable[..., None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Installs a distribution: its name, what its engines are, and what files these take."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    registry._installed.cache_clear()
    modules = set(sys.modules)

    def add(
        distribution: str,
        points: dict[str, str] | str,
        files: dict[str, str] | None = None,
        modules: dict[str, str] | None = None,
    ) -> None:
        groups = points if isinstance(points, str) else {GROUP: points, FILES_GROUP: files or {}}
        install(site, distribution, groups, modules)

    yield add
    registry._installed.cache_clear()
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_an_installed_engine_is_known_by_name_file_and_package_and_not_imported(add: Add) -> None:
    add("inferq-other", {"other": "other_engine:Engine [gpu]"}, {"other": "model.other"})
    entry = engines()["other"]
    assert (entry.target, entry.files) == ("other_engine:Engine", ("model.other",))
    assert entry.requirement == "inferq-other[gpu]"
    assert list(engines())[: len(ENGINES)] == list(ENGINES), "ours come first"
    assert model_files() == ("model.onnx", "model.pt2", "model.py", "model.other")
    with pytest.raises(
        ConfigError,
        match=r"'other' cannot be imported .*other_engine.* pip install \"inferq-other\[gpu\]\"",
    ):
        engine_class("other")


def test_a_model_is_served_by_the_engine_that_takes_its_file(
    add: Add, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(
        "inferq-other",
        {"other": "other_engine:Engine"},
        {"other": "model.other"},
        {"other_engine": ENGINE},
    )
    models = tmp_path / "models"
    (models / "m" / "1").mkdir(parents=True)
    (models / "m" / "1" / "model.other").write_text("weights")
    (models / "m" / "model.toml").write_text(TABLE)
    (models / "misplaced").mkdir()
    (models / "misplaced" / "model.other").write_text("weights")
    onnx_models.double(models / "ours" / "1" / "model.onnx")
    assert "misplaced" in look_through(models).models
    specs, bad = load_models(models, ["m", "ours", "misplaced"])
    assert [(spec.name, spec.config.engine) for spec in specs] == [
        ("m", "other"),
        ("ours", "onnxruntime"),
    ]
    assert specs[0].path == models / "m" / "1" / "model.other"
    assert ["in no version's folder" in each.reason for each in bad] == [True]
    assert warnings(caplog) == []


def test_of_several_engines_for_a_file_the_models_own_choice_counts(
    add: Add, tmp_path: Path
) -> None:
    points = {"other": "other_engine:Engine", "another": "nowhere:Engine"}
    add("both", points, dict.fromkeys(points, "model.other"), {"other_engine": ENGINE})
    folder = tmp_path / "models" / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.other").write_text("weights")
    (folder / "model.toml").write_text(TABLE)
    _, (bad,) = load_models(folder.parent, ["m"])
    assert "several engines take the file" in bad.reason
    assert "another, other" in bad.reason
    (folder / "model.toml").write_text('engine = "other"\n' + TABLE)
    (spec,), _ = load_models(folder.parent, ["m"])
    assert spec.config.engine == "other"


@pytest.mark.parametrize(
    ("name", "value", "file", "problem"),
    [
        ("torch", "bad:Engine", "x", "inferq has one of that name"),
        ("labels", "bad:Engine", "x", "model.toml has a knob of that name"),
        ("Bad", "bad:Engine", "x", "expected a name of at most 32 small letters"),
        ("bad", "bad", "x", "its entry point is 'bad'; expected package.module:Class"),
        ("bad", "bad:Engine; import os", "x", "expected package.module:Class"),
        ("bad", "bad:Engine", "../x", "its inferq.engine_files is '../x'; expected a name of"),
    ],
)
def test_an_entry_point_that_is_wrong_is_told_on_one_line_and_no_other_is_lost(
    add: Add, caplog: pytest.LogCaptureFixture, name: str, value: str, file: str, problem: str
) -> None:
    add("bad-one", {name: value}, {name: file})
    add("good-one", {"other": "other_engine:Engine"}, modules={"other_engine": ENGINE})
    for _ in range(2):
        assert engines().keys() - ENGINES == {"other"}
    (line,) = warnings(caplog)
    assert line.startswith(f"the engine {name!r} of bad-one is not used: ")
    assert problem in line
    assert "\n" not in line
    assert engine_class("other").name == "other"


def test_of_two_packages_with_one_name_neither_is_used(
    add: Add, caplog: pytest.LogCaptureFixture
) -> None:
    add("second", {"other": "other_engine:Engine"})
    add("first", {"other": "other_engine:Engine"})
    assert "other" not in engines()
    (line,) = warnings(caplog)
    assert line.startswith("the engine 'other' of first and second is not used: two packages")


@pytest.mark.parametrize("points", ["[inferq.engines\nx", "[inferq.engines]\nno value\n"])
def test_entry_points_that_cannot_be_read_are_told_on_one_line_and_no_other_is_lost(
    add: Add, caplog: pytest.LogCaptureFixture, points: str
) -> None:
    add("bad-one", points)
    add("good-one", {"other": "other_engine:Engine"})
    assert "other" in engines()
    assert all("bad_one" in line and "\n" not in line for line in warnings(caplog))
    assert len(warnings(caplog)) <= 1


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise ValueError('two\\nlines')", "other_engine raised ValueError: two lines"),
        ("raise SystemExit('over')", "other_engine raised SystemExit: over"),
        ("import nowhere", r"No module named .nowhere.\); .* pip install .bad-one."),
        ("", "other_engine:Engine is None; expected a subclass of"),
        ("Engine = print", "expected a subclass of inferq.workers.models.engine.Engine"),
        (
            "from inferq.workers.models.engine import Engine as E\n"
            "class Engine(E):\n    name = 'other'\n    def load(self): ...\n",
            "has no read; expected all that an engine has",
        ),
        (ENGINE.replace('"other"', '"else"'), "has the name 'else'; expected 'other'"),
    ],
)
def test_a_package_that_holds_no_such_engine_costs_only_the_models_that_ask_for_it(
    add: Add, tmp_path: Path, source: str, problem: str
) -> None:
    add("bad-one", {"other": "other_engine:Engine"}, modules={"other_engine": source})
    models = tmp_path / "models"
    (models / "m").mkdir(parents=True)
    (models / "m" / "model.toml").write_text('engine = "other"\n')
    onnx_models.double(models / "ours" / "1" / "model.onnx")
    (spec,), (bad,) = load_models(models, ["m", "ours"])
    assert spec.name == "ours"
    with pytest.raises(ConfigError, match=problem):
        engine_class("other")
    assert "engine 'other'" in bad.reason
    assert "\n" not in bad.reason


@pytest.mark.parametrize("entry", ["''", "os.getcwd()", "os.path.relpath(os.getcwd()) + '/.'"])
def test_nothing_is_looked_for_in_the_working_directory(tmp_path: Path, entry: str) -> None:
    install(tmp_path, "bad-one", {GROUP: {"other": "other_engine:Engine"}})
    code = (
        f"import os, sys; sys.path.insert(0, {entry})\n"
        "from inferq.workers.models.registry import engines\n"
        "print(*engines())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == list(ENGINES)
    assert done.stderr == ""


def test_what_is_installed_is_looked_through_when_an_engine_is_asked_for_and_once() -> None:
    code = (
        "from importlib import metadata\n"
        "calls = []\n"
        "found = metadata.distributions\n"
        # pydantic looks for plug-ins of its own, without a path.
        "metadata.distributions = lambda **given: calls.extend(given) or found(**given)\n"
        "import inferq.producer, inferq.workers.models.repository\n"
        "from inferq.workers.models.registry import engines\n"
        "before = len(calls)\n"
        "engines(), engines()\n"
        "print(before, len(calls))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["0", "1"]
