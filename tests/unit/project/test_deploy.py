"""Everything that the deployment files refer to exists, and they agree with each other."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from helpers.acl import roles
from helpers.compose import COMPOSE, IMAGES, OURS, SERVICES, WORKERS, container, mounts
from helpers.deploy import (
    COMPOSE_FILE,
    DOCKERFILE,
    ENV_EXAMPLE,
    ROOT,
    example_env,
    interpolate,
    read_env,
    seconds,
    tracked,
    variables_of,
)

from inferq.shared.settings import ENV_PREFIX, Settings
from inferq.workers.cli import inferq

PROMETHEUS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
LASTING = sorted(name for name, service in SERVICES.items() if service["restart"] != "no")
#: Who each service is to Redis. The operator is in none of them but Redis itself.
ROLE_OF = {
    "demo": "producer",
    "flower": "watcher",
    "worker-cpu": "worker",
    "worker-gpu": "worker",
}
#: The user canceller is for whoever joins the network; its password is no less set.
SECRETS = [
    "INFERQ_FLOWER_PASSWORD", "INFERQ_REDIS_PASSWORD", "INFERQ_PRODUCER_PASSWORD",
    "INFERQ_CANCELLER_PASSWORD", "INFERQ_WORKER_PASSWORD", "INFERQ_WATCHER_PASSWORD",
]  # fmt: skip


# --- services ------------------------------------------------------------------------------------


def test_the_services_are_those_that_the_docs_tell_of() -> None:
    assert sorted(SERVICES) == [
        "demo", "flower", "models", "prometheus", "redis", "worker-cpu", "worker-gpu",
    ]  # fmt: skip
    assert sorted(set(SERVICES) - set(LASTING)) == ["demo", "models"]
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}
    assert profiles == {
        "demo": ["demo"], "flower": [], "models": ["demo"], "prometheus": [], "redis": [],
        "worker-cpu": ["cpu"], "worker-gpu": ["gpu"],
    }  # fmt: skip


@pytest.mark.parametrize("service", OURS)
def test_every_image_is_built_from_a_target_that_is_there(service: str) -> None:
    build = SERVICES[service]["build"]
    assert (ROOT / build["context"] / build["dockerfile"]) == DOCKERFILE
    assert build["target"] in IMAGES.stages
    assert "build" not in SERVICES[service]["image"]


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_what_a_service_refers_to_is_declared(service: str) -> None:
    given = SERVICES[service]
    assert set(given.get("depends_on", {})) <= set(SERVICES)
    assert set(given.get("networks", [])) <= set(COMPOSE["networks"])
    assert set(given.get("secrets", [])) <= set(COMPOSE["secrets"])
    for source, *_ in mounts(service):
        if source.startswith("."):
            assert source.removeprefix("./") in tracked()
        else:
            assert source in COMPOSE["volumes"]


def test_nothing_is_declared_in_vain() -> None:
    used = {source for service in SERVICES for source, *_ in mounts(service)}
    assert set(COMPOSE["volumes"]) <= used
    for kind in ("networks", "secrets"):
        used = {name for service in SERVICES.values() for name in service.get(kind, [])}
        assert set(COMPOSE[kind]) == used


def test_who_is_waited_for_as_healthy_has_a_healthcheck_and_who_is_to_complete_ends() -> None:
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert container(other).healthcheck
            else:
                assert how["condition"] == "service_completed_successfully"
                assert other not in LASTING
            hidden = set(SERVICES[other].get("profiles", [])) - set(service.get("profiles", []))
            assert not hidden or how["required"] is False


@pytest.mark.parametrize("service", LASTING)
def test_every_lasting_service_has_a_healthcheck_and_comes_back(service: str) -> None:
    assert SERVICES[service]["restart"] == "unless-stopped"
    assert container(service).healthcheck


def test_only_flower_and_prometheus_publish_ports_and_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "flower": ["127.0.0.1:5555:5555"],
        "prometheus": ["127.0.0.1:9090:9090"],
    }
    assert COMPOSE["networks"]["queues"] == {"internal": True}
    assert {name for name, each in SERVICES.items() if "front" in each.get("networks", [])} == set(
        published
    )


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_any_number_of_a_service_may_run(service: str) -> None:
    assert not {"container_name", "hostname"} & set(SERVICES[service])


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_every_service_is_confined(service: str) -> None:
    given = SERVICES[service]
    assert given["cap_drop"] == ["ALL"]
    assert given["security_opt"] == ["no-new-privileges:true"]
    # Prometheus: a secret that is no file can be put into no other root.
    assert given["read_only"] is (service != "prometheus")
    assert not {"privileged", "cap_add", "pid", "ipc"} & set(given)
    assert {"memory", "pids"} <= set(given["deploy"]["resources"]["limits"])
    assert given["logging"]["options"]["max-size"]


@pytest.mark.parametrize("service", WORKERS)
def test_a_worker_has_longer_to_stop_than_its_grace_period(service: str) -> None:
    worker = container(service)
    assert worker.grace_s >= float(worker.environment["INFERQ_GRACE_S"]) + 10


def test_only_the_gpu_worker_reserves_gpus() -> None:
    wanted = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in SERVICES.items()
        if "reservations" in service["deploy"]["resources"]
    }
    assert wanted == {"worker-gpu": [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]}


# --- variables -----------------------------------------------------------------------------------


def test_every_variable_of_compose_is_in_the_example_and_the_other_way_round() -> None:
    text = COMPOSE_FILE.read_text()
    used = variables_of(text) | {each["environment"] for each in COMPOSE["secrets"].values()}
    assert used == set(read_env()) - {"COMPOSE_PROFILES"}
    assert set(read_env()["COMPOSE_PROFILES"].split(",")) <= {
        profile for service in SERVICES.values() for profile in service.get("profiles", [])
    }


def test_defaults_in_compose_are_those_of_the_example() -> None:
    told = read_env()
    defaults = dict(re.findall(r"\$\{(\w+):?-([^}]*)\}", COMPOSE_FILE.read_text()))
    assert defaults == {name: told[name] for name in defaults}
    assert set(defaults) == set(told) - {*SECRETS, "COMPOSE_PROFILES"}


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("unset", [True, False], ids=["unset", "empty"])
def test_nothing_starts_without_a_password(name: str, unset: bool) -> None:
    variables = {**example_env(), name: ""}
    if unset:
        del variables[name]
    with pytest.raises(LookupError, match=f"{name}: is not set"):
        interpolate(COMPOSE_FILE.read_text(), variables)


def test_the_example_holds_no_password() -> None:
    assert [name for name, value in read_env().items() if not value] == SECRETS
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" not in tracked()


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_every_variable_that_a_container_gets_is_one_that_inferq_knows(service: str) -> None:
    given = {name for name in container(service).environment if name.startswith(ENV_PREFIX)}
    sources = [path.read_text() for root in ("shared", "workers") for path in _python(ROOT / root)]
    known = {f"{ENV_PREFIX}{field.upper()}" for field in Settings.model_fields}
    known |= {name for name in given if any(f'"{name}"' in source for source in sources)}
    assert given - known == set()


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_the_settings_that_a_container_gets_are_valid(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = container(service).environment
    for name, value in environment.items():
        assert isinstance(value, str), f"{name} is no text"
        if name.startswith(ENV_PREFIX):
            monkeypatch.setenv(name, value)
    if service in ROLE_OF:
        role = ROLE_OF[service]
        password = example_env()[f"INFERQ_{role.upper()}_PASSWORD"]
        assert Settings.load().redis_url == f"redis://{role}:{password}@redis:6379/0"
    else:
        assert "INFERQ_REDIS_URL" not in environment


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_a_container_knows_no_password_but_those_that_it_needs(service: str) -> None:
    env = example_env()
    known = str({**SERVICES[service], "secrets": None})
    wanted = {
        "redis": {name for name in SECRETS if name != "INFERQ_FLOWER_PASSWORD"},
        "flower": {"INFERQ_FLOWER_PASSWORD", "INFERQ_WATCHER_PASSWORD"},
    }.get(service, {f"INFERQ_{ROLE_OF[service].upper()}_PASSWORD"} if service in ROLE_OF else set())
    assert {name for name in SECRETS if env[name] in known} == wanted
    assert len({env[name] for name in SECRETS}) == len(SECRETS), "each can be told from the others"


def test_redis_is_told_the_password_of_every_user() -> None:
    told = SERVICES["redis"]["environment"]
    env = example_env()
    assert told == {
        "REDISCLI_AUTH": env["INFERQ_REDIS_PASSWORD"],
        **{f"{role.upper()}_PASSWORD": env[f"INFERQ_{role.upper()}_PASSWORD"] for role in roles()},
    }


def _python(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_new_env_writes_random_passwords_for_the_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    script = tmp_path / "deploy" / "new-env.sh"
    script.write_bytes((ROOT / "deploy" / "new-env.sh").read_bytes())
    (tmp_path / ".env.example").write_bytes(ENV_EXAMPLE.read_bytes())

    def run(**env: str) -> int:
        return subprocess.run(
            ["sh", script], env={**os.environ, **env}, capture_output=True, timeout=30
        ).returncode

    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dirname", "mv", "rm", "tr"):
        (tools / name).symlink_to(str(shutil.which(name)))
    written = tmp_path / ".env"
    assert run(PATH=str(tools)) == 1, "it makes no random values"
    assert not list(tmp_path.glob(".env*[!e]")), "none is written"
    assert run() == 0
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    told = read_env(written)
    passwords = [told[name] for name in SECRETS]
    assert all(re.fullmatch(r"[0-9a-f]{48}", each) for each in passwords)
    assert len(set(passwords)) == len(SECRETS)
    assert {**told, **dict.fromkeys(SECRETS, "")} == read_env()
    interpolate(COMPOSE_FILE.read_text(), told)
    before = written.read_text()
    assert run() == 1
    assert written.read_text() == before


_EIGHT_GPUS = """#!/bin/sh
for n in 0 1 2 3 4 5 6 7; do
    echo "GPU $n: No Card (UUID: GPU-$n)"
    echo "  MIG 1g.10gb     Device  0: (UUID: MIG-$n)"
done
"""


@pytest.mark.parametrize(("smi", "memory"), [(_EIGHT_GPUS, "32g"), ("#!/bin/sh\nexit 9\n", "4g")])
def test_a_container_of_many_gpus_has_memory_for_a_worker_process_on_each(
    tmp_path: Path, smi: str, memory: str
) -> None:
    (tmp_path / "deploy").mkdir()
    script = tmp_path / "deploy" / "new-env.sh"
    script.write_bytes((ROOT / "deploy" / "new-env.sh").read_bytes())
    (tmp_path / ".env.example").write_bytes(ENV_EXAMPLE.read_bytes())
    (tmp_path / "nvidia-smi").write_text(smi)
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    subprocess.run(["sh", script], env={**os.environ, "PATH": path}, check=True, timeout=30)
    told = read_env(tmp_path / ".env")
    services = yaml.safe_load(interpolate(COMPOSE_FILE.read_text(), told))["services"]
    limits = {name: services[name]["deploy"]["resources"]["limits"] for name in WORKERS}
    assert limits["worker-gpu"]["memory"] == memory
    assert limits["worker-cpu"]["memory"] == "4g", "it holds one process"


# --- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", OURS)
def test_every_command_and_each_of_its_options_exists(service: str) -> None:
    inside = container(service)
    _check_command(inside.argv)
    if inside.healthcheck:
        _check_command(inside.healthcheck)


def _check_command(argv: Sequence[str]) -> None:
    program, *args = argv
    if program == "python" and args[0] == "-m":
        command = importlib.import_module(args[1]).main
        _check_options(command, args[2:])
        return
    if program == "python":
        assert args[0] == "-c"
        compile(args[1], "healthcheck", "exec")
        return
    assert program == "inferq"
    found = inferq.get_command(click.Context(inferq), args[0])
    assert found is not None, f"there is no inferq {args[0]}"
    _check_options(found, args[1:])


def _check_options(command: click.Command, args: Sequence[str]) -> None:
    """Options that are handed on to another program are none of ours, and not used here."""
    options = {name for param in command.params for name in [*param.opts, *param.secondary_opts]}
    given = {arg.partition("=")[0] for arg in args if arg.startswith("-")}
    assert given - options == set()


def test_an_option_that_is_not_there_would_be_found() -> None:
    with pytest.raises(AssertionError, match="--cpus"):
        _check_command(["inferq", "worker", "--cpus"])
    with pytest.raises(AssertionError, match="no inferq wroker"):
        _check_command(["inferq", "wroker"])


# --- redis, prometheus ---------------------------------------------------------------------------


def _directives() -> dict[str, str]:
    lines = (ROOT / "deploy" / "redis" / "redis.conf").read_text().splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))


def test_redis_has_room_for_rewriting_its_file() -> None:
    units = {"gb": 2**30, "g": 2**30}

    def size(text: str) -> int:
        number, unit = re.fullmatch(r"(\d+)(\D+)", text).groups()  # type: ignore[union-attr]
        return int(number) * units[unit]

    limit = SERVICES["redis"]["deploy"]["resources"]["limits"]["memory"]
    assert size(limit) >= 2 * size(_directives()["maxmemory"])


def test_redis_never_evicts_and_keeps_what_it_was_told() -> None:
    told = _directives()
    assert told["maxmemory-policy"] == "noeviction"
    assert (told["appendonly"], told["appendfsync"]) == ("yes", "everysec")
    assert "requirepass" not in told
    assert ["redis", "/data"] in mounts("redis")
    assert SERVICES["redis"]["working_dir"] == "/data"


def _job(name: str) -> Any:
    (found,) = [each for each in PROMETHEUS["scrape_configs"] if each["job_name"] == name]
    return found


def test_prometheus_finds_every_worker_at_its_port() -> None:
    (found,) = _job("inferq-worker")["dns_sd_configs"]
    assert (found["names"], found["type"]) == (WORKERS, "A")
    for worker in WORKERS:
        assert container(worker).environment["INFERQ_METRICS"] == f"0.0.0.0:{found['port']}"
        assert IMAGES.stages[worker].of("EXPOSE") == [str(found["port"])]
        assert set(SERVICES[worker]["networks"]) & set(SERVICES["prometheus"]["networks"])


def test_prometheus_asks_flower_with_its_password() -> None:
    job = _job("inferq-flower")
    (target,) = job["static_configs"][0]["targets"]
    service, _, port = target.partition(":")
    flower = container(service)
    assert flower.argv[flower.argv.index("--port") + 1] == port
    assert IMAGES.stages["flower"].of("EXPOSE") == [port]
    assert SERVICES["flower"]["ports"][0].rpartition(":")[2] == port
    (secret,) = SERVICES["prometheus"]["secrets"]
    assert job["basic_auth"]["password_file"] == f"/run/secrets/{secret}"
    password = example_env()[COMPOSE["secrets"][secret]["environment"]]
    user = job["basic_auth"]["username"]
    assert flower.environment["INFERQ_FLOWER_BASIC_AUTH"] == f"{user}:{password}"


def test_prometheus_reads_the_file_that_is_mounted_and_writes_to_its_volume() -> None:
    command = dict(each.removeprefix("--").split("=") for each in SERVICES["prometheus"]["command"])
    places = {mount[1]: mount[0] for mount in mounts("prometheus")}
    assert places[command["config.file"]] == "./deploy/prometheus/prometheus.yml"
    assert places[command["storage.tsdb.path"]] == "prometheus"


def test_flower_is_probed_at_its_port() -> None:
    flower = container("flower")
    port = flower.argv[flower.argv.index("--port") + 1]
    assert f"http://127.0.0.1:{port}/healthcheck" in flower.healthcheck[-1]


# --- the docs ------------------------------------------------------------------------------------


def _shown() -> list[list[str]]:
    """The commands in docs/deploy.md, as words."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_service_profile_and_option_that_the_docs_use_exists() -> None:
    composed = [words[2:] for words in _shown() if words[:2] == ["docker", "compose"]]
    assert len(composed) >= 10
    profiles = {name for each in SERVICES.values() for name in each.get("profiles", [])}
    for words in composed:
        for option, value in pairwise(words):
            if option == "--profile":
                assert value in profiles
            if option == "--scale":
                assert value.partition("=")[0] in SERVICES
        verbs = [word for word in words if word in {"run", "exec", "logs", "restart", "cp"}]
        if verbs:
            rest = [word for word in words[words.index(verbs[0]) + 1 :] if word[0] != "-"]
            service, inside = rest[0].partition(":")[0], rest[1:]
            assert service in SERVICES
            if verbs[0] == "run":
                _check_command([*IMAGES.image(service).entrypoint, *inside])
            if verbs[0] == "exec" and inside[0] == "inferq":
                _check_command(inside)


def test_every_file_below_deploy_is_used() -> None:
    used = COMPOSE_FILE.read_text() + (ROOT / "docs" / "deploy.md").read_text()
    for name in tracked():
        path = Path(name)
        if path.parts[:1] == ("deploy",) and (ROOT / path).is_file():
            assert name in used or f"./{path.parent}:" in used


def test_durations_are_read_as_docker_reads_them() -> None:
    assert (seconds("1m30s"), seconds("500ms"), seconds("10m")) == (90.0, 0.5, 600.0)
