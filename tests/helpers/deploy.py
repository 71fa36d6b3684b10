"""The deployment files, read as Docker and Compose read them, as far as ours go."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import yaml

ROOT: Final = Path(__file__).parents[2]
COMPOSE_FILE: Final = ROOT / "docker-compose.yml"
DOCKERFILE: Final = ROOT / "deploy" / "Dockerfile"
ENV_EXAMPLE: Final = ROOT / ".env.example"

_VARIABLE: Final = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:?[-?])([^{}]*))?\})")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def read_env(path: Path = ENV_EXAMPLE) -> dict[str, str]:
    """The variables of a .env file."""
    lines = (line for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def example_env() -> dict[str, str]:
    """.env.example with a value for whatever it leaves empty, another for each."""
    return {
        name: value or "secretOf" + name.title().replace("_", "")
        for name, value in read_env().items()
    }


def variables_of(text: str) -> set[str]:
    """The variables that `text` takes in."""
    return {match[2] for match in _VARIABLE.finditer(text) if match[2]}


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """`text` with variables put in. LookupError: one that must be set is not."""

    def value(match: re.Match[str]) -> str:
        dollar, name, rule, rest = match.groups()
        if dollar:
            return "$"
        found = variables.get(name)
        if found or (found is not None and not (rule or "").startswith(":")):
            return found
        if rule is None or "?" in rule:
            raise LookupError(f"{name}: {rest}")
        return str(rest)

    return _VARIABLE.sub(value, text)


def seconds(duration: str) -> float:
    """Compose's and Docker's durations, as 1m30s."""
    parts = re.findall(r"(\d+)(ms|[smh])", duration)
    assert "".join(number + unit for number, unit in parts) == duration, duration
    return sum(int(number) * _SECONDS[unit] for number, unit in parts)


def load_compose(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """docker-compose.yml with `variables` (by default `example_env`) put in."""
    text = interpolate(COMPOSE_FILE.read_text(), example_env() if variables is None else variables)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def tracked() -> set[str]:
    """The files in git's index, relative to the root, and all folders that they are in."""
    told = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, timeout=30
    )
    files = {name for name in told.stdout.decode().split("\0") if name}
    return files | {str(parent) for name in files for parent in Path(name).parents}


@dataclass
class Stage:
    """One stage of a Dockerfile: what it begins with, and its instructions in order."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def of(self, keyword: str) -> list[str]:
        return [rest for word, rest in self.instructions if word == keyword]


@dataclass(frozen=True)
class Image:
    """What a container of a target is started with, its base stages included."""

    environment: Mapping[str, str]
    user: str
    entrypoint: Sequence[str]
    command: Sequence[str]
    healthcheck: Sequence[str]


class Dockerfile:
    """deploy/Dockerfile, stage by stage."""

    def __init__(self, text: str) -> None:
        self.stages: dict[str, Stage] = {}
        stage: Stage | None = None
        for keyword, rest in _instructions(text):
            if keyword == "FROM":
                base, _as, name = rest.split()
                stage = self.stages[name] = Stage(base, name)
            else:
                assert stage is not None, f"{keyword} before FROM"
                stage.instructions.append((keyword, rest))

    @classmethod
    def load(cls) -> Self:
        return cls(DOCKERFILE.read_text())

    def lineage(self, target: str) -> list[Stage]:
        """The stage `target` and those it is based on, the oldest first."""
        stage = self.stages[target]
        older = self.lineage(stage.base) if stage.base in self.stages else []
        return [*older, stage]

    def image(self, target: str) -> Image:
        environment: dict[str, str] = {}
        user, entrypoint, command, healthcheck = "root", [], [], []
        for stage in self.lineage(target):
            for keyword, rest in stage.instructions:
                if keyword == "ENV":
                    environment |= dict(part.split("=", 1) for part in shlex.split(rest))
                elif keyword == "USER":
                    user = rest
                elif keyword == "ENTRYPOINT":
                    entrypoint = json.loads(rest)
                elif keyword == "CMD":
                    command = json.loads(rest)
                elif keyword == "HEALTHCHECK":
                    healthcheck = json.loads(rest.partition("CMD")[2])
        return Image(environment, user, entrypoint, command, healthcheck)


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    """Keyword and rest of each instruction, its lines joined."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            keyword, _, rest = line.strip().partition(" ")
            yield keyword, rest


@dataclass(frozen=True)
class Container:
    """What Compose would run for a service."""

    service: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    #: Empty: there is none.
    healthcheck: Sequence[str]
    grace_s: float

    @classmethod
    def of(cls, service: str, compose: Mapping[str, Any], dockerfile: Dockerfile) -> Self:
        given = compose["services"][service]
        target = given.get("build", {}).get("target")
        image = dockerfile.image(target) if target else Image({}, "", [], [], [])
        entrypoint = given.get("entrypoint", image.entrypoint)
        command = given.get("command", [] if "entrypoint" in given else image.command)
        return cls(
            service,
            [*entrypoint, *command],
            {**image.environment, **given.get("environment", {})},
            _probe(given["healthcheck"]["test"]) if "healthcheck" in given else image.healthcheck,
            seconds(given.get("stop_grace_period", "10s")),
        )


def _probe(test: Sequence[str]) -> Sequence[str]:
    kind, *rest = test
    assert kind in {"CMD", "CMD-SHELL"}, kind
    return rest if kind == "CMD" else ["sh", "-c", *rest]
