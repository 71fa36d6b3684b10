"""The runner of `make gpu-quick`, and what docs/gpu.md says of its steps."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu.quick import __main__ as quick
from gpu.quick.cases import NeedsFake, NoControl
from gpu.quick.kernels import PTX
from gpu.quick.steps import STEPS, Step
from helpers.fakecuda import cuda_root, run_python
from helpers.wait import until

TESTS = Path(__file__).parents[2]
DOCS = TESTS.parent / "docs" / "gpu.md"
#: Steps of this test's own, by a sitecustomize on the path of their process.
SITECUSTOMIZE = "import gpu.quick\ngpu.quick.__path__.append({folder!r})\n"
STEP = """
def run(report):
    report.add(seen=1 / 3)
    report.say("so far")
    {end}
"""


def _line(tmp_path: Path, end: str, limit_s: int = 30) -> dict[str, Any]:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE.format(folder=str(tmp_path)))
    (tmp_path / "ours.py").write_text(STEP.format(end=end))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(TESTS)])}
    return quick._run(Step("ours", limit_s, "nothing"), env, tmp_path, False, io.StringIO())


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ("raise ValueError('no such thing')", "status 1: .*ValueError: no such thing"),
        ("raise SystemExit('rows were mixed up')", "status 1: .*rows were mixed up"),
        ("import os; os.kill(os.getpid(), 11)", "status -11: .*Segmentation fault"),
    ],
)
def test_a_step_that_fails_has_told_what_it_knew(tmp_path: Path, end: str, error: str) -> None:
    line = _line(tmp_path, end)
    assert not line["ok"]
    assert re.search(error, line["error"], re.DOTALL)
    assert line["found"] == {"seen": 0.33333, "said": ["so far"]}


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    started = f"import subprocess; p = subprocess.Popen(['sleep', '600']); open({str(mark)!r}, 'w')"
    line = _line(tmp_path, f"{started}.write(str(p.pid)); p.wait()", limit_s=3)
    assert line["error"] == "not ended within 3 s"
    assert line["found"]["said"] == ["so far"]
    state = Path(f"/proc/{mark.read_text()}/stat")
    until(lambda: not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_step_that_cannot_run_here_says_why_and_has_not_failed(tmp_path: Path) -> None:
    end = "from gpu.quick.report import CannotRun; raise CannotRun('no card')"
    line = _line(tmp_path, end)
    assert line["why_not"] == "no card"
    assert "error" not in line
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps(line) + "\n")
    assert quick.show(lines) == 0


def test_the_table_says_of_a_dry_run_that_its_figures_mean_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines.jsonl"
    for fake in (True, False):
        line = {"step": "copies", "fake": fake, "ok": False, "seconds": 2.0, "error": "status 1: x"}
        lines.write_text(json.dumps({**line, "found": {"said": ["4 KB: 9 GB/s"]}}) + "\n")
        assert quick.show(lines) == 1
        said = capsys.readouterr().out
        assert ("the figures mean nothing" in said) is fake
        assert "FAILED" in said
        assert "4 KB: 9 GB/s" in said


def test_wheels_that_are_missing_or_of_no_use_are_told_of_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        assert quick._installed(tmp_path, tmp_path / "site") == []
        return capsys.readouterr().out

    assert f"no wheels in {tmp_path}: steps that need what is not installed here fail" in (
        missing := said()
    )
    assert "`make gpu-wheels` where there is a registry, and copy that folder here" in missing
    (tmp_path / "pycuda-1-cp312-cp312-linux_x86_64.whl").write_bytes(b"no wheel")
    monkeypatch.setattr(quick, "WHEELS_PYTHON", (2, 7))
    other = said()
    assert f"are for Python 2.7; this is {sys.version_info[0]}.{sys.version_info[1]}" in other
    assert "PYTHONPATH=tests python2.7 -m gpu.quick" in other
    monkeypatch.setattr(quick, "WHEELS_PYTHON", sys.version_info[:2])
    assert f"{sys.executable} -m pip cannot install the wheels in {tmp_path}: " in said()


def test_a_step_that_there_is_not_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.quick", "--steps", "machine,copy"])
    with pytest.raises(SystemExit):
        quick.main()
    assert "--steps names 'copy'; expected machine, captures, trap, " in capsys.readouterr().err


def test_all_steps_together_may_take_500_seconds() -> None:
    assert sum(step.limit_s for step in STEPS) <= 500


def test_the_docs_have_each_step_with_its_limit_and_what_it_tells() -> None:
    text = DOCS.read_text()
    for step in STEPS:
        assert f"| `{step.name}` | {step.limit_s} s | {step.tells}" in text


def test_the_kernels_are_ptx_that_assembles(tmp_path: Path) -> None:
    ptxas = shutil.which("ptxas") or str(cuda_root() / "bin" / "ptxas")
    if not Path(ptxas).is_file():
        pytest.skip("ptxas is not installed")
    source = tmp_path / "kernels.ptx"
    source.write_bytes(PTX)
    for architecture in ("sm_75", "sm_90"):
        command = [ptxas, f"-arch={architecture}", str(source), "-o", str(tmp_path / "kernels")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


#: A case as it is run on a card, but for the card: see gpu.quick.cases.
AS_ON_A_CARD = """
from gpu.quick import cases, kernels
kernels.kernels()
cases.is_fake = lambda: False
print(cases.main({name!r}))
"""


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("every_request_gets_its_rows", 0),
        ("a_sticky_error_is_fatal_and_another_is_not", 0),
        ("copies_hide_behind_compute", 3),
    ],
)
def test_a_case_on_a_card_passes_or_names_what_only_the_fake_driver_can(
    fake_driver: Path, name: str, status: int
) -> None:
    said = run_python(AS_ON_A_CARD.format(name=name), fake_driver).split()
    assert said[-1] == str(status)
    if status:
        assert said[:2] == ["sets", "ns_per_byte"]


def test_a_row_in_anothers_place_is_counted_and_no_other(fake_driver: Path) -> None:
    code = """
import numpy as np
from gpu.quick.busy import pictures, wrong_rows
batch = pictures(4, width=8, first=254)
y = np.float32([[254], [255], [0], [1]])
print(wrong_rows(batch, {"y": y}), wrong_rows(batch, {"y": y[[1, 0, 2, 3]]}))
"""
    assert run_python(code, fake_driver).split() == ["0", "2"]


def test_a_count_that_only_the_fake_driver_has_agrees_with_anything_and_nothing_else_does() -> None:
    control = NoControl()
    assert control.count("streams") == 3
    assert control.count("streams") - 2 == 17
    assert not any([control.count("streams")])
    with pytest.raises(NeedsFake, match="sets memory_mb"):
        control.set("memory_mb", 1)
    with pytest.raises(NeedsFake, match="asks it to explode"):
        control.explode()


def test_what_the_first_process_imports_has_to_be_installed_nowhere() -> None:
    code = (
        "import gpu.quick.__main__, sys; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(TESTS)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    ours = set(done.stdout.split()) - sys.stdlib_module_names - {"__main__"}
    assert ours == {"gpu"}
