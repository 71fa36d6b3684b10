"""A model that takes 2 GB at batch 32, in a worker that has 700 MB.

PYTHONPATH=tests python -m shows.memory
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from helpers import onnx_models
from helpers.capped import CappedWorker, capped

from inferq.producer import Client
from inferq.workers.process.embedded import EmbeddedRedis

MB = 700
ROWS = 32
SIDE = 256
WITHIN_S = 60.0
SERVED = "batches of at most"


def capped_memory() -> dict[str, Any]:
    """Start `inferq worker` under the limit, send 32 requests and one of 32 rows, and count.

    `kills`: processes that were killed; `ready_s`: from the start to serving.
    """
    with (
        tempfile.TemporaryDirectory(prefix="inferq-show-") as name,
        EmbeddedRedis("valkey") as server,
        capped(MB) as cap,
    ):
        root = Path(name) / "models"
        onnx_models.wide_convolution(root / "wide" / "1" / "model.onnx", side=SIDE)
        print(f"{MB} MB by {cap.kind}, a convolution that takes 2 GB at batch {ROWS}", flush=True)
        env = {"XDG_CACHE_HOME": str(Path(name) / "cache")}
        worker = CappedWorker(cap, server.url, root, ["wide"], name="capped", env=env)
        began = time.monotonic()
        try:
            worker.start()
            worker.wait_ready(WITHIN_S)
            ready_s = time.monotonic() - began
            with Client(server.url) as client:
                row = np.full((1, 3, SIDE, SIDE), 1.0, np.float32)
                pending = [client.submit("wide", {"x": n * row}) for n in range(ROWS)]
                wrong = sum(
                    not np.allclose(each.result(WITHIN_S).outputs["y"], n * 0.0768, rtol=1e-3)
                    for n, each in enumerate(pending)
                )
                whole = np.concatenate([n * row for n in range(ROWS)])
                answer = client.infer("wide", {"x": whole}, timeout=WITHIN_S).outputs["y"]
                expected = 0.0768 * np.arange(ROWS).reshape(ROWS, 1, 1, 1)
                wrong += not np.allclose(answer, np.broadcast_to(expected, answer.shape), rtol=1e-3)
            log = worker.log
        except BaseException:
            print(worker.log[-4000:], flush=True)
            raise
        finally:
            worker.close()
        kills = max(cap.kills(), log.count("ended by SIGKILL"))
    said = next((line for line in log.splitlines() if SERVED in line), "")
    print(said)
    print(f"serves after {ready_s:.1f} s, {kills} kills, {wrong} wrong answers")
    return {
        "kills": kills,
        "ready_s": round(ready_s, 2),
        "wrong": wrong,
        "said": said,
        "limit": cap.kind,
    }


if __name__ == "__main__":
    capped_memory()
