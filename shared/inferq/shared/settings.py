"""The settings of clients and workers, read from the environment into one frozen object.

Every field is set by ``INFERQ_<FIELD>`` (``INFERQ_LEASE_S=20``); `redis_url` is also taken from
``CELERY_BROKER_URL``. Arguments of `load` win over the environment, which wins over the defaults
below. A bad value raises a ConfigError that names the variable, the value and what was expected.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from inferq.shared import names
from inferq.shared.errors import ConfigError

ENV_PREFIX: Final = "INFERQ_"
#: Variables that may hold the URL, in this order, if `Settings.load` is not given one.
URL_VARIABLES: Final = ("INFERQ_REDIS_URL", "CELERY_BROKER_URL")
#: These fields may hold a password: no message shows them.
SECRET_FIELDS: Final = frozenset({"redis_url"})

_DAY_S: Final = 24 * 3600
MAX_PORT: Final = 65_535
#: Most worker processes on one device.
MAX_PROCESSES: Final = 64


_LINK_QUEUES: Final = f"{ENV_PREFIX}LINK_QUEUES"


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


#: Of a comma-separated list: no entry is empty.
Pattern = Annotated[str, Field(min_length=1)]


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``, or of ``[host]:port`` with an IPv6 address. ValueError."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not port.isascii() or not port.isdecimal() or int(port) > MAX_PORT:
        raise ValueError(f"Input should be HOST:PORT, PORT from 0 to {MAX_PORT}")
    return host, int(port)


class Settings(BaseSettings):
    """What clients and workers must agree on, and what only workers need.

    Made by `Settings.load`.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True
    )

    #: Where the queues are: ``redis://``, ``rediss://``, ``unix://`` or Sentinels in Celery's form.
    redis_url: str = Field(repr=False)
    #: The master's name, for a ``sentinel://`` URL.
    sentinel_master: str = "mymaster"
    #: Seconds that a stored result lives.
    result_expires_s: int = Field(default=600, ge=1, le=10 * 365 * _DAY_S)
    #: kombu's `global_keyprefix`: the prefix of every queue's name and of every key of inferq's.
    global_keyprefix: str = ""
    #: The prefix of Celery's result backend, ahead of ``celery-task-meta-``. Celery adds a ``_`` to
    #: a prefix that ends with none of ``:_-.``, so write it here, too.
    result_keyprefix: str = ""
    #: kombu's `priority_steps`, ascending; the first is 0.
    priority_steps: Annotated[tuple[int, ...], NoDecode, BeforeValidator(_split)] = (
        names.PRIORITY_STEPS
    )
    #: kombu's `sep` between a queue's name and a priority step.
    priority_sep: str = names.PRIORITY_SEP
    #: Seconds after its last renewal at which a worker's lease ends. Other workers then take its
    #: claims.
    lease_s: float = Field(default=10.0, ge=0.5, le=_DAY_S, allow_inf_nan=False)
    #: Seconds that a stopping worker has to finish the batches that compute. It hands back the
    #: rest.
    grace_s: float = Field(default=30.0, ge=0.0, le=_DAY_S, allow_inf_nan=False)
    #: The prefix of this process' incarnation names, by which `inferq worker` finds what a dead
    #: child held. At most 64 letters and digits.
    incarnation: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{0,64}$")] = ""
    #: The file to which the worker writes every second what it does, for `inferq health`. Not set:
    #: it writes none.
    heartbeat_file: Path | None = None
    #: Where a worker's models run. ``auto``: as their model.toml says; ``cpu``: all on the CPU.
    device: Literal["auto", "cpu"] = "auto"
    #: The GPU that the worker is pinned to, by its number in PCI order. Not set: to none.
    gpu: int | None = Field(default=None, ge=0)
    #: How many worker processes share the device: `inferq worker` starts so many on each, and each
    #: takes its part of cores, memory and the device's memory.
    processes: int = Field(default=1, ge=1, le=MAX_PROCESSES)
    #: How many worker processes `inferq worker` has started on all devices together, which share
    #: the host's memory. It tells its processes; what is set for itself counts for nothing.
    processes_on_host: int = Field(default=1, ge=1)
    #: ``HOST:PORT`` at which the worker serves its metrics to Prometheus. Not set: nowhere.
    metrics: str | None = None
    #: The form of a worker's log lines: Celery's text, or JSON objects (docs/logs.md).
    log_format: Literal["text", "json"] = "text"
    #: The folder of the worker's models. Not set: `inferq worker --models` names it.
    models: Path | None = None
    #: Whether a worker ends if it cannot serve one of its models, or the newest version of one.
    #: Otherwise it serves the others and logs what it does not serve.
    strict: bool = False
    #: Whether a worker runs other Celery tasks that it finds in its queues, if they are registered
    #: in its app. Otherwise they fail with NotRegistered.
    foreign_tasks: bool = False
    #: What stands for NaN and infinity in nested lists of a JSON result. ``bare``: `NaN`,
    #: `Infinity`, as Python writes and reads them, which is no JSON; ``null``; ``string``: the same
    #: words in quotes.
    json_nan: Literal["bare", "null", "string"] = "bare"
    #: Whether a worker takes part in Celery's remote control.
    remote_control: bool = True
    #: Most requests a second for which a worker sends task events. It sends those of failed
    #: requests as well.
    events_per_s: int = Field(default=500, ge=0, le=100_000)
    #: Patterns (``*``, ``?``, ``[…]``) of the queues to which a worker may send the tasks that
    #: follow a request: links, chains, chords. For example ``inferq.*,billing``.
    link_queues: Annotated[tuple[Pattern, ...], NoDecode, BeforeValidator(_split)] = ("*",)

    @field_validator("*", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("Input should be UTF-8") from None
        return value

    @field_validator("priority_steps")
    @classmethod
    def _ascending(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not steps or steps[0] != 0 or list(steps) != sorted(set(steps)):
            raise ValueError("Input should be ascending whole numbers of which the first is 0")
        return steps

    @field_validator("metrics")
    @classmethod
    def _address(cls, address: str | None) -> str | None:
        if address is not None:
            split_address(address)
        return address

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Settings from `given` (None: not given), then the environment, then the defaults.

        Raises ConfigError: a value is bad, or no Redis URL is set anywhere.
        """
        values = {name: value for name, value in given.items() if value is not None}
        if "link_queues" not in values and os.environ.get(_LINK_QUEUES) == "":
            # Elsewhere an empty value stands for the default. Here it would open what was meant to
            # be closed.
            raise ConfigError(
                f"{_LINK_QUEUES} is empty; expected patterns of queues (* for all, inferq.* for "
                "models alone), or that it is not set"
            )
        try:
            return cls(**_with_url(values))
        except ValidationError as problem:
            raise ConfigError(_explain(cls, problem, values)) from None

    def names(self) -> names.Names:
        """The key names by these settings."""
        return names.Names(
            prefix=self.global_keyprefix,
            result_prefix=self.result_keyprefix,
            priority_steps=self.priority_steps,
            sep=self.priority_sep,
            protocol=names.PROTOCOL,
        )


def _with_url(values: dict[str, Any]) -> dict[str, Any]:
    if "redis_url" in values:
        return values
    for variable in URL_VARIABLES:
        if url := os.environ.get(variable):
            return {**values, "redis_url": url}
    raise ConfigError(
        f"no Redis URL: pass one, or set {' or '.join(URL_VARIABLES)} "
        "(for example redis://127.0.0.1:6379/0)"
    )


def _explain(cls: type[Settings], problem: ValidationError, given: dict[str, Any]) -> str:
    lines = []
    for error in problem.errors(include_url=False, include_context=False):
        field = str(error["loc"][0]) if error["loc"] else "settings"
        place = f"setting {field!r}" if field in given else f"{ENV_PREFIX}{field.upper()}"
        value = "(hidden)" if field in SECRET_FIELDS else repr(error["input"])
        expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if error["type"] == "extra_forbidden":
            expected = f"one of {', '.join(cls.model_fields)}"
        lines.append(f"{place} is {value}; expected {expected}")
    return "; ".join(lines)
