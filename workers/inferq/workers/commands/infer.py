"""``inferq infer MODEL``: sends one request from array files, and prints or writes its outputs."""

from __future__ import annotations

import base64
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from inferq.shared.errors import ConfigError, InferqError
from inferq.workers.commands.number_range import NumberRange
from inferq.workers.logs.printing import plain, say, say_json

if TYPE_CHECKING:
    from inferq.producer import Result
    from inferq.shared.schema import Array, Tensors

#: Values shown of each output.
SHOWN: Final = 8
#: Of a string, so many characters.
SHOWN_CHARS: Final = 60
#: Most values of all outputs that --json writes.
MAX_VALUES: Final = 100_000


@click.command()
@click.argument("model")
@click.argument("arrays", metavar="[FILE.npz | -]", required=False)
@click.option(
    "--input",
    "-i",
    "inputs",
    multiple=True,
    metavar="NAME=FILE.npy",
    help="One input's array. May be given several times, beside a FILE.npz too. Of strings also "
    "NAME=FILE.txt, a row for each line.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OUT.npz",
    help="Write the outputs there.",
)
@click.option(
    "--timeout",
    type=NumberRange(min=0, min_open=True, max=86_400),
    default=60.0,
    show_default=True,
    metavar="S",
    help="Seconds to wait; what is computed later is dropped.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
@click.option(
    "--redis-url",
    envvar=["INFERQ_REDIS_URL", "CELERY_BROKER_URL"],
    help="Where the queues are. Also: INFERQ_REDIS_URL, CELERY_BROKER_URL.",
)
def infer(
    model: str,
    arrays: str | None,
    inputs: tuple[str, ...],
    output: Path | None,
    timeout: float,
    as_json: bool,
    redis_url: str | None,
) -> None:
    """Run MODEL on the arrays of a FILE.npz (-: standard input) and of each --input.

    Each array is an input of the model, of exactly its dtype, with rows in dim 0; strings are of
    NumPy's dtype U, bytes of S. Prints the outputs, and where the time went. Without a result it
    prints the error; exit status 1.

    --json writes values as nested lists: numbers that are not finite as "NaN", "Infinity" or
    "-Infinity", complex ones as [re, im], bytes as base64.
    """
    from inferq.producer import Client  # noqa: PLC0415 (NumPy)
    from inferq.workers.models.array_files import write_npz  # noqa: PLC0415

    try:
        given = read_inputs(arrays, inputs)
        with Client(redis_url) as client:
            result = client.infer(model, given, timeout=timeout, timeout_ms=timeout * 1000)
        if output is not None:
            write_npz(output, result.outputs)
        told = _as_json(model, result, output) if as_json else None
    except InferqError as problem:
        raise click.ClickException(plain(problem.message)) from problem
    if told is not None:
        say_json(told)
    else:
        _print(result, output)


def read_inputs(arrays: str | None, inputs: tuple[str, ...]) -> dict[str, Array]:
    """The arrays of ``FILE.npz | -`` and of each ``--input``. ConfigError."""
    from inferq.workers.models.array_files import (  # noqa: PLC0415
        read_lines,
        read_npy,
        read_npz,
        unpack_npz,
    )

    found: dict[str, Array] = {}
    if arrays == "-":
        found = unpack_npz(sys.stdin.buffer, "standard input")
    elif arrays is not None:
        found = read_npz(Path(arrays))
    for each in inputs:
        name, equals, file = each.partition("=")
        if not (name and equals and file):
            raise ConfigError(f"--input {each!r}; expected NAME=FILE.npy, or NAME=FILE.txt")
        if name in found:
            raise ConfigError(f"--input {each!r}: {name!r} is given twice; expected once")
        path = Path(file)
        found[name] = read_lines(path) if path.suffix == ".txt" else read_npy(path)
    if not found:
        raise ConfigError("no inputs; expected a FILE.npz, - for standard input, or --input")
    return found


def _as_json(model: str, result: Result, output: Path | None) -> dict[str, Any]:
    return {
        "model": model,
        "request_id": result.request_id,
        "latency_ms": round(result.latency_ms, 3),
        "outputs": told_outputs(result.outputs, output),
        "receipt": msgspec.to_builtins(result.receipt),
        "output": str(output) if output is not None else None,
    }


def told_outputs(outputs: Tensors, output: Path | None) -> dict[str, Any]:
    """`outputs` for JSON; with `output`, the file that they were written to, however many.

    ConfigError if they have too many values for JSON and are not written to a file.
    """
    count = sum(array.size for array in outputs.values())
    if count > MAX_VALUES and output is None:
        raise ConfigError(
            f"the outputs are {count} values; expected at most {MAX_VALUES} with --json; "
            "--output OUT.npz takes any number"
        )
    return {
        name: {
            "dtype": _dtype(array),
            "shape": list(array.shape),
            # None: they are in OUT.npz only.
            "data": _lists(array) if count <= MAX_VALUES else None,
        }
        for name, array in outputs.items()
    }


def _dtype(array: Array) -> str:
    from inferq.shared.text import dtype_name  # noqa: PLC0415 (NumPy)

    return dtype_name(array)


def _lists(array: Array) -> Any:
    return _finite(array.tolist())


def _finite(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, complex):
        return [_finite(value.real), _finite(value.imag)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value


def print_outputs(outputs: Tensors, output: Path | None) -> None:
    """A line for each, and one for the file that they were written to."""
    for name, array in outputs.items():
        shape = ", ".join(map(str, array.shape))
        first = " ".join(_short(value) for value in array.flat[:SHOWN].tolist())
        more = " …" if array.size > SHOWN else ""
        say(f"{plain(name)}: {_dtype(array)}[{shape}] {first}{more}")
    if output is not None:
        say(f"written to {output}")


def _print(result: Result, output: Path | None) -> None:
    print_outputs(result.outputs, output)
    receipt = result.receipt
    if receipt is None:
        say(f"took {result.latency_ms:.1f} ms; no receipt")
        return
    queued = "" if receipt.queue_ms is None else f"queue {receipt.queue_ms:.1f}, "
    say(
        f"took {result.latency_ms:.1f} ms: {queued}form {receipt.form_ms:.1f}, "
        f"compute {receipt.compute_ms:.1f}, settle {receipt.settle_ms:.1f}"
    )
    say(
        f"by {plain(receipt.worker)}: {plain(receipt.model)} version {receipt.version} on "
        f"{plain(receipt.engine)}, in a batch of {receipt.batch_size} rows "
        f"and {receipt.padding} of padding, attempt {receipt.attempt}"
    )


def _short(value: object) -> str:
    if isinstance(value, str | bytes):
        cut = value[:SHOWN_CHARS]
        return (json.dumps(cut, ensure_ascii=False) if isinstance(cut, str) else repr(cut)) + (
            "…" if len(value) > SHOWN_CHARS else ""
        )
    return f"{value:.6g}" if isinstance(value, float) else str(value)
