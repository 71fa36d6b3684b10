"""docker-compose.yml and the Dockerfile, as read."""

from __future__ import annotations

from typing import Any

from helpers.deploy import (
    Container,
    Dockerfile,
    load_compose,
)

COMPOSE = load_compose()
SERVICES: dict[str, Any] = COMPOSE["services"]
IMAGES = Dockerfile.load()
#: Services that come from our Dockerfile, and those of them that run until they are stopped.
OURS = sorted(name for name, service in SERVICES.items() if "build" in service)
WORKERS = ["worker-cpu", "worker-gpu"]


def container(service: str) -> Container:
    return Container.of(service, COMPOSE, IMAGES)


def mounts(service: str) -> list[list[str]]:
    """Source, target and, if there is one, mode of each volume."""
    return [each.split(":") for each in SERVICES[service].get("volumes", [])]
