"""``inferq worker``: Celery's worker command with inferq's defaults filled in, and a supervisor."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

import click

from inferq.shared.errors import ConfigError, InferqError
from inferq.shared.names import is_model_name, model_of, queue_of

logger = logging.getLogger(__name__)

#: Seconds that the supervisor waits for Redis: it has signals to pass on meanwhile.
REDIS_TIMEOUT_S = 2.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--models",
    "repository",
    envvar="INFERQ_MODELS",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The model repository (required). Also: INFERQ_MODELS.",
)
@click.option(
    "-Q",
    "--queue",
    "queues",
    multiple=True,
    help="Serve this queue, inferq.<model>; repeatable. Default: every model in the repository.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="End if a folder holds no model, or if a model or its newest version cannot be served. "
    "Default: serve the others, and say so. Also: INFERQ_STRICT=1.",
)
@click.option(
    "-n",
    "--name",
    default=None,
    help="Celery node name; %h is the host, %i the GPU's number, %p the process's. "
    "Default: gpu%i@%h, or cpu<pid>@%h, so that replicas differ; with --processes gpu%i-%p@%h.",
)
@click.option(
    "--gpu",
    metavar="N[,N…]|all",
    help="Serve on these GPUs, one worker process each. Also, for one: INFERQ_GPU.",
)
@click.option(
    "--cpu",
    is_flag=True,
    help="Serve every model on the CPU, those of engine tensorrt on ONNX Runtime. "
    "Also: INFERQ_DEVICE=cpu.",
)
@click.option(
    "--processes",
    metavar="N",
    help="So many worker processes on each GPU, or on the CPU, which share it: for a device that "
    "computes faster than one process feeds it. Default: 1. Also: INFERQ_PROCESSES.",
)
@click.option(
    "--redis-url",
    envvar=["INFERQ_REDIS_URL", "CELERY_BROKER_URL"],
    help="Queues and results. Also: INFERQ_REDIS_URL, CELERY_BROKER_URL.",
)
@click.option(
    "--metrics",
    metavar="HOST:PORT",
    help="Tell Prometheus there what the worker does; of several GPUs or processes the port "
    "counts up. Also: INFERQ_METRICS.",
)
@click.option(
    "--events/--no-events",
    default=True,
    show_default=True,
    help="Send task events, which Flower shows. INFERQ_EVENTS_PER_S caps them.",
)
@click.option(
    "--allow-remote-shutdown",
    is_flag=True,
    help="End when Celery's remote control (Flower's button) says so. Default: start anew then.",
)
@click.option("-l", "--loglevel", default="INFO", show_default=True)
@click.option(
    "--log-format",
    envvar="INFERQ_LOG_FORMAT",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="What log lines are. Also: INFERQ_LOG_FORMAT.",
)
@click.argument("celery_options", nargs=-1, type=click.UNPROCESSED)
def worker(
    repository: Path | None,
    queues: tuple[str, ...],
    strict: bool,
    name: str | None,
    gpu: str | None,
    cpu: bool,
    processes: str | None,
    redis_url: str | None,
    metrics: str | None,
    events: bool,
    allow_remote_shutdown: bool,
    loglevel: str,
    log_format: str,
    celery_options: tuple[str, ...],
) -> None:
    """Serve models. Keeps ``celery -A inferq.workers.app worker -P solo -Q … -n …`` alive.

    One such process serves, or one for each GPU of ``--gpu``, which sees no other; ``--processes``
    of them on each where it is given.

    A worker process that dies is replaced, and what it held goes back to its queues at once.
    SIGTERM and Ctrl-C finish what computes, a second one hands everything back, a third one kills.
    CELERY_OPTIONS go to Celery as they are (--statedb FILE, …); %n in them is the node's name,
    which files of several worker processes need.
    """
    if log_format == "json":
        _log_json()
    from inferq.shared.connect import redis_client  # noqa: PLC0415 (heavy)
    from inferq.shared.settings import Settings  # noqa: PLC0415
    from inferq.workers.process.visible_passwords import visible_password  # noqa: PLC0415
    from inferq.workers.supervision import celery_files, devices, runtime_folder  # noqa: PLC0415
    from inferq.workers.supervision.health import forget_the_dead  # noqa: PLC0415
    from inferq.workers.supervision.memory_for_each import too_little  # noqa: PLC0415
    from inferq.workers.supervision.redis_identity import place_of  # noqa: PLC0415
    from inferq.workers.supervision.supervisor import Child, Supervisor  # noqa: PLC0415

    try:
        count = devices.count_of(processes)
        chosen = devices.chosen_devices(gpu, cpu)
        if repository is None:
            raise click.MissingParameter(param_hint="'--models'", param_type="option")
        settings = Settings.load(
            redis_url=redis_url,
            models=repository,
            metrics=metrics,
            strict=strict or None,
            processes=count,
        )
        places = devices.shared_out(chosen, settings.processes)
        if settings.heartbeat_file and len(places) > 1:
            raise ConfigError(
                f"INFERQ_HEARTBEAT_FILE is {str(settings.heartbeat_file)!r}; expected it unset, "
                f"since each of {len(places)} workers has a file of its own"
            )
        nodes = devices.nodes(name, places)
        celery_files.check(celery_options, len(places))
        addresses = devices.addresses(settings.metrics, len(places))
        served = _queues(queues) or _all_queues(repository, strict=settings.strict)
        folder = None if settings.heartbeat_file else runtime_folder.default()
        # Two stacks may serve on one GPU, under one name.
        whose = place_of(settings).digest
        if folder:
            runtime_folder.make(folder)
            forget_the_dead(folder)
        client = redis_client(
            settings.redis_url,
            sentinel_master=settings.sentinel_master,
            socket_timeout=REDIS_TIMEOUT_S,
        )
    except InferqError as problem:
        raise click.ClickException(problem.message) from problem
    children = []
    for node, place, address in zip(nodes, places, addresses, strict=True):
        command = [
            sys.executable, "-m", "inferq.workers.celery_process", "-A", "inferq.workers.app",
            "worker", "-P", "solo", "-Q", ",".join(served), "-n", node, "-l", loglevel,
            *(["-E"] if events else []), *celery_files.options_of(celery_options, node),
        ]  # fmt: skip
        file = f"{node}-{whose}.json"
        heartbeat = folder / file if folder else Path(str(settings.heartbeat_file))
        environment = {
            **place.environment_from(os.environ),
            "INFERQ_REDIS_URL": settings.redis_url,
            "INFERQ_MODELS": str(repository.absolute()),
            "INFERQ_HEARTBEAT_FILE": str(heartbeat),
            **({"INFERQ_METRICS": address} if address else {}),
            "INFERQ_LOG_FORMAT": log_format,
            **({"INFERQ_STRICT": "1"} if settings.strict else {}),
        }
        children.append(Child(node, command, environment, heartbeat, folder))
    if log_format == "text":
        _log_text()
    _warn(visible_password(sys.argv[1:]), too_little(sum(each.gpu is not None for each in places)))
    devices.log_sharing(places, os.environ)
    supervisor = Supervisor(
        children, client, settings.names(), allow_remote_shutdown=allow_remote_shutdown
    )
    status = supervisor.run()
    if folder:
        with suppress(OSError):  # others' heartbeats are in it
            folder.rmdir()
    raise SystemExit(status)


def _warn(*told: str | None) -> None:
    for warning in told:
        if warning is not None:
            logger.warning("%s", warning)


def _log_text() -> None:
    from inferq.workers.logs.one_line import OneLine  # noqa: PLC0415

    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s: %(levelname)s/supervisor] %(message)s"
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(OneLine())


def _log_json() -> None:
    from inferq.workers.logs.json_lines import JsonLines  # noqa: PLC0415 (heavy)
    from inferq.workers.logs.stderr import write_json  # noqa: PLC0415

    logging.getLogger().setLevel(logging.INFO)
    write_json(JsonLines(), "supervisor")


def _queues(queues: tuple[str, ...]) -> list[str]:
    """-Q as given: repeated, or comma-separated as Celery has it."""
    names = [name for part in queues for name in part.split(",") if name]
    for name in names:
        if model_of(name) is None:
            raise click.BadParameter(f"{name!r}; expected inferq.<model>", param_hint="--queue")
    return names


def _all_queues(repository: Path, *, strict: bool) -> list[str]:
    """The queues of all models in `repository`, also of those that turn out to be bad.

    ConfigError: there is none. `strict`: or there is a folder that is no model's, or is called as
    no model may be.
    """
    from inferq.workers.models.folders import look_through, why_no_name  # noqa: PLC0415

    folders = look_through(repository)
    misnamed = [name for name in folders.models if not is_model_name(name)]
    if strict and (misnamed or folders.others):
        named = [why_no_name(name) for name in misnamed]
        empty = [
            f"no model in {repository / name}; expected model.toml or a version's folder there"
            for name in folders.others
        ]
        rest = f"--strict serves none then; all that is wrong: inferq models {repository}"
        raise ConfigError("\n".join([*named, *empty, rest]))
    served = [queue_of(name) for name in folders.models if name not in misnamed]
    if not served:
        raise ConfigError(
            "\n".join(map(why_no_name, misnamed))
            or f"no model in {str(repository)!r}; expected <model>/<version>/"
        )
    return served
