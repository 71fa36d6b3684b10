"""``inferq build``: an ONNX model of the repository as a TensorRT plan, kept for the workers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from inferq.shared.errors import ConfigError, InferqError
from inferq.shared.names import is_model_name
from inferq.workers.commands.build_progress import Steps, shown
from inferq.workers.logs.printing import say, say_json

if TYPE_CHECKING:
    from inferq.shared.schema import Array
    from inferq.workers.models.spec import ModelSpec
    from inferq.workers.trt.builder import BuildRequest
    from inferq.workers.trt.plans import Plan, PlanFolder
    from inferq.workers.trt.pruning import Other

UNVERIFIED = "unverified: no GPU here; the first worker that loads it verifies it"


@click.command()
@click.argument("model")
@click.option(
    "--models",
    "repository",
    envvar="INFERQ_MODELS",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The model repository. Also: INFERQ_MODELS.",
)
@click.option(
    "--precision",
    default=None,
    type=click.Choice(["fp32", "fp16"]),
    help="fp32 takes the file's own types. Default: [tensorrt] in model.toml, or else fp32.",
)
@click.option(
    "--batch",
    default=None,
    metavar="MIN,OPT,MAX",
    help="Smallest, optimum and largest batch, as 1,8,64. Default: [profile] in model.toml, or "
    "else 1, the preferred size and max_batch_size.",
)
@click.option(
    "--flavour",
    "flavour_name",
    default=None,
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    help="Default: [tensorrt] in model.toml, or else the one that is installed.",
)
@click.option(
    "--plans",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where plans are kept. Default: ~/.cache/inferq/plans. Also: INFERQ_PLANS.",
)
@click.option(
    "--verify",
    "samples",
    default=None,
    type=click.Path(dir_okay=False, path_type=Path),
    help="An .npz file with one request's inputs, on which the plan is verified, too.",
)
@click.option("--force", is_flag=True, help="Build even if there is such a plan already.")
@click.option(
    "--prune",
    "pruned",
    is_flag=True,
    help="Then delete MODEL's other plans for this GPU, but for those that a process has loaded.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
def build(
    model: str,
    repository: Path,
    precision: str | None,
    batch: str | None,
    flavour_name: str | None,
    plans: Path | None,
    samples: Path | None,
    force: bool,
    pruned: bool,
    as_json: bool,
) -> None:
    """Build MODEL for TensorRT, and keep the plan where workers find it.

    A plan that was built before from the same file, for the same TensorRT, GPU, shapes and
    precision, is taken from the cache. If there is a GPU, the plan is compared with ONNX Runtime on
    zeros, random and given inputs. A plan that differs too much is refused.
    """
    from inferq.workers.cuda.libcuda import gpu_kind  # noqa: PLC0415
    from inferq.workers.models.repository import load_model  # noqa: PLC0415 (heavy)
    from inferq.workers.trt import logs, network, running  # noqa: PLC0415
    from inferq.workers.trt.builder import BuildRequest, ensure_plan  # noqa: PLC0415
    from inferq.workers.trt.flavours import find_flavour  # noqa: PLC0415
    from inferq.workers.trt.phases import BuildStopped, phase  # noqa: PLC0415
    from inferq.workers.trt.plans import PlanFolder  # noqa: PLC0415
    from inferq.workers.trt.profiles import parse_batch  # noqa: PLC0415
    from inferq.workers.trt.pruning import prune  # noqa: PLC0415

    # Errors are reported once, by the exception.
    for module in (network, running, logs):
        logging.getLogger(module.__name__).addHandler(logging.NullHandler())
    try:
        with closing(PlanFolder(plans)) as folder:
            with shown() as progress:
                _check_file(repository, model)
                with phase(progress, f"Reading model {model}"):
                    spec = load_model(repository, model)
                table = spec.engine_table if spec.config.engine == "tensorrt" else {}
                order = BuildRequest(
                    spec=spec,
                    flavour=find_flavour(flavour_name or table.get("flavour", "auto")),
                    precision=precision or table.get("precision", "fp32"),
                    batch=None if batch is None else parse_batch(batch),
                    gpu=gpu_kind(),
                )
                given = _given(samples, spec)
                plan = ensure_plan(order, folder, progress=progress, force=force)
                plan = _verified(order, folder, plan, given, progress)
            others = prune(folder, order, plan) if pruned else []
        for each in spec.passed_over:
            say(f"inferq: passed over: {each}", err=True)
        if as_json:
            say_json(_as_json(order, plan, others))
        else:
            _print(order, plan)
            _print_pruned(others)
    except BuildStopped:
        raise click.Abort from None
    except InferqError as problem:
        raise click.ClickException(problem.message) from problem


def _check_file(repository: Path, model: str) -> None:
    """ConfigError if the version that is served has no ONNX file, before anything is read of it.

    `load_model` reports whatever else is wrong with the model.
    """
    from inferq.workers.models.registry import model_files  # noqa: PLC0415
    from inferq.workers.trt.builder import FILE  # noqa: PLC0415

    folder = repository / model
    if not is_model_name(model) or not folder.is_dir():
        return
    versions = [each for each in folder.iterdir() if each.name.isdecimal() and each.is_dir()]
    if not versions:
        return
    served = max(versions, key=lambda each: int(each.name))
    others = sorted(name for name in model_files() if (served / name).exists())
    if others and FILE not in others:
        raise ConfigError(
            f"model {model!r} has {', '.join(others)} in {served}; expected {FILE}: "
            "TensorRT builds ONNX files, which torch.onnx.export writes of a PyTorch model"
        )


def _given(path: Path | None, spec: ModelSpec) -> list[dict[str, Array]]:
    """The inputs that --verify names, read before a build that may take minutes."""
    from inferq.workers.trt.verify import load_samples  # noqa: PLC0415

    return [] if path is None else load_samples(path, spec)


def _verified(
    order: BuildRequest,
    folder: PlanFolder,
    plan: Plan,
    samples: list[dict[str, Array]],
    progress: Steps,
) -> Plan:
    """`plan`, compared with ONNX Runtime if that is possible here and was not done before."""
    from inferq.workers.trt.verify import verify_plan  # noqa: PLC0415

    if order.gpu is None or (plan.record.verified and not samples):
        return plan
    try:
        from inferq.workers.trt.lanes import loaded_once  # noqa: PLC0415
    except ImportError as problem:
        raise ConfigError(
            f"there is a GPU, but the plan cannot be verified on it without PyCUDA ({problem}); "
            "expected: pip install 'inferq[tensorrt]'"
        ) from problem

    with loaded_once(order.flavour, plan.load(), batchable=order.spec.batchable) as run:
        return verify_plan(order, folder, plan, run, samples, progress=progress)


def _print_pruned(others: Sequence[Other]) -> None:
    for other in others:
        size = f"{other.bytes / 1e6:.1f} MB"
        if other.in_use:
            say(f"left {other.path}: {size}, which a process has loaded")
        else:
            say(f"deleted {other.path}: {size}")


def _as_json(order: BuildRequest, plan: Plan, others: Sequence[Other]) -> dict[str, Any]:
    record = plan.record
    return {
        "model": order.spec.name,
        "version": order.spec.version,
        "path": str(plan.path),
        "bytes": record.bytes,
        "seconds": record.seconds,
        "from_cache": plan.from_cache,
        "flavour": order.flavour.name,
        "flavour_version": str(order.flavour.version),
        "precision": record.key.precision,
        "verified": record.verified,
        "max_error": record.max_error,
        # Lines that model.toml lacks: without them workers do not take this plan.
        "model_toml": _missing_knobs(order),
        # The model's other plans: --prune deleted them, or left them because they are in use.
        "pruned": [
            {"path": str(other.path), "bytes": other.bytes, "deleted": not other.in_use}
            for other in others
        ],
    }


def _print(order: BuildRequest, plan: Plan) -> None:
    record = plan.record
    known = UNVERIFIED if not record.verified else f"verified: differs by {record.max_error:.2g}"
    origin = "from the cache, built" if plan.from_cache else "built"
    say(
        f"{plan.path}: {record.bytes / 1e6:.1f} MB, {origin} in {record.seconds:.1f} s by "
        f"{order.flavour.name} {order.flavour.version} as {record.key.precision}; {known}"
    )
    say("\n".join(_profile_lines(plan)))
    told = _missing_knobs(order)
    if told:
        say("\n".join(["workers take this plan if model.toml says:", *told]))


def _profile_lines(plan: Plan) -> list[str]:
    """The smallest, optimum and largest shapes that the plan was built for."""
    profiles = plan.record.key.profiles
    shown = [
        ", ".join(f"{span.name} {_shapes(span.min, span.opt, span.max)}" for span in ranges)
        for ranges in profiles
    ]
    if len(shown) == 1:
        return [f"profile: {shown[0]}"]
    return [f"profile {number} of {len(shown)}: {each}" for number, each in enumerate(shown, 1)]


def _shapes(*shapes: tuple[int, ...]) -> str:
    """``1x3 … 8x3 … 8x3``; one for all of them if they are the same."""
    different = shapes if len(set(shapes)) > 1 else shapes[:1]
    return " … ".join("x".join(map(str, shape)) or "scalar" for shape in different)


def _missing_knobs(order: BuildRequest) -> list[str]:
    """Options of this build that model.toml lacks: workers have no such options."""
    from inferq.workers.models.ranges import profile_sizes  # noqa: PLC0415
    from inferq.workers.trt.profiles import as_toml  # noqa: PLC0415

    spec = order.spec
    is_engine = spec.config.engine == "tensorrt"
    table = spec.engine_table if is_engine else {}
    lines = [] if is_engine else ['engine = "tensorrt"']
    if order.batch is not None and order.batch[2] != spec.max_batch_size:
        lines.append(f"max_batch_size = {order.batch[2]}")
    knobs = []
    if order.precision != table.get("precision", "fp32"):
        knobs.append(f'precision = "{order.precision}"')
    if not _is_flavour(table.get("flavour", "auto"), order):
        knobs.append(f'flavour = "{order.flavour.name}"')
    if knobs:
        lines += ["[tensorrt]", *knobs]
    if order.batch is not None and _differs(order):
        lines.append(as_toml(profile_sizes(spec, order.batch)))
    return lines


def _is_flavour(name: str, order: BuildRequest) -> bool:
    """Whether `name` in model.toml means, on this host, the flavour of this build."""
    from inferq.workers.trt.flavours import find_flavour  # noqa: PLC0415

    try:
        return find_flavour(name).name == order.flavour.name
    except ConfigError:
        return False


def _differs(order: BuildRequest) -> bool:
    """Whether workers, which have no --batch, would look for another plan."""
    from inferq.workers.models.ranges import profile_sizes  # noqa: PLC0415

    try:
        return profile_sizes(order.spec) != profile_sizes(order.spec, order.batch)
    except InferqError:
        return True
