"""``inferq doctor`` names what is wrong with Redis, this host, the models and the workers."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers import onnx_models
from helpers.gpus import fake_nvml
from helpers.repository import fake_model
from helpers.stock import PlainWorker
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.workers.cli import inferq
from inferq.workers.doctor import host
from inferq.workers.doctor import models as doctor_models
from inferq.workers.doctor import redis as redis_checks
from inferq.workers.doctor.finding import Finding, Level, ok, within
from inferq.workers.doctor.models import models
from inferq.workers.doctor.network import network
from inferq.workers.models.repository import load_model
from inferq.workers.models.spec import ModelSpec
from inferq.workers.process.embedded import EmbeddedRedis

#: Tests of this module configure their Redis.
SERVER: dict[str, Any] = {"appendonly": True}

Doctor = Callable[..., Result]


@pytest.fixture
def doctor(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """``doctor("--json")`` runs the command."""
    monkeypatch.setenv("INFERQ_REDIS_URL", redis_url)
    return lambda *args: CliRunner().invoke(inferq, ["doctor", *args])


def _checks(doctor: Doctor, *args: str) -> dict[str, Finding]:
    """What each check found; the exit status is 1 exactly if one is an error."""
    run = doctor(*args, "--json")
    found = {each["check"]: Finding(**each) for each in json.loads(run.stdout)}
    assert run.exit_code == int(any(each.level == "error" for each in found.values())), run.output
    return found


def test_all_is_well_with_a_lasting_redis_a_good_model_and_a_worker(
    redis_url: str, doctor: Doctor, tmp_path: Path
) -> None:
    fake_model(tmp_path, "echo", knobs="max_batch_size = 8")
    onnx_models.double(tmp_path / "double" / "2" / "model.onnx")
    with Worker(redis_url, tmp_path, ["echo"]):
        until(lambda: "serving echo:1" in doctor().stdout, 30, "it answers remote control")
        run = doctor("--models", str(tmp_path))
        found = _checks(doctor, "--models", str(tmp_path))
    assert (run.exit_code, run.stderr) == (0, "")
    assert {each.level for each in found.values()} == {"ok"}
    assert found["persistence"].found == (
        "appendonly: a Redis that dies loses at most about the last second"
    )
    assert found["eviction"].found == "maxmemory-policy noeviction, no maxmemory"
    assert "ms a round trip (median of 11, slowest " in found["latency"].found
    assert found["model echo"].found == "version 1, fake, batches of up to 8"
    assert found["model double"].found.startswith("version 2, onnxruntime, ")
    (worker,) = (each for each in found.values() if each.check.startswith("worker test@"))
    assert worker.found == "serving echo:1"
    lines = run.stdout.splitlines()
    assert len(lines) == len(found)
    assert all(line.startswith("ok       ") for line in lines)


@pytest.mark.parametrize(
    ("url", "found", "todo"),
    [
        ("redis://u:pw@127.0.0.1:1/0", "redis://***@127.0.0.1:1/0 does not answer", "--redis-url"),
        ("redis://no-such-host.invalid", "does not answer", "start Redis there"),
        ("http://x", "'http://x'; expected one of redis://", "INFERQ_REDIS_URL"),
    ],
)
def test_a_wrong_url_is_named_and_the_other_checks_go_on(
    doctor: Doctor, url: str, found: str, todo: str
) -> None:
    checks = _checks(doctor, "--redis-url", url)
    assert checks["redis"].level == "error"
    assert found in checks["redis"].found
    assert todo in checks["redis"].todo
    assert "pw" not in checks["redis"].found
    assert checks["package celery"].level == "ok"
    assert "models" in checks


def test_no_url_and_a_bad_setting_are_named(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_LEASE_S", "soon")
    assert "INFERQ_LEASE_S is 'soon'; expected" in _checks(doctor)["settings"].found
    monkeypatch.delenv("INFERQ_REDIS_URL")
    assert "no Redis URL: pass one, or set INFERQ_REDIS_URL" in _checks(doctor)["settings"].found


@pytest.mark.parametrize("user", ["", ":wrong@", "nobody:wrong@"])
def test_a_missing_or_wrong_password_is_named(
    redis: Redis, redis_url: str, doctor: Doctor, user: str
) -> None:
    redis.config_set("requirepass", "secret")
    assert (
        "refuses"
        not in _checks(doctor, "--redis-url", _with_user(redis_url, ":secret@"))["redis"].found
    )
    refused = _checks(doctor, "--redis-url", _with_user(redis_url, user))["redis"]
    assert refused.level == "error"
    assert "refuses the user or password" in refused.found
    assert "wrong" not in refused.found
    assert "percent-encoded" in refused.todo


def test_a_redis_that_asks_others_for_no_password_is_a_warning(
    redis: Redis, redis_url: str, doctor: Doctor
) -> None:
    """A list of users with passwords protects nothing while the user `default` needs none."""
    redis.acl_setuser("worker", enabled=True, passwords=["+pw"], commands=["+@all"], keys=["*"])
    url = _with_user(redis_url, "worker:pw@")
    found = _checks(doctor, "--redis-url", url)["password"]
    assert found.level == "warning"
    assert "default" in found.found
    redis.acl_setuser(
        "default",
        enabled=True,
        passwords=["+secret"],
        reset_passwords=True,
        commands=["+@all"],
        keys=["*"],
    )
    assert "password" not in _checks(doctor, "--redis-url", url)
    redis.acl_setuser("default", enabled=True, nopass=True, commands=["+@all"], keys=["*"])
    assert "password" not in _checks(doctor, "--redis-url", redis_url)


def test_a_setting_that_nothing_reads_is_a_warning(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_REMOTE_CONTRL", "0")
    found = _checks(doctor)["settings"]
    assert found.level == "warning"
    assert "INFERQ_REMOTE_CONTRL" in found.found
    assert "INFERQ_REMOTE_CONTROL" in found.todo


def _with_user(url: str, user: str) -> str:
    return url.replace("redis://", f"redis://{user}")


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield listener.getsockname()[1]


def test_a_redis_that_is_silent_is_not_waited_for(doctor: Doctor, silent_port: int) -> None:
    began = time.monotonic()
    found = _checks(doctor, "--redis-url", f"redis://127.0.0.1:{silent_port}")
    assert time.monotonic() - began < 20
    assert "does not answer: Timeout" in found["redis"].found


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_an_evicting_policy_is_an_error(redis: Redis, doctor: Doctor, policy: str) -> None:
    redis.config_set("maxmemory-policy", policy)
    redis.config_set("maxmemory", 100_000_000)
    found = _checks(doctor)["eviction"]
    assert found.level == "error"
    assert found.found.startswith(f"maxmemory-policy {policy}, maxmemory 100 MB: Redis drops")
    assert found.todo == "set maxmemory-policy noeviction (redis.conf, or CONFIG SET)"


def test_a_redis_that_is_nearly_full_is_a_warning(redis: Redis, doctor: Doctor) -> None:
    redis.config_set("maxmemory", redis.info("memory")["used_memory"] + 200_000)
    assert "a full Redis takes no requests" in _checks(doctor)["memory"].found


def test_what_a_redis_that_dies_loses_is_told(redis: Redis, doctor: Doctor) -> None:
    redis.config_set("appendfsync", "no")
    assert "the last 30 s" in _checks(doctor)["persistence"].found
    redis.config_set("appendfsync", "always")
    assert "loses nothing" in _checks(doctor)["persistence"].found
    redis.config_set("appendonly", "no")
    found = _checks(doctor)["persistence"]
    assert found.level == "warning"
    assert found.found.startswith("none: if Redis ends, all requests")
    assert "appendonly yes" in found.todo
    redis.config_set("save", "3600 1")
    redis.set("x", 1)
    found = _checks(doctor)["persistence"]
    assert found.found.startswith("snapshots only (3600 1): a Redis that dies loses all since")


def test_a_slow_link_and_a_clock_that_is_off_are_warnings(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For that module only: others that are imported meanwhile would keep the wrong clock for good.
    off = SimpleNamespace(time=lambda: time.time() + 90, perf_counter=time.perf_counter)
    monkeypatch.setattr(redis_checks, "SLOW_MS", 0.0)
    monkeypatch.setattr(redis_checks, "time", off)
    found = _checks(doctor)
    assert found["latency"].level == found["clock"].level == "warning"
    assert re.match(r"Redis' clock is (89\.9|90\.0)\d* s", found["clock"].found)
    assert found["clock"].found.endswith(" s behind ours")


def test_a_redis_that_may_not_be_asked_for_its_settings_is_judged_by_the_rest(
    redis: Redis, redis_url: str, doctor: Doctor
) -> None:
    redis.acl_setuser(
        "app",
        enabled=True,
        passwords=["+pw"],
        keys=["*"],
        channels=["*"],
        commands=["+@all", "-config"],
    )
    found = _checks(doctor, "--redis-url", _with_user(redis_url, "app:pw@"))
    assert (found["persistence"].level, found["redis"].level) == ("ok", "ok")


def test_each_kind_of_model_that_cannot_be_served_is_an_error_with_its_remedy(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "inferq.workers.engines.torch", raising=False)
    fake_model(tmp_path, "good")
    fake_model(tmp_path, "typo", knobs="lane = 3")
    fake_model(tmp_path, "broken", knobs="= =")
    for name, file in (("corrupt", "model.onnx"), ("extra", "model.pt2")):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / file).write_bytes(b"no model")
    (tmp_path / "folder" / "1" / "model.onnx").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("INFERQ_MODELS", str(tmp_path))
    found = _checks(doctor)
    levels = {check: each.level for check, each in found.items() if check.startswith("model ")}
    assert levels.pop("model good") == "ok"
    assert set(levels.values()) == {"error"}
    assert len(levels) == 5
    assert found["models"].found == "passed over, as they hold no model: empty"
    assert "lane is not a known key; did you mean 'lanes'?" in found["model typo"].found
    assert found["model typo"].todo.startswith("correct the file that it names")
    assert "model.toml" in found["model broken"].found
    assert "corrupt/1/model.onnx" in found["model corrupt"].found
    assert "engine 'torch' cannot be imported" in found["model extra"].found
    assert found["model extra"].todo == 'pip install "inferq[torch]"'


def test_a_model_whose_engine_lacks_its_gpu_is_an_error(tmp_path: Path) -> None:
    onnx_models.double(tmp_path / "m" / "1" / "model.onnx")
    (tmp_path / "m" / "model.toml").write_text('engine = "tensorrt"')
    (found,) = models(tmp_path, False)
    assert found.level is Level.ERROR
    assert found.found.startswith("its engine, tensorrt, cannot run here: no GPU (")
    assert "inferq worker --cpu" in found.todo
    (found,) = models(tmp_path, True)
    assert found.level is Level.OK


def test_a_file_or_folder_that_may_not_be_read_is_an_error() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name in ("closed", "file", "good"):
            onnx_models.double(root / name / "1" / "model.onnx")
        assert {each.level for each in models(root, False)} == {Level.OK}
        (root / "file" / "1" / "model.onnx").chmod(0)
        (root / "closed").chmod(0)
        before = os.geteuid()
        if before == 0:  # root reads every file
            os.seteuid(65534)
        try:
            found = {each.check: each for each in models(root, False)}
        finally:
            os.seteuid(before)
        (root / "closed").chmod(0o755)
    assert found["model good"].level == Level.OK
    for name in ("file", "closed"):
        assert found[f"model {name}"].level == Level.ERROR
        assert "ermission denied" in found[f"model {name}"].found
        assert str(root / name) in found[f"model {name}"].found
        assert found[f"model {name}"].todo == "let the worker's user read it"


def test_what_a_library_makes_of_one_model_keeps_no_other_from_being_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        onnx_models.double(tmp_path / name / "1" / "model.onnx")

    def odd(root: Path, name: str, *, on_cpu: bool) -> ModelSpec:
        if name == "a":
            raise KeyError("odd")
        return load_model(root, name, on_cpu=on_cpu)

    monkeypatch.setattr(doctor_models, "load_model", odd)
    first, second = models(tmp_path, False)
    assert (first.level, first.found) == (Level.ERROR, "cannot be read: KeyError('odd')")
    assert second.level == Level.OK


def test_a_repository_that_is_none_or_empty_is_told(doctor: Doctor, tmp_path: Path) -> None:
    missing = _checks(doctor, "--models", str(tmp_path / "none"))["models"]
    assert (missing.level, "expected a folder" in missing.found) == ("error", True)
    empty = _checks(doctor, "--models", str(tmp_path))["models"]
    assert (empty.level, "no models in" in empty.found) == ("warning", True)
    assert "INFERQ_MODELS names a repository" in _checks(doctor)["models"].found


def test_a_stock_worker_on_a_queue_of_ours_is_an_error(redis_url: str, doctor: Doctor) -> None:
    assert _checks(doctor)["workers"].todo == "start one: inferq worker --models DIR"
    with PlainWorker(redis_url, "json", queue="inferq.m,plain"):

        def stock() -> Finding | None:
            named = (each for check, each in _checks(doctor).items() if "plain-json@" in check)
            return next(named, None)

        found = until(stock, 60, "the stock worker answers")
    assert found is not None
    assert found.level == "error"
    assert "a stock Celery worker takes the requests of m and drops them" in found.found
    assert "start it without -Q inferq.m;" in found.todo


def test_a_package_that_is_missing_or_too_old_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name in {"celery", "kombu"}:
            return "5.3.6" if name == "celery" else "5.8.0rc1"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(host, "version", version)
    found = {each.check: each for each in host.packages()}
    assert (found["package celery"].level, found["package kombu"].level) == ("error", "error")
    assert found["package celery"].found == "5.3.6; expected >=5.7,<5.8"
    assert found["package celery"].todo == 'pip install "celery>=5.7,<5.8"'
    assert (found["package redis"].level, found["package redis"].found) == (
        "error",
        "not installed",
    )
    assert found["package onnxruntime"].level == "warning"
    assert 'pip install "inferq[torch]"' in found["package torch"].found
    assert 'pip install "inferq[flower]"' in found["package flower"].found
    assert found["package tensorrt-rtx"].level == "ok"


def test_nothing_heavy_is_imported_to_tell_versions(doctor: Doctor) -> None:
    before = set(sys.modules)
    _checks(doctor)
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not new & {"torch", "tensorrt", "tensorrt_rtx", "pycuda", "onnxruntime"}


def test_gpus_are_listed_and_one_that_is_asked_for_in_vain_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvml(monkeypatch)
    assert [each.level for each in host.gpus(None)] == [Level.OK, Level.OK]
    assert next(host.gpus(1)).found.startswith("1: ")
    (missing,) = host.gpus(7)
    assert (missing.level, "gpu is 7; expected 0 to 1" in missing.found) == (Level.ERROR, True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert next(host.gpus(None)).found.startswith("none: models run on the CPU")
    monkeypatch.setattr(host, "DRIVER", tmp_path)
    (warned,) = host.gpus(None)
    assert warned.level == Level.WARNING
    assert "nvidia-ml-py is not installed" in warned.found


def test_a_check_that_hangs_is_given_up_and_one_that_fails_says_so() -> None:
    (late,) = within(0.05, "gpu", lambda: [ok("gpu", str(threading.Event().wait(5)))])
    assert (late.level, late.found) == (Level.ERROR, "no answer within 0.05 s")
    with pytest.raises(ZeroDivisionError):
        within(5, "gpu", lambda: [ok("gpu", str(1 // 0))])


def test_a_server_that_ends_meanwhile_is_told(doctor: Doctor, server: EmbeddedRedis) -> None:
    server.stop()
    assert "does not answer" in _checks(doctor)["redis"].found


@pytest.mark.parametrize(
    ("url", "level", "found"),
    [
        ("redis://redis:6379/0", "warning", "go to redis as they are: whoever is on the way"),
        ("redis://:pw@10.0.0.1/0", "warning", "go to 10.0.0.1 as they are: whoever is on the way"),
        ("sentinel://localhost;sentinel://far", "warning", "the password go to far as they are"),
        ("rediss://far/0?ssl_cert_reqs=none", "warning", "TLS without verification: ssl_cert_reqs"),
        ("rediss://127.0.0.1/0?ssl_cert_reqs=CERT_NONE", "warning", "TLS without verification"),
        ("rediss://far/0?ssl_check_hostname=false", "warning", "TLS without the host's name"),
        ("rediss://far:1/0", "ok", "TLS, and the certificate must be of far"),
    ],
)
def test_a_way_to_redis_that_others_can_read_or_take_is_warned_of(
    url: str, level: str, found: str
) -> None:
    (finding,) = network(url)
    assert finding.check == "network"
    assert finding.level == level
    assert found in finding.found
    assert "pw" not in finding.found.replace("password", "")
    assert bool(finding.todo) == (level == "warning")


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:1/0",
        "redis://localhost",
        "redis://[::1]:1",
        "unix:///r.sock",
        "redis+socket:///r.sock",
        "sentinel://localhost:1;sentinel://127.0.0.2",
        "redis://",
    ],
)
def test_a_way_that_stays_on_this_host_is_not(url: str) -> None:
    assert list(network(url)) == []


def test_doctor_tells_of_the_way_also_where_redis_does_not_answer(doctor: Doctor) -> None:
    found = _checks(doctor, "--redis-url", "redis://no-such-host.invalid:1/0")
    assert found["network"].level == "warning"
    assert found["redis"].level == "error"
