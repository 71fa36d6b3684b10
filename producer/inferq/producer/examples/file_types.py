"""A small backend service: finds the types of the files below a folder.

    INFERQ_REDIS_URL=redis://… python -m inferq.producer.examples.file_types \\
        --labels models/magika/model.toml ~/src

Workers elsewhere serve `magika` (see the example of that name); this waits until one does, sends a
request for each file, and prints how many there are of each type. It needs nothing but the client.
"""

from __future__ import annotations

import os
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final

import click

from inferq.producer.client import Client
from inferq.producer.examples import magika
from inferq.shared.errors import InferqError, ModelNotFound, RedisUnavailable
from inferq.shared.schema import Tensors

MODEL: Final = "magika"
_POLL_S: Final = 0.2


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--labels",
    "model_toml",
    required=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The model's model.toml, which names the types.",
)
@click.option(
    "--limit",
    default=2000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Most files to ask about.",
)
@click.option(
    "--wait",
    "wait_s",
    default=120.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds to wait for a worker to serve the model, and for each result.",
)
def main(folder: Path, model_toml: Path, limit: int, wait_s: float) -> None:
    """Ask of what types the files below FOLDER are. Exit status 1 if a request failed."""
    labels: list[str] = tomllib.loads(model_toml.read_text())["labels"]
    try:
        with Client() as client:
            await_model(client, wait_s)
            failed = ask(client, folder, labels, limit, wait_s)
    except InferqError as problem:
        raise click.ClickException(problem.message) from problem
    sys.exit(1 if failed else 0)


def await_model(client: Client, seconds: float) -> None:
    """Return once a worker has answered. Raises the last error after `seconds`."""
    request = magika.tokens(b"a question to begin with", b"")
    assert request is not None
    deadline = time.monotonic() + seconds
    while True:
        try:
            client.infer(MODEL, {"bytes": request}, timeout=max(1.0, deadline - time.monotonic()))
            return
        except (ModelNotFound, RedisUnavailable):
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


def ask(
    client: Client, folder: Path, labels: Sequence[str], limit: int, timeout_s: float
) -> dict[str, int]:
    """Ask about up to `limit` files below `folder`, print the answers, and return the errors:
    wire code → requests that ended with it.
    """
    heads: list[bytes] = []

    def requests() -> Iterator[Tensors]:
        for head, tail in islice(_contents(folder), limit):
            if (request := magika.tokens(head, tail)) is not None:
                heads.append(head)
                yield {"bytes": request}

    types: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    batched = 0.0
    began = time.monotonic()
    outcomes = client.map(MODEL, requests(), timeout=timeout_s, return_errors=True)
    for position, outcome in enumerate(outcomes):
        if isinstance(outcome, InferqError):
            errors[outcome.code] += 1
            continue
        scores = outcome.outputs["target_label"][0]
        types[magika.answer(scores, labels, heads[position])] += 1
        batched += outcome.receipt.batch_size if outcome.receipt is not None else 1
    seconds = time.monotonic() - began
    for name, count in types.most_common():
        click.echo(f"{count:6} {name}")
    answered = types.total()
    click.echo(
        f"{answered} requests answered in {seconds:.2f} s, "
        f"in batches of {batched / max(1, answered):.1f} rows in the mean; errors: "
        + (", ".join(f"{count} {code}" for code, count in errors.items()) or "0")
    )
    return dict(errors)


def _contents(folder: Path) -> Iterator[tuple[bytes, bytes]]:
    """Both ends of each regular file below `folder` that can be read, in a fixed order."""
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                with suppress(OSError):
                    yield magika.read_ends(path)


if __name__ == "__main__":
    main()
