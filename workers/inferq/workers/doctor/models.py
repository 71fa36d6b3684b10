"""Checks of the model repository: what a worker would say of it, without loading a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from inferq.shared.errors import ConfigError
from inferq.workers.doctor.finding import Finding, error, ok, warning
from inferq.workers.doctor.host import tensorrt_lacks
from inferq.workers.repository import load_model, model_names


def models(root: Path | None, on_cpu: bool) -> Iterator[Finding]:
    """One line for each model. `on_cpu`: as a worker with INFERQ_DEVICE=cpu serves it."""
    if root is None:
        yield ok("models", "not looked at: --models or INFERQ_MODELS names a repository")
        return
    try:
        names = model_names(root)
    except (ConfigError, OSError) as problem:
        yield error("models", str(problem), "correct --models or INFERQ_MODELS")
        return
    if not names:
        expected = f"put a model at {root}/<name>/<version>/model.onnx"
        yield warning("models", f"no models in {root}", expected)
    for name in names:
        check = f"model {name}"
        try:
            _read_a_little(root / name)
            spec = load_model(root, name, on_cpu=on_cpu)
        except ConfigError as problem:
            yield error(check, problem.message, _todo(problem))
        except OSError as problem:
            yield error(check, f"cannot be read: {problem}", "let the worker's user read it")
        else:
            engine = spec.config.engine
            lacks = tensorrt_lacks() if engine == "tensorrt" else None
            if lacks is not None:
                why, todo = lacks
                yield error(check, f"its engine, {engine}, cannot run here: {why}", todo)
                continue
            rows = f"batches of up to {spec.max_batch_size}"
            if spec.why_not_batchable is not None:
                rows = f"no batches: {spec.why_not_batchable}"
            yield ok(check, f"version {spec.version}, {engine}, {rows}")


def _read_a_little(folder: Path) -> None:
    """Raise OSError, which names the file, if a file of the model may not be read.

    Engines say so in words of their own, or call the file damaged.
    """
    for place in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
        for entry in place.iterdir():
            if entry.is_file():
                with entry.open("rb") as file:
                    file.read(1)


def _todo(problem: ConfigError) -> str:
    _, found, install = problem.message.partition("to install what it needs: ")
    return install if found else "correct the file that it names; docs/models.md has every knob"
