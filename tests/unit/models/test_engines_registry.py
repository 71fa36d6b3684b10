"""Engines are found by name, imported late, and say what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

from inferq.shared.errors import ConfigError
from inferq.workers.models.registry import ENGINES, engine_class


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_knows_the_name_it_is_registered_by(name: str) -> None:
    if name == "torch":
        pytest.importorskip("torch", reason='PyTorch is not installed: pip install "inferq[torch]"')
    assert engine_class(name).name == name


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"engine is 'tensorflow'; expected one of onnxruntime, "):
        engine_class("tensorflow")


def _python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_no_engine_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, inferq.workers.models.registry as e; e.engine_class('fake');"
        "print([m for m in sys.modules if m.partition('.')[0] in ('onnxruntime', 'onnx', 'torch')])"
    )
    assert _python(code).strip() == "[]"


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "worker"), ("torch", "torch")])
def test_a_missing_dependency_names_the_extra_to_install(name: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{name!r}] = None\n"
        "from inferq.workers.models.registry import engine_class\n"
        "from inferq.shared.errors import ConfigError\n"
        f"try: engine_class({name!r})\n"
        "except ConfigError as problem: print(problem)\n"
    )
    said = _python(code)
    assert f"engine {name!r} cannot be imported" in said
    assert f'pip install "inferq[{extra}]"' in said
