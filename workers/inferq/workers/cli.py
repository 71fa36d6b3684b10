"""The `inferq` command. Sub-commands import what they need only when they are called."""

from __future__ import annotations

from importlib.metadata import version

import click

from inferq.workers.demo.command import demo
from inferq.workers.models_command import models
from inferq.workers.worker_command import worker


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("inferq"), prog_name="inferq")
def main() -> None:
    """Batched deep-learning inference behind a Redis queue."""


main.add_command(worker)
main.add_command(models)
main.add_command(demo)

if __name__ == "__main__":
    main()
