"""The TensorRT engine in a real worker, from the queue to the result, without a GPU.

PyCUDA is real, the driver is a fake on the host's memory (helpers/fakecuda), and `tensorrt` is a
double that computes with ONNX Runtime on that memory (helpers/double_trt). So what is shown is all
but TensorRT itself: plans, lanes, buffers, streams, events, graphs, faults.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from helpers import onnx_models, padded_models
from helpers.fakecuda import environment
from helpers.padded_models import RIGHT
from helpers.results import nothing_is_held
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared.codec import decode_advert
from inferq.shared.errors import InvalidInput
from inferq.shared.names import Names
from inferq.workers.demo.models import MAGIKA, prepare
from inferq.workers.models.repository import load_model
from inferq.workers.supervision.health import EX_FATAL_ENGINE
from inferq.workers.trt.plan_lock import locked

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 30.0
TOML = 'engine = "tensorrt"\nmax_batch_size = 8\n'

Environment = Callable[..., dict[str, str]]


@pytest.fixture
def on_gpu(fake_driver: Path, tmp_path: Path) -> Environment:
    """The environment of a worker that finds a GPU and TensorRT; settings as in libcuda.c."""

    def made(**settings: object) -> dict[str, str]:
        env = environment(fake_driver, **settings)
        folders = [str(TESTS), str(TESTS / "helpers" / "double_trt"), env.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        env["INFERQ_PLANS"] = str(tmp_path / "plans")
        return env

    return made


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    onnx_models.double(root / "double" / "1" / "model.onnx")
    onnx_models.two_inputs(root / "two" / "1" / "model.onnx")
    for name in ("double", "two"):
        (root / name / "model.toml").write_text(TOML)
    return root


def _records(tmp_path: Path) -> dict[str, dict[str, object]]:
    found = [json.loads(path.read_text()) for path in (tmp_path / "plans").glob("*.json")]
    return {record["model_name"]: record for record in found}


def _rows(first: int, rows: int, width: int) -> np.ndarray:
    return np.arange(first, first + rows * width, dtype=np.float32).reshape(rows, width)


def test_requests_are_batched_through_lanes_and_bit_equal(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path, on_gpu: Environment
) -> None:
    with Worker(redis_url, models, env=on_gpu()), Client(redis_url) as client:
        items = [{"x": _rows(n, 1 + n % 3, 3)} for n in range(60)]
        results = list(client.map("double", items, in_flight=32))
        for item, result in zip(items, results, strict=True):
            assert np.array_equal(result.outputs["y"], 2 * item["x"])
            assert result.receipt is not None
            assert result.receipt.engine == "tensorrt"
            for ms in (
                result.receipt.gpu_h2d_ms,
                result.receipt.gpu_compute_ms,
                result.receipt.gpu_d2h_ms,
            ):
                assert ms is not None
                assert ms >= 0
        assert max(result.receipt.requests for result in results if result.receipt) > 1
        path = models / "two" / "1" / "model.onnx"
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        for n in range(5):
            given = {"a": _rows(n, 2, 2), "b": _rows(3 * n, 2, 2)}
            outputs = client.infer("two", given, timeout=TIMEOUT_S).outputs
            expected = dict(zip(outputs, session.run(list(outputs), given), strict=True))
            assert all(np.array_equal(outputs[name], expected[name]) for name in expected)
    records = _records(tmp_path)
    assert records.keys() == {"double", "two"}
    assert all(record["verified"] and record["max_error"] == 0 for record in records.values())
    until(lambda: nothing_is_held(redis))


def test_a_real_model_answers_as_on_the_cpu(
    redis_url: str, tmp_path: Path, on_gpu: Environment
) -> None:
    prepare(tmp_path / "models")
    toml = tmp_path / "models" / MAGIKA / "model.toml"
    toml.write_text(TOML + "buckets = [8]\n" + toml.read_text())
    signature = load_model(tmp_path / "models", MAGIKA).signature
    rng = np.random.default_rng(0)
    path = tmp_path / "models" / MAGIKA / "1" / "model.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (spec,), (output,) = signature.inputs, signature.outputs
    asked = rng.integers(0, 256, (8, int(spec.shape[1] or 0))).astype(spec.dtype)
    (expected,) = session.run([output.name], {spec.name: asked})
    with (
        Worker(redis_url, tmp_path / "models", [MAGIKA], env=on_gpu()),
        Client(redis_url) as client,
    ):
        got = client.infer(MAGIKA, {spec.name: asked}, timeout=TIMEOUT_S).outputs[output.name]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_the_second_worker_takes_the_plan_from_the_cache_and_refuses_an_altered_one(
    redis_url: str, models: Path, tmp_path: Path, on_gpu: Environment
) -> None:
    with Worker(redis_url, models, ["double"], env=on_gpu()) as worker:
        assert "built " in worker.log
        assert "differs from ONNX Runtime" in worker.log
    with Worker(redis_url, models, ["double"], env=on_gpu()) as worker:
        assert "built " not in worker.log
        assert "differs from ONNX Runtime" not in worker.log
    (plan,) = (tmp_path / "plans").glob("*.plan")
    content = bytearray(plan.read_bytes())
    content[-1] ^= 1
    plan.write_bytes(content)
    worker = Worker(redis_url, models, ["double"], env=on_gpu())
    worker.start()
    assert worker.process.wait(TIMEOUT_S) == os.EX_CONFIG
    assert f"{plan} is not what was stored" in worker.log
    worker.close()


def test_what_rtx_compiled_is_kept_once_the_model_is_warm(
    redis_url: str, models: Path, tmp_path: Path, on_gpu: Environment
) -> None:
    """A worker that is killed while it serves would leave all of it to its successor."""
    rtx = TOML + '[tensorrt]\nflavour = "tensorrt-rtx"\n'
    (models / "double" / "model.toml").write_text(rtx)
    with Worker(redis_url, models, ["double"], env=on_gpu()):
        (cache,) = (tmp_path / "plans").glob("runtime.*.cache")
        kept = json.loads(cache.read_bytes()[32:])
    assert {json.loads(shapes)["x"][0] for shapes in kept} == {1, 2, 4, 8}


def test_a_worker_says_whose_build_it_waits_for_and_then_serves(
    redis_url: str, models: Path, tmp_path: Path, on_gpu: Environment
) -> None:
    with Worker(redis_url, models, ["double"], env=on_gpu()):
        (lock,) = (tmp_path / "plans").glob("*.lock")
    worker = Worker(redis_url, models, ["double"], env=on_gpu())
    try:
        with locked(lock):
            worker.start()
            said = f"waiting for process {os.getpid()} on "
            until(lambda: said in worker.log, TIMEOUT_S, what="it waits")
        with Client(redis_url) as client:
            given = _rows(0, 2, 3)
            outputs = client.infer("double", {"x": given}, timeout=TIMEOUT_S).outputs
            assert np.array_equal(outputs["y"], 2 * given)
    finally:
        worker.close()


@pytest.mark.parametrize("kind", [Worker, SupervisedWorker])
def test_a_worker_that_is_told_to_stop_while_it_loads_ends_as_it_was_told(
    redis_url: str, models: Path, tmp_path: Path, on_gpu: Environment, kind: type[Worker]
) -> None:
    """And not by PyCUDA's abort(): its loading thread has a context pushed."""
    with Worker(redis_url, models, ["double"], env=on_gpu()):
        (lock,) = (tmp_path / "plans").glob("*.lock")
    worker = kind(redis_url, models, ["double"], env=on_gpu())
    with locked(lock):
        worker.start()
        until(lambda: "waiting for process" in worker.log, TIMEOUT_S, what="it waits")
        until(lambda: " ready." in worker.log, TIMEOUT_S, what="Celery's own side is up")
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(TIMEOUT_S) == os.EX_OK
    assert "PyCUDA" not in worker.log
    worker.close()


def test_a_sticky_error_ends_the_process_and_its_successor_serves_everything(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path, on_gpu: Environment
) -> None:
    knobs = "warm_up = false\npreferred_batch_sizes = [8]\nmax_queue_delay_ms = 500\n"
    (models / "double" / "model.toml").write_text(TOML + knobs)
    env = on_gpu(fail_kernel=8)  # the first process verifies the plan, then computes some batches
    with SupervisedWorker(redis_url, models, ["double"], env=env) as worker, Client(redis_url) as c:
        pending = [c.submit("double", {"x": _rows(n, 1, 3)}) for n in range(60)]
        for n, each in enumerate(pending):
            assert np.array_equal(each.result(TIMEOUT_S).outputs["y"], 2 * _rows(n, 1, 3))
        until(lambda: f"with status {EX_FATAL_ENGINE}" in worker.log, what="one was replaced")
        assert "CUDA is beyond use" in worker.log


@pytest.mark.parametrize(
    "fails",
    [
        {"fail_kernel": 40},
        {"fail_call": 7},
        {"fail_call": 16},
        {"fail_call": 16, "switch_fails": 1},
        {"fail_call": 24, "switch_fails": 1},
    ],
)
def test_a_sticky_error_while_it_loads_is_no_matter_of_configuration(
    redis_url: str, models: Path, tmp_path: Path, on_gpu: Environment, fails: dict[str, int]
) -> None:
    """In a kernel, when memory is asked for, when a lane takes it."""
    stats = tmp_path / "stats.json"
    worker = Worker(redis_url, models, ["double"], env=on_gpu(**fails, stats=stats))
    worker.start()
    assert worker.process.wait(TIMEOUT_S) == EX_FATAL_ENGINE
    assert "CUDA is beyond use" in worker.log
    assert "Traceback" not in worker.log
    assert not stats.exists(), "no library's own clean-up runs: it might not end"
    worker.close()


def test_after_a_sticky_error_in_service_the_process_ends_without_freeing_anything(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path, on_gpu: Environment
) -> None:
    stats = tmp_path / "stats.json"
    knobs = "warm_up = false\npreferred_batch_sizes = [8]\nmax_queue_delay_ms = 500\n"
    (models / "double" / "model.toml").write_text(TOML + knobs)
    with Worker(redis_url, models, ["double"], env=on_gpu()):
        pass  # the plan is built and verified
    env = on_gpu(fail_kernel=3, stats=stats)
    with Worker(redis_url, models, ["double"], env=env) as worker, Client(redis_url) as client:
        for n in range(60):
            client.submit("double", {"x": _rows(n, 1, 3)})
        assert worker.process.wait(TIMEOUT_S) == EX_FATAL_ENGINE
        assert "CUDA is beyond use" in worker.log
        assert "Traceback" not in worker.log
        assert not stats.exists(), "no library's own clean-up runs: it might not end"
    assert nothing_is_held(redis)


def test_a_third_lane_is_opened_where_copies_take_as_long_as_computing_and_waits_as_it_is_told(
    redis_url: str, models: Path, tmp_path: Path, on_gpu: Environment
) -> None:
    """Both ways 3 ms for eight rows, and 3 ms between; the threads spin until a batch is done."""
    stats = tmp_path / "stats.json"
    toml = TOML + 'buckets = [8]\ngpu_wait = "spin"\n'
    (models / "double" / "model.toml").write_text(toml)
    env = on_gpu(kernel_us=3000, ns_per_byte=3e6 / (8 * 3 * 4), stats=stats)
    with Worker(redis_url, models, ["double"], env=env) as worker, Client(redis_url) as client:
        assert re.search("tensorrt on cuda, [34] lanes", worker.log), worker.log
        items = [{"x": _rows(n, 1, 3)} for n in range(60)]
        for item, result in zip(items, client.map("double", items), strict=True):
            assert np.array_equal(result.outputs["y"], 2 * item["x"])
    counts = json.loads(stats.read_text())
    assert counts["blocking_waits"] == 0
    assert counts["spinning_waits"] > 0
    left = ("streams", "events", "graph_execs", "device_bytes", "pinned_bytes", "contexts")
    assert not any(counts[name] for name in left), counts


def test_lanes_that_do_not_fit_are_refused_with_what_would(
    redis_url: str, models: Path, on_gpu: Environment
) -> None:
    (models / "double" / "model.toml").write_text(TOML + "lanes = 100\n")
    worker = Worker(redis_url, models, ["double"], env=on_gpu(memory_mb=50))
    worker.start()
    assert worker.process.wait(TIMEOUT_S) == os.EX_CONFIG
    assert "model 'double': 100 lanes take 1.0 MB of GPU memory each" in worker.log
    assert "expected in model.toml: lanes = " in worker.log
    worker.close()


def test_lanes_that_fit_the_card_but_not_a_processs_share_of_it_are_refused(
    redis_url: str, models: Path, on_gpu: Environment
) -> None:
    """30 of 1 MB fit 50 MB, and not half of that; two models take it one after the other."""
    for name in ("double", "two"):
        (models / name / "model.toml").write_text(TOML + "lanes = 15\n")
    with Worker(redis_url, models, env=on_gpu(memory_mb=50)) as worker:
        assert "GPU memory each, " not in worker.log
    env = on_gpu(memory_mb=50) | {"INFERQ_PROCESSES": "2"}
    with Worker(redis_url, models, ["double"], bad=["two"], env=env) as worker:
        said = "model 'two': 15 lanes take 1.0 MB of GPU memory each, "
        until(lambda: said in worker.log, what="the second is refused")
        (line,) = {line for line in worker.log.splitlines() if said in line and "expected" in line}
        assert " MB are free to each of 2 processes; expected in model.toml: lanes = " in line


def test_several_profiles_take_contexts_of_their_own_and_hold_together(
    redis_url: str, models: Path, on_gpu: Environment
) -> None:
    """Short requests in large batches, long ones in small batches; none between, none beyond."""
    onnx_models.double(models / "wide" / "1" / "model.onnx", ("batch", "width"))
    profiles = (
        "[[profile]]\nbatch = [2, 2, 2]\nwidth = [100, 200, 400]\n"
        "[[profile]]\nbatch = [1, 8, 8]\nwidth = [1, 4, 8]\n"
    )
    toml = TOML + "preferred_batch_sizes = [8]\nmax_queue_delay_ms = 50\n" + profiles
    (models / "wide" / "model.toml").write_text(toml)
    with Worker(redis_url, models, ["wide"], env=on_gpu()) as worker, Client(redis_url) as client:
        # x and y of 2 x 400 or 8 x 8 float32 each; a lane's contexts share 1 MB.
        assert "2 lanes of 1.0 MB of GPU memory each (0.0 MB for tensors, 1.0 MB that" in worker.log
        items = [{"x": _rows(n, 1 + n % 3, (4, 8, 200, 400)[n % 4])} for n in range(80)]
        results = list(client.map("wide", items, in_flight=40))
        for item, result in zip(items, results, strict=True):
            assert np.array_equal(result.outputs["y"], 2 * item["x"])
        for width in (50, 401):
            wanted = (
                rf"inputs are x \[1, {width}\]; expected x \[1-8, 1-8\] or x \[2, 100-400\], for w"
            )
            with pytest.raises(InvalidInput, match=wanted):
                client.infer("wide", {"x": _rows(0, 1, width)}, timeout=TIMEOUT_S)


def test_memory_that_is_short_in_tensorrt_splits_batches_and_loses_none(
    redis_url: str, models: Path, on_gpu: Environment
) -> None:
    knobs = "preferred_batch_sizes = [8]\nmax_queue_delay_ms = 200\n"
    (models / "double" / "model.toml").write_text(TOML + knobs)
    env = on_gpu() | {"DOUBLE_TRT_ROWS": "4"}
    with Worker(redis_url, models, ["double"], env=env) as worker, Client(redis_url) as client:
        items = [{"x": _rows(n, 1 + n % 2, 3)} for n in range(40)]
        for item, result in zip(items, client.map("double", items, in_flight=40), strict=True):
            assert np.array_equal(result.outputs["y"], 2 * item["x"])
            assert result.receipt is not None
            assert result.receipt.requests > 1, "it is the lane that splits, not the batch"
        assert "out of GPU memory at 8 rows: runs are of at most 4 now" in worker.log


def test_what_contexts_share_is_counted_once_with_each_lane(
    redis_url: str, models: Path, on_gpu: Environment
) -> None:
    profiles = "".join(f"[[profile]]\nbatch = [1, {n}, 8]\n" for n in range(1, 9))
    (models / "double" / "model.toml").write_text(TOML + "lanes = 8\n" + profiles)
    env = on_gpu(memory_mb=50) | {"DOUBLE_TRT_CONTEXT_MB": "8"}
    worker = Worker(redis_url, models, ["double"], env=env)
    worker.start()
    assert worker.process.wait(TIMEOUT_S) == os.EX_CONFIG
    assert "model 'double': 8 lanes take 8.0 MB of GPU memory each, " in worker.log
    assert "expected in model.toml: lanes = 6" in worker.log
    worker.close()


def test_a_plan_is_verified_where_it_is_built_and_one_that_differs_fails(
    models: Path, on_gpu: Environment
) -> None:
    def build(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "inferq.workers.cli", "build", "double", "--models", models],
            env=on_gpu() | env, capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip

    refused = build(DOUBLE_TRT_FACTOR="1.1")
    assert refused.returncode == 1
    assert "differs from ONNX Runtime by 0.1" in refused.stderr
    verified = build()
    assert verified.returncode == 0, verified.stderr
    assert "from the cache" in verified.stdout
    assert "verified: differs by 0" in verified.stdout
    assert verified.stderr.splitlines() == [
        "Reading model double",
        "Hashing the model",
        "Looking for the plan",
        "Verifying: ONNX Runtime",
        "Verifying: the plan",
    ]


def test_without_a_gpu_one_line_says_what_is_missing(redis_url: str, models: Path) -> None:
    worker = Worker(redis_url, models, ["double"], env={"LD_LIBRARY_PATH": ""})
    worker.start()
    assert worker.process.wait(TIMEOUT_S) == os.EX_CONFIG
    assert "`inferq worker --cpu`" in worker.log
    worker.close()


def test_padded_models_answer_as_onnx_runtime_alone_or_are_refused(
    redis_url: str, tmp_path: Path, on_gpu: Environment
) -> None:
    """Sizes below the profile are padded, though the plan cannot run them unpadded."""
    root = tmp_path / "padded"
    pads = {name: RIGHT[name].pad.replace("[16]", "[6, 16]") for name in ("stride", "sum")}
    for name, pad in pads.items():
        padded_models.write(root / name / "1" / "model.onnx", RIGHT[name])
        (root / name / "model.toml").write_text(TOML + pad)
    rng = np.random.default_rng(0)
    with Worker(redis_url, root, env=on_gpu()), Client(redis_url) as client:
        for name in pads:
            path = root / name / "1" / "model.onnx"
            session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
            for number in range(len(RIGHT[name].sizes)):
                given = padded_models.request(RIGHT[name], rng, number)
                (expected,) = session.run(["y"], given)
                got = client.infer(name, given, timeout=TIMEOUT_S).outputs["y"]
                assert got.shape == expected.shape
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    one = root / "stride" / "model.toml"
    one.write_text(TOML + RIGHT["stride"].pad)
    worker = Worker(redis_url, root, ["stride"], env=on_gpu())
    try:
        worker.start()
        assert worker.process.wait(TIMEOUT_S) == os.EX_CONFIG
        assert "no size that is padded could be compared with an unpadded run" in worker.log
        assert "expected in model.toml: [profile] n = [1, 16, 16]" in worker.log
    finally:
        worker.close()


def test_a_shape_beyond_the_profile_is_the_requests_fault_and_others_are_served(
    redis_url: str, redis: Redis, models: Path, on_gpu: Environment
) -> None:
    onnx_models.double(models / "wide" / "1" / "model.onnx", ("batch", "width"))
    (models / "wide" / "model.toml").write_text(TOML + "[profile]\nwidth = [2, 4, 8]\n")
    with Worker(redis_url, models, ["wide"], env=on_gpu()), Client(redis_url) as client:
        known = decode_advert(bytes(redis.get(Names().model("wide")) or b""))  # type: ignore[arg-type]
        assert known.seconds_per_row > 0, "its optimum shape was measured"
        for width in (9, 1):
            with pytest.raises(InvalidInput, match=rf"'x': dim 1 is {width}; expected 2 to 8, for"):
                client.infer("wide", {"x": _rows(0, 2, width)}, timeout=TIMEOUT_S)
        for width in (2, 8, 3):
            given = _rows(width, 3, width)
            outputs = client.infer("wide", {"x": given}, timeout=TIMEOUT_S).outputs
            assert np.array_equal(outputs["y"], 2 * given)
