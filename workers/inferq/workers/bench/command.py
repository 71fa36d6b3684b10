"""``inferq bench MODEL``: the command line. It imports the rest only when it is called."""

from __future__ import annotations

import json
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from inferq.shared.errors import ConfigError, InferqError
from inferq.workers.commands.number_range import NumberRange
from inferq.workers.logs.printing import plain, say_json

if TYPE_CHECKING:
    from inferq.workers.bench.figures import Report
    from inferq.workers.bench.loads import Distribution, Load
    from inferq.workers.bench.run import Options, Outcome

DEFAULT_CONCURRENCY: Final = "1:16:2x"
MAX_PROCESSES: Final = 64
MAX_SEED: Final = 2**63 - 1
#: Exit status after Ctrl-C, as shells have it.
INTERRUPTED: Final = 130


@click.command()
@click.argument("model")
@click.option(
    "--concurrency",
    metavar="N|START:END:STEP",
    help="Closed loop: requests in flight, as 8, 1,4,16 or 1:64:2x (2x multiplies). "
    f"Default: {DEFAULT_CONCURRENCY}.",
)
@click.option(
    "--rate",
    metavar="R|START:END:STEP",
    help="Open loop: requests/s, whether or not they are answered.",
)
@click.option(
    "--distribution",
    type=click.Choice(["poisson", "constant"]),
    default="poisson",
    show_default=True,
    help="With --rate: how requests follow each other.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Open loop: a file of send times in seconds, one per line, ascending.",
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Rows of each request.")
@click.option(
    "--data",
    type=click.Choice(["random", "zeros"]),
    default="random",
    show_default=True,
    help="What inputs are made of, by the model's signature.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=SIZE,…",
    help="An input's whole shape, as x=1,224,224,3; needed for dims that the model leaves open.",
)
@click.option(
    "--input",
    "-i",
    "files",
    multiple=True,
    metavar="FILE.npz|NAME=FILE.npy",
    help="Inputs from files; with --batch, cut into requests of so many rows.",
)
@click.option(
    "--priority", type=click.IntRange(0, 9), help="0 (first) to 9.  [default: the model's]"
)
@click.option(
    "--timeout-ms",
    type=NumberRange(min=0, min_open=True, max=86_400_000),
    metavar="MS",
    help="Each request's deadline.  [default: the model's]",
)
@click.option(
    "--timeout",
    type=NumberRange(min=0, min_open=True, max=3600),
    default=60.0,
    show_default=True,
    metavar="S",
    help="Seconds that answers are waited for at a step's end.",
)
@click.option(
    "--window",
    type=NumberRange(min=0.1, max=600),
    default=2.0,
    show_default=True,
    metavar="S",
    help="Seconds of one measurement.",
)
@click.option(
    "--max-windows",
    type=click.IntRange(3, 1000),
    default=10,
    show_default=True,
    metavar="N",
    help="Measurements of a step until it counts as not stable.",
)
@click.option(
    "--warmup",
    type=NumberRange(min=0, max=600),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds of load before a step is measured.",
)
@click.option(
    "--max-in-flight",
    type=click.IntRange(1, 1_000_000),
    default=4096,
    show_default=True,
    metavar="N",
    help="With --rate or --trace: what is due beyond it is not sent, and counted.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, MAX_PROCESSES),
    default=1,
    show_default=True,
    metavar="N",
    help="Producer processes that share the load.",
)
@click.option(
    "--seed", type=click.IntRange(0, MAX_SEED), default=0, help="Of inputs and Poisson times."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE|-",
    help="Write all figures there; -: to stdout, instead of the table.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OUT.png",
    help="Draw throughput, latency and the split of time (pip install 'inferq[bench]').",
)
@click.option(
    "--compare",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OLD.json",
    help="Show ratios to an earlier --json, and draw it too.",
)
@click.option(
    "--redis-url",
    envvar=["INFERQ_REDIS_URL", "CELERY_BROKER_URL"],
    help="Where the queues are. Also: INFERQ_REDIS_URL, CELERY_BROKER_URL.",
)
def bench(
    model: str,
    concurrency: str | None,
    rate: str | None,
    distribution: Distribution,
    trace: Path | None,
    batch: int | None,
    data: str,
    shapes: tuple[str, ...],
    files: tuple[str, ...],
    priority: int | None,
    timeout_ms: float | None,
    timeout: float,
    window: float,
    max_windows: int,
    warmup: float,
    max_in_flight: int,
    processes: int,
    seed: int,
    json_file: Path | None,
    plot: Path | None,
    compare: Path | None,
    redis_url: str | None,
) -> None:
    """Load MODEL and measure what it does: throughput, latency, and where time goes.

    Each step lasts until its last 3 windows agree within 10 %, in throughput and p95. Latency
    counts from when a request was to be sent, also if the load generator or Redis was late.
    docs/bench.md says how to read the figures. Exit status 1 if Redis goes away or nothing is
    answered, 130 after Ctrl-C; what was measured by then is shown all the same.
    """
    from inferq.workers.bench import arrays  # noqa: PLC0415 (NumPy)
    from inferq.workers.bench.run import Options  # noqa: PLC0415

    # A shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if shapes and files:
            raise ConfigError(f"--shape {shapes[0]!r} with --input; expected one of the two")
        options = Options(
            model=model,
            loads=_loads(concurrency, rate, distribution, trace),
            processes=processes,
            batch=batch,
            data="zeros" if data == "zeros" else "random",
            shapes=arrays.read_shapes(shapes),
            files=files,
            priority=priority,
            timeout_ms=timeout_ms,
            timeout_s=timeout,
            window_s=window,
            max_windows=max_windows,
            warmup_s=warmup,
            max_in_flight=max_in_flight,
            seed=seed,
            redis_url=redis_url,
        )
        if options.loads[0].kind == "concurrency" and processes > options.loads[0].value:
            raise ConfigError(
                f"--processes {processes}; expected at most {options.loads[0].value:g}, "
                "the smallest --concurrency"
            )
        outcome = _run(options, json_file, plot, compare)
    except InferqError as problem:
        raise click.ClickException(plain(problem.message)) from problem
    if outcome.problem is not None:
        raise click.ClickException(plain(outcome.problem.message))
    if outcome.interrupted:
        raise SystemExit(INTERRUPTED)
    if not any(step.counts.succeeded for step in outcome.report.steps):
        raise click.ClickException(f"model {plain(model)!r} answered nothing in any step")


def _loads(
    concurrency: str | None, rate: str | None, distribution: Distribution, trace: Path | None
) -> list[Load]:
    from inferq.workers.bench import loads  # noqa: PLC0415

    given = {"--concurrency": concurrency, "--rate": rate, "--trace": trace}
    chosen = [option for option, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)}; expected one of {', '.join(given)}")
    if rate is not None:
        return loads.rates(rate, distribution)
    if trace is not None:
        return [loads.read_trace(trace)]
    return loads.concurrencies(concurrency or DEFAULT_CONCURRENCY)


def _run(
    options: Options, json_file: Path | None, plot: Path | None, compare: Path | None
) -> Outcome:
    """Measure and show the results. What would prevent showing them is checked before measuring."""
    from inferq.workers.bench import compare as comparing  # noqa: PLC0415
    from inferq.workers.bench import figures, tables  # noqa: PLC0415
    from inferq.workers.bench.loads import kind_title  # noqa: PLC0415
    from inferq.workers.bench.run import run  # noqa: PLC0415

    kind = options.loads[0].kind
    to_stdout = json_file is not None and str(json_file) == "-"
    for option, path in (("--json", None if to_stdout else json_file), ("--plot", plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{option} {path}: no folder {path.parent}; expected one that exists")
    older = None
    if compare is not None:
        older = figures.read_report(compare)
        comparing.check_comparable(older, kind, f"--compare {compare}")
    if plot is not None:
        import matplotlib  # type: ignore[unused-ignore]  # noqa: F401, PLC0415 (an extra)

    with tables.Progress(len(options.loads), options.max_windows) as progress:
        outcome = run(options, progress)
    report = outcome.report
    if not report.steps:
        return outcome
    if json_file is not None:
        _write_json(None if to_stdout else json_file, report)
    if not to_stdout:
        tables.print_report(report)
        if older is not None:
            notes = comparing.differences(report, older)
            tables.print_ratios(comparing.ratios(report, older), kind_title(kind), notes)
    if plot is not None:
        from inferq.workers.bench.plot import draw  # noqa: PLC0415

        _replace(plot, draw(report, older))
    return outcome


def _write_json(path: Path | None, report: Report) -> None:
    import msgspec  # noqa: PLC0415

    told = _rounded(msgspec.to_builtins(report))
    if path is None:
        say_json(told)
    else:
        _replace(path, f"{json.dumps(told, indent=2)}\n".encode())


def _rounded(value: object) -> object:
    """Floats rounded to their significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _replace(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all. Raises ConfigError."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            temporary.write_bytes(data)
            temporary.replace(path)
    except OSError as problem:
        raise ConfigError(f"{path} cannot be written: {problem.strerror or problem}") from None
