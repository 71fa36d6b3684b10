"""The Dockerfile's targets: what they copy, whose they are, and what Compose builds of them."""

from __future__ import annotations

import re

import pytest
from helpers.compose import IMAGES, OURS, SERVICES, WORKERS, container, mounts
from helpers.deploy import (
    ROOT,
    tracked,
)

UID = "10001:10001"


# --- images --------------------------------------------------------------------------------------


def test_the_targets_are_those_that_compose_builds() -> None:
    built = {SERVICES[name]["build"]["target"] for name in OURS}
    started = {name for name in IMAGES.stages if IMAGES.image(name).command}
    assert built == started


@pytest.mark.parametrize("service", OURS)
def test_images_run_as_a_user_without_rights(service: str) -> None:
    target = SERVICES[service]["build"]["target"]
    assert IMAGES.image(target).user == UID
    uid = UID.partition(":")[0]
    made = " ".join(rest for stage in IMAGES.lineage(target) for rest in stage.of("RUN"))
    assert f"useradd --uid {uid} " in made
    assert f"groupadd --gid {uid} " in made


def test_every_base_is_pinned_to_a_release() -> None:
    bases = {each.base for each in IMAGES.stages.values()} - set(IMAGES.stages)
    bases |= {service["image"] for service in SERVICES.values() if "build" not in service}
    assert len(bases) == 5
    for base in bases:
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+(-[a-z0-9.-]+)?(@sha256:[0-9a-f]{64})?", base)


def test_both_halves_of_the_gpu_image_are_of_one_release() -> None:
    devel, base = (IMAGES.stages[name].base for name in ("gpu-environment", "worker-gpu"))
    assert devel.replace("-devel-", "-base-") == base


def test_every_file_that_is_copied_is_in_git_and_reaches_the_build() -> None:
    sent = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = set()
    for stage in IMAGES.stages.values():
        for rest in stage.of("COPY"):
            *sources, _target = rest.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in IMAGES.stages
                continue
            copied |= {source.rstrip("/") for source in sources}
    assert copied <= tracked()
    assert copied == sent


@pytest.mark.parametrize("service", OURS)
def test_each_image_gets_an_environment_that_was_made_where_it_lies(service: str) -> None:
    """A virtual environment works in the folder, and with the Python, that it was made with."""
    target = SERVICES[service]["build"]["target"]
    (copied,) = [rest for rest in IMAGES.stages[target].of("COPY") if "--from=" in rest]
    origin, source, place = copied.removeprefix("--from=").split()
    assert source == place == "/opt/inferq"
    made = " ".join(rest for stage in IMAGES.lineage(origin) for rest in stage.of("RUN"))
    assert f"-m venv {place}" in made
    root, other = (IMAGES.lineage(each)[0].base for each in (origin, target))
    assert root.replace("-devel-", "-base-") == other
    assert "/opt/inferq/bin:" in IMAGES.image(target).environment["PATH"]


def test_new_volumes_belong_to_the_user_of_the_image() -> None:
    """A new volume takes the owner of the folder that it is mounted on."""
    for service, place, option in (
        ("models", "/models", ""),
        ("worker-gpu", "/var/cache/inferq/plans", " --mode=0700"),
    ):
        assert any(mount[1:] == [place] for mount in mounts(service))
        target = SERVICES[service]["build"]["target"]
        made = " ".join(rest for stage in IMAGES.lineage(target) for rest in stage.of("RUN"))
        assert f"install --directory --owner=inferq --group=inferq{option} {place}" in made


@pytest.mark.parametrize("service", WORKERS)
def test_workers_look_for_models_and_plans_where_they_are_mounted(service: str) -> None:
    environment = container(service).environment
    assert [environment["INFERQ_MODELS"], "ro"] in [mount[1:] for mount in mounts(service)]
    plans = environment.get("INFERQ_PLANS")
    assert (plans is not None) is (service == "worker-gpu")
    assert plans is None or [plans] in [mount[1:] for mount in mounts(service)]
