"""Every name of TensorRT that the code uses exists, in TensorRT 11 and in TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from helpers import trt_stubs

#: Prints the module's version and which of the names (class → names; "" for the module's own) it
#: has not.
LOOK = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
missing = []
for owner, names in json.loads(sys.argv[2]).items():
    found = module
    for step in filter(None, owner.split('.')):
        found = getattr(found, step, None)
    if found is None:
        missing.append(owner)
    else:
        missing += [f'{owner}.{name}' for name in names if not hasattr(found, name)]
print(json.dumps([module.__version__, missing]))
"""
#: What no version has had, to see that the look is a look.
INVENTED = {"Builder": ["create_network", "create_nothing"], "INothing": ["x"]}


def _look(
    module: str, names: Mapping[str, Sequence[str]], libraries: Path | None = None
) -> tuple[str, list[str]]:
    """The version of `module`, and which of `names` it lacks. In a process of its own."""
    env = dict(os.environ)
    if libraries is not None:
        env["LD_LIBRARY_PATH"] = str(libraries)
    given = json.dumps({owner: sorted(each) for owner, each in names.items()})
    command = [sys.executable, "-c", LOOK, module, given]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    version, missing = json.loads(done.stdout.splitlines()[-1])
    return version, missing


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = trt_stubs.why_not()
    if reason is not None:
        pytest.skip(reason)
    return trt_stubs.build(tmp_path_factory.mktemp("trt"))


@pytest.fixture(scope="module")
def rtx() -> str:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx-cu13 is not installed: make .venv/.gpu-ready")
    return "tensorrt_rtx"


@pytest.fixture(scope="module")
def used() -> Mapping[str, Sequence[str]]:
    api = pytest.importorskip(
        "inferq.workers.trt.api", reason="this version has no TensorRT engine"
    )
    names: Mapping[str, Sequence[str]] = api.USED
    assert names
    return names


def test_a_name_that_does_not_exist_is_found_out(stubs: Path) -> None:
    version, missing = _look(trt_stubs.MODULE, INVENTED, stubs)
    assert version.startswith("11.")
    assert missing == ["Builder.create_nothing", "INothing"]


def test_every_name_used_exists_in_tensorrt_11(
    stubs: Path, used: Mapping[str, Sequence[str]]
) -> None:
    version, missing = _look(trt_stubs.MODULE, used, stubs)
    assert version.startswith("11.")
    assert missing == []


def test_every_name_used_exists_in_tensorrt_rtx(
    rtx: str, used: Mapping[str, Sequence[str]]
) -> None:
    _, missing = _look(rtx, used)
    assert missing == []
