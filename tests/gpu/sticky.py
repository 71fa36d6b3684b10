"""A sticky error on purpose, as ``python -m gpu.sticky MODELS MODEL FLAVOUR``.

A kernel writes to an address that nobody has. From then on the context answers every call with that
error, and the lane has to say that the engine is beyond use.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pycuda import driver

from gpu.lanes import Setup, make_batch, open_session
from inferq.shared.errors import FatalEngineError
from inferq.workers.cuda import device
from inferq.workers.models.repository import load_model
from inferq.workers.trt.flavours import find_flavour

#: Compiled by the driver itself: no toolkit is needed.
PTX = b"""
.version 7.0
.target sm_75
.address_size 64
.visible .entry poison()
{
    .reg .u64 %a;
    .reg .u32 %v;
    mov.u64 %a, 64;
    mov.u32 %v, 1;
    st.global.u32 [%a], %v;
    ret;
}
"""


def poison(gpu: device.Device) -> None:
    """Make every later call of this process' CUDA context fail."""
    with gpu:
        driver.module_from_buffer(PTX).get_function("poison")(block=(1, 1, 1))


def main(root: Path, model: str, flavour: str) -> None:
    """Exit status 0 if the lane called the error fatal; prints how many ms that took."""
    spec = load_model(root, model)
    session = open_session(spec, Setup(find_flavour(flavour), "fp32", 1, graphs=True))
    gpu, batch = device.acquire(), make_batch(spec, 1)
    session.lanes[0].run(batch)
    poison(gpu)
    began = time.monotonic()
    try:
        session.lanes[0].run(batch)
    except FatalEngineError as fatal:
        print(f"{(time.monotonic() - began) * 1000:.1f} ms: {fatal}", flush=True)
        # As a worker: what CUDA says while all that is freed is of no interest.
        sys.stdout.flush()
        raise SystemExit(0) from None
    raise SystemExit("the lane ran on")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
