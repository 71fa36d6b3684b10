"""``inferq models DIR``: lists the models of a repository, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from inferq.shared.errors import ConfigError
from inferq.workers.logs.printing import plain, say, say_json
from inferq.workers.models.folders import look_through
from inferq.workers.models.repository import load_models
from inferq.workers.models.spec import ModelSpec


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
def models(folder: Path, as_json: bool) -> None:
    """List the models of the repository DIR.

    Exit status 1 if one of them cannot be served, or not in its newest version.
    """
    try:
        folders = look_through(folder)
        good, bad = load_models(folder, folders.models)
    except ConfigError as problem:
        raise click.ClickException(problem.message) from problem
    passed_over = [plain(name) for name in sorted((*folders.others, *folders.rest))]
    if as_json:
        told = [_as_json(spec) for spec in good]
        told += [{"name": each.model, "problem": each.reason} for each in bad]
        say_json(sorted(told, key=lambda each: str(each["name"])))
    else:
        if good:
            _print(good)
        elif not bad:
            say(f"no models in {folder}; expected {folder}/<name>/<version>/model.onnx")
        if passed_over:
            say(f"passed over: {', '.join(passed_over)}")
    newer = [each for spec in good for each in spec.passed_over]
    for each in bad:
        say(f"inferq: {each}", err=True)
    for each in newer:
        say(f"inferq: passed over: {each}", err=True)
    if bad or newer:
        raise SystemExit(1)


def _as_json(spec: ModelSpec) -> dict[str, Any]:
    changed = spec.config.changed()
    return {
        "name": spec.name,
        "problem": None,
        "version": spec.version,
        "versions": list(spec.versions),
        # Versions newer than the served one whose files are incomplete.
        "passed_over": [
            {"version": each.version, "reason": each.reason} for each in spec.passed_over
        ],
        "engine": spec.config.engine,
        "path": str(spec.path) if spec.path is not None else None,
        "batchable": spec.batchable,
        "why_not_batchable": spec.why_not_batchable,
        "max_batch_size": spec.max_batch_size,
        "inputs": msgspec.to_builtins(spec.told.inputs),
        "outputs": msgspec.to_builtins(spec.told.outputs),
        "labels": len(spec.labels),
        # What model.toml sets, including the engine's own table.
        "knobs": msgspec.to_builtins(changed, str_keys=True),
        "engine_table": msgspec.to_builtins(dict(spec.engine_table), str_keys=True),
    }


def _print(specs: list[ModelSpec]) -> None:
    from rich.console import Console  # noqa: PLC0415 (comes with an extra)
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table()
    for heading in ("model", "versions", "engine", "batch", "signature and knobs"):
        table.add_column(heading, overflow="fold")
    for spec in specs:
        newer = {each.version or 0 for each in spec.passed_over}
        whole = [str(version) for version in spec.versions if version not in newer]
        *older, served = whole
        table.add_row(
            escape(plain(spec.name)),
            " ".join([*older, f"[bold]{served}[/bold]", *(f"({v})" for v in sorted(newer))]),
            escape(plain(spec.config.engine)),
            f"≤ {spec.max_batch_size}"
            if spec.batchable
            else f"no: {escape(plain(spec.why_not_batchable or ''))}",
            escape("\n".join(map(plain, _signature(spec) + _knobs(spec)))),
        )
    Console().print(table)


def _signature(spec: ModelSpec) -> list[str]:
    inputs = [f"  {tensor}" for tensor in spec.told.inputs]
    return inputs + [f"→ {tensor}" for tensor in spec.told.outputs]


def _knobs(spec: ModelSpec) -> list[str]:
    """The knobs that differ from their defaults, one a line."""
    changed = spec.config.changed()
    if spec.labels:
        changed["labels"] = f"{len(spec.labels)} names"
    # Another column shows max_batch_size, and the fake engine's inputs are its signature.
    lines = [f"{key} = {_toml(value)}" for key, value in changed.items() if key != "max_batch_size"]
    own = {key: value for key, value in spec.engine_table.items() if key != "inputs"}
    return lines + [f"{spec.config.engine}.{key} = {_toml(value)}" for key, value in own.items()]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return str(value)
