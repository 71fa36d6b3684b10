"""Checks the model repository as a worker would, without loading a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from inferq.shared.errors import ConfigError
from inferq.workers.doctor.finding import Finding, error, ok, warning
from inferq.workers.doctor.host import tensorrt_lacks
from inferq.workers.models.folders import look_through
from inferq.workers.models.repository import load_model


def models(root: Path | None, on_cpu: bool) -> Iterator[Finding]:
    """One line for each model. `on_cpu`: as a worker with INFERQ_DEVICE=cpu serves it."""
    if root is None:
        yield ok("models", "not looked at: --models or INFERQ_MODELS names a repository")
        return
    try:
        folders = look_through(root)
    except (ConfigError, OSError) as problem:
        yield error("models", str(problem), "correct --models or INFERQ_MODELS")
        return
    others = f"passed over, as they hold no model: {', '.join(folders.others)}"
    if not folders.models:
        expected = f"put a model at {root}/<name>/<version>/model.onnx"
        found = f"no models in {root}" + (f"; {others}" if folders.others else "")
        yield warning("models", found, expected)
    elif folders.others:
        yield ok("models", others)
    for name in folders.models:
        yield _of_one(f"model {name}", root, name, on_cpu)


def _of_one(check: str, root: Path, name: str, on_cpu: bool) -> Finding:
    try:
        _read_a_little(root / name)
        spec = load_model(root, name, on_cpu=on_cpu)
    except ConfigError as problem:
        return error(check, problem.message, _todo(problem))
    except OSError as problem:
        return error(check, f"cannot be read: {problem}", "let the worker's user read it")
    except Exception as problem:  # noqa: BLE001 - the other models are checked all the same
        return error(check, f"cannot be read: {problem!r}", "see what a worker logs of it")
    engine = spec.config.engine
    lacks = tensorrt_lacks() if engine == "tensorrt" else None
    if lacks is not None:
        why, todo = lacks
        return error(check, f"its engine, {engine}, cannot run here: {why}", todo)
    rows = f"batches of up to {spec.max_batch_size}"
    if spec.why_not_batchable is not None:
        rows = f"no batches: {spec.why_not_batchable}"
    found = f"version {spec.version}, {engine}, {rows}"
    if not spec.passed_over:
        return ok(check, found)
    newer = "; ".join(f"version {v.version}: {v.reason}" for v in spec.passed_over)
    return warning(
        check,
        f"{found}; passed over: {newer}",
        f"make version {spec.passed_over[0].version} whole, or delete it",
    )


def _read_a_little(folder: Path) -> None:
    """Raise OSError, which names the file, if a file of the model cannot be read.

    Engines report that in other words, or call the file damaged.
    """
    for place in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
        for entry in place.iterdir():
            if entry.is_file():
                with entry.open("rb") as file:
                    file.read(1)


def _todo(problem: ConfigError) -> str:
    _, found, install = problem.message.partition("to install what it needs: ")
    return install if found else "correct the file that it names; docs/models.md has every knob"
