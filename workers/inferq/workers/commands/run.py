"""``inferq run models/NAME``: one request on one model in this process, without Redis."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from inferq.shared.errors import ConfigError, InferqError
from inferq.workers.commands.infer import print_outputs, read_inputs, told_outputs
from inferq.workers.logs.printing import plain, say, say_json

if TYPE_CHECKING:
    from inferq.shared.schema import Tensors
    from inferq.workers.models.engine import LoadedModel


@click.command()
@click.argument("folder", metavar="models/NAME", type=click.Path(path_type=Path))
@click.argument("arrays", metavar="[FILE.npz | -]", required=False)
@click.option(
    "--input",
    "-i",
    "inputs",
    multiple=True,
    metavar="NAME=FILE.npy",
    help="One input's array. May be given several times, beside a FILE.npz too.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OUT.npz",
    help="Write the outputs there.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
def run(
    folder: Path,
    arrays: str | None,
    inputs: tuple[str, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Run the model in the folder models/NAME once, without Redis and without a worker.

    It is read, checked and loaded as a worker does it, with one lane, and given one request: the
    arrays of a FILE.npz (-: standard input) and of each --input, with rows in dim 0. What a
    model.py prints and logs goes to stderr. Exit status 1 if there is no result, with the error.
    Neither warm-up nor [pad] applies.

    --json writes values as `inferq infer` does.
    """
    from inferq.workers.models.array_files import write_npz  # noqa: PLC0415 (NumPy)

    logging.basicConfig(format="%(message)s")
    logging.getLogger("inferq.user_code").setLevel(logging.INFO)
    try:
        given = read_inputs(arrays, inputs)
        loaded, loaded_ms = _loaded(folder)
        try:
            outputs, ran_ms = _ran(loaded, given)
        finally:
            loaded.close()
        if output is not None:
            write_npz(output, outputs)
        told = told_outputs(outputs, output) if as_json else None
    except InferqError as problem:
        raise click.ClickException(plain(problem.message)) from problem
    spec = loaded.spec
    if told is not None:
        say_json(
            {
                "model": spec.name,
                "version": spec.version,
                "engine": spec.config.engine,
                "device": loaded.device,
                "load_ms": round(loaded_ms, 3),
                "run_ms": round(ran_ms, 3),
                "outputs": told,
                "output": str(output) if output is not None else None,
            }
        )
        return
    print_outputs(outputs, output)
    say(f"took {ran_ms:.1f} ms, after {loaded_ms:.1f} to load")
    say(f"by {plain(spec.name)} version {spec.version} on {spec.config.engine}, {loaded.device}")


def _loaded(folder: Path) -> tuple[LoadedModel, float]:
    """The model, and how many ms it took to load."""
    from inferq.workers.models.registry import engine_class  # noqa: PLC0415 (pydantic, NumPy)
    from inferq.workers.models.repository import load_model  # noqa: PLC0415

    folder = folder.absolute()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; expected a model's, as in models/NAME")
    spec = load_model(folder.parent, folder.name)
    # One request needs one lane.
    spec = replace(spec, config=spec.config.model_copy(update={"lanes": 1}))
    began = time.monotonic()
    loaded = engine_class(spec.config.engine)(spec).load()
    return loaded, (time.monotonic() - began) * 1000


def _ran(loaded: LoadedModel, given: Tensors) -> tuple[Tensors, float]:
    """The outputs of one request, and how many ms it took. InferqError: it has none."""
    from inferq.shared.schema import InputCheck  # noqa: PLC0415 (NumPy)
    from inferq.workers.models.engine import Batch, answers, check_rows  # noqa: PLC0415

    spec = loaded.spec
    rows = InputCheck(spec.advert(seconds_per_row=0.0, result_expires_s=0))(given)
    bucket = rows
    if spec.batchable:
        bucket = next((size for size in loaded.buckets if size >= rows), rows)
    batch = Batch([given], rows, bucket, spec.batchable)
    began = time.monotonic()
    outputs = answers(loaded.lanes[0], batch)
    took_ms = (time.monotonic() - began) * 1000
    if spec.batchable:
        check_rows(outputs, rows)
    return outputs, took_ms
