"""``inferq models DIR``: what is in a model repository, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import click

from inferq.shared.errors import ConfigError
from inferq.workers.repository import ModelSpec, load_model, model_names


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def models(folder: Path) -> None:
    """List the models of the repository DIR; exit status 1 if one of them cannot be served."""
    good: list[ModelSpec] = []
    problems: list[str] = []
    try:
        names = model_names(folder)
    except ConfigError as problem:
        names, problems = [], [problem.message]
    for name in names:
        try:
            good.append(load_model(folder, name))
        except ConfigError as problem:
            problems.append(problem.message)
    if good:
        _print(good)
    elif not problems:
        click.echo(f"no models in {folder}; expected {folder}/<name>/<version>/model.onnx")
    for line in problems:
        click.echo(f"inferq: {line}", err=True)
    if problems:
        raise SystemExit(1)


def _print(specs: list[ModelSpec]) -> None:
    from rich.console import Console  # noqa: PLC0415 (comes with an extra)
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table()
    for heading in ("model", "versions", "engine", "batch", "signature and knobs"):
        table.add_column(heading, overflow="fold")
    for spec in specs:
        *older, served = map(str, spec.versions)
        table.add_row(
            escape(spec.name),
            f"{' '.join(older)} [bold]{served}[/bold]".strip(),
            spec.config.engine,
            f"≤ {spec.max_batch_size}"
            if spec.batchable
            else f"no: {escape(spec.why_not_batchable or '')}",
            escape("\n".join(_signature(spec) + _knobs(spec))),
        )
    Console().print(table)


def _signature(spec: ModelSpec) -> list[str]:
    inputs = [f"  {tensor}" for tensor in spec.signature.inputs]
    return inputs + [f"→ {tensor}" for tensor in spec.signature.outputs]


def _knobs(spec: ModelSpec) -> list[str]:
    """The knobs that differ from their defaults, one a line."""
    changed = spec.config.changed()
    if spec.labels:
        changed["labels"] = f"{len(spec.labels)} names"
    # The column beside shows max_batch_size, and the fake engine's inputs are its signature.
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
