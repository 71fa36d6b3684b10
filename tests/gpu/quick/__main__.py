"""`make gpu-quick`: see gpu.quick. ``python -m gpu.quick [--fake] [--steps machine,shares]``

Of what is imported here nothing has to be installed. Each line of gpu-quick.jsonl, in $OUT or in
build/gpu, is one step: its name, whether it went well, its seconds, whether the driver was the
fake one, and what it found. gpu-quick.log holds what the steps printed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from gpu.quick.driver import LIBRARY, patient
from gpu.quick.steps import STEPS, Step

ROOT: Final = Path(__file__).parents[3]
WHEELS: Final = ROOT / "build" / "gpu-wheels"
#: The Python that the wheels are for.
WHEELS_PYTHON: Final = (3, 12)
SOURCES: Final = ("tests", "producer", "shared", "workers")
_MAX_ERROR_CHARS: Final = 2000


def main() -> int:
    """Exit status 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="gpu.quick", description=__doc__)
    parser.add_argument("--fake", action="store_true", help="a dry run on the fake driver")
    parser.add_argument("--steps", default="", help="by comma; default: all")
    parser.add_argument("--wheels", type=Path, default=WHEELS)
    args = parser.parse_args()
    names = [step.name for step in STEPS]
    asked = [name.strip() for name in args.steps.split(",") if name.strip()] or names
    for name in asked:
        if name not in names:
            parser.error(f"--steps names {name!r}; expected {', '.join(names)}")
    chosen = [step for step in STEPS if step.name in asked]
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "gpu-quick.jsonl"
    lines.write_text("")
    with tempfile.TemporaryDirectory(prefix="inferq-quick-") as name, _log(out) as log:
        work = Path(name)
        site = _installed(args.wheels, work / "site")
        sys.path += site  # for the table
        env = _environment(site, work)
        if args.fake:
            env = _on_fake(env, work)
        fake = _driver(env)
        if fake is None:
            print(f"no NVIDIA driver is found ({LIBRARY}); ARGS=--fake does a dry run")
            return 1
        for step in chosen:
            line = _run(step, env, work, fake, log)
            with lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{step.name}: {_outcome(line)}, {line['seconds']} s", flush=True)
        return show(lines)


def _log(out: Path) -> Any:
    return (out / "gpu-quick.log").open("w")


def _installed(wheels: Path, site: Path) -> list[str]:
    """The folder that the wheels were put in; none where there are none for this Python.

    A folder on the path, and no venv: the Python there may live in a venv itself, whose packages
    another one would not see.
    """
    found = sorted(wheels.glob("*.whl"))
    needs = "steps that need what is not installed here fail"
    wanted, this = (".".join(map(str, v[:2])) for v in (WHEELS_PYTHON, sys.version_info))
    if not found:
        print(
            f"no wheels in {wheels}: {needs}. Run `make gpu-wheels` where there is a registry, and "
            "copy that folder here",
            flush=True,
        )
        return []
    if this != wanted:
        print(
            f"the wheels in {wheels} are for Python {wanted}; this is {this}: {needs}. Run "
            f"PYTHONPATH=tests python{wanted} -m gpu.quick",
            flush=True,
        )
        return []
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    options = ["--no-compile", "--disable-pip-version-check", "--target", str(site)]
    done = subprocess.run(
        [*pip, *options, *map(str, found)], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        print(
            f"{sys.executable} -m pip cannot install the wheels in {wheels}: {why}. {needs}",
            flush=True,
        )
        return []
    return [str(site)]


def _environment(site: list[str], work: Path) -> dict[str, str]:
    # The tree before the wheels: what runs is the code that lies here.
    path = [*(str(ROOT / source) for source in SOURCES), *site, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "XDG_CACHE_HOME": str(work / "cache"),
        "INFERQ_PLANS": str(work / "plans"),
        "PYTHONUNBUFFERED": "1",
    }


def _on_fake(env: dict[str, str], work: Path) -> dict[str, str]:
    """The fake driver and the fake NVML."""
    from helpers.fakecuda import build_driver, environment  # noqa: PLC0415

    folder = work / "driver"
    folder.mkdir()
    made = environment(build_driver(folder))
    no_card = str(ROOT / "tests" / "helpers" / "no_card")
    return {
        **env,
        "LD_LIBRARY_PATH": made["LD_LIBRARY_PATH"],
        "PYTHONPATH": os.pathsep.join([no_card, env["PYTHONPATH"]]),
    }


def _driver(env: dict[str, str]) -> bool | None:
    """Whether the driver that the steps find is the fake one; None: there is none."""
    code = "from gpu.quick.driver import is_fake; raise SystemExit(10 + is_fake())"
    asked = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    return {10: False, 11: True}.get(asked.returncode)


def _run(step: Step, env: dict[str, str], work: Path, fake: bool, log: Any) -> dict[str, Any]:
    found, said = work / f"{step.name}.json", work / f"{step.name}.log"
    command = [sys.executable, "-X", "faulthandler", "-m", "gpu.quick.step", step.name, str(found)]
    began, status = time.monotonic(), None
    limit_s = patient(step.limit_s, fake)
    with said.open("wb") as output:
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(limit_s)
        _end_group(process)
    text = said.read_text(errors="replace")
    log.write(f"=== {step.name}\n{text}\n")
    log.flush()
    told = json.loads(found.read_text()) if found.exists() else {}
    line: dict[str, Any] = {
        "step": step.name,
        "fake": fake,
        "ok": status == 0,
        "seconds": round(time.monotonic() - began, 1),
    }
    if "why_not" in told:
        line["why_not"] = told.pop("why_not")
    elif status is None:
        line["error"] = f"not ended within {limit_s} s"
    elif status != 0:
        line["error"] = f"status {status}: {text.strip()[-_MAX_ERROR_CHARS:]}"
    return {**line, "found": told}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """The step and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def _outcome(line: dict[str, Any]) -> str:
    if "why_not" in line:
        return "not run"
    return "ok" if line["ok"] else "FAILED"


def show(path: Path) -> int:
    """The table of the lines in `path`; exit status 1 if one of them failed."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    rows: list[tuple[str, ...]] = []
    for line in lines:
        said = list(line["found"].get("said", []))
        if not line["ok"]:
            said.append(line.get("why_not") or line.get("error", "").splitlines()[-1])
        rows.append((line["step"], _outcome(line), f"{line['seconds']:.0f}", "\n".join(said)))
    if any(line["fake"] for line in lines):
        print("DRY RUN on the fake driver: the figures mean nothing")
    _print(rows)
    return int(any(_outcome(line) == "FAILED" for line in lines))


def _print(rows: list[tuple[str, ...]]) -> None:
    try:
        from rich.console import Console  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
    except ImportError:
        for name, outcome, seconds, said in rows:
            print(f"{name:10} {outcome:8} {seconds:>4} s  " + said.replace("\n", "\n" + " " * 27))
        return
    table = Table()
    for column in ("step", "", "s", "found"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140, markup=False).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
