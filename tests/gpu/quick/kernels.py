"""The kernels, as PTX that the driver compiles itself: no toolkit is needed where they run.

On the fake driver, which runs no PTX, functions of the host do the same, in stream order.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import c_uint32, c_uint64
from typing import Any, Final, Protocol

from gpu.quick.driver import MULTIPROCESSORS, Driver

#: y = 2 x + k, for x float32[N, W] and k int8[N, 1]: as the double of helpers.cuda_cases.
#: busy: all threads of the card count clock cycles, so that two such kernels run one after the
#: other; then y[row] is the first byte of the row, as float32.
#: halt: a trap. astray: a write to an address that nobody has.
PTX: Final = b"""
.version 7.0
.target sm_75
.address_size 64

.visible .entry twice(.param .u64 px, .param .u64 pk, .param .u64 py,
                      .param .u32 pwidth, .param .u32 pcount)
{
    .reg .pred %p;
    .reg .u32 %i, %b, %w, %count, %width, %row;
    .reg .u64 %x, %k, %y, %at, %a;
    .reg .s32 %s;
    .reg .f32 %f, %g;
    mov.u32 %i, %tid.x;
    mov.u32 %b, %ctaid.x;
    mov.u32 %w, %ntid.x;
    mad.lo.u32 %i, %b, %w, %i;
    ld.param.u32 %count, [pcount];
    setp.ge.u32 %p, %i, %count;
    @%p bra DONE;
    ld.param.u64 %x, [px];
    ld.param.u64 %k, [pk];
    ld.param.u64 %y, [py];
    ld.param.u32 %width, [pwidth];
    div.u32 %row, %i, %width;
    mul.wide.u32 %at, %i, 4;
    add.u64 %a, %x, %at;
    ld.global.f32 %f, [%a];
    cvt.u64.u32 %a, %row;
    add.u64 %a, %k, %a;
    ld.global.s8 %s, [%a];
    cvt.rn.f32.s32 %g, %s;
    add.f32 %f, %f, %f;
    add.f32 %f, %f, %g;
    add.u64 %a, %y, %at;
    st.global.f32 [%a], %f;
DONE:
    ret;
}

.visible .entry busy(.param .u64 px, .param .u64 py, .param .u32 prows, .param .u32 pstride,
                     .param .u64 pcycles)
{
    .reg .pred %p;
    .reg .u32 %i, %b, %w, %rows, %stride, %v;
    .reg .u64 %x, %y, %at, %a, %began, %now, %cycles;
    .reg .f32 %f;
    mov.u64 %began, %clock64;
    ld.param.u64 %cycles, [pcycles];
AGAIN:
    mov.u64 %now, %clock64;
    sub.u64 %now, %now, %began;
    setp.lt.u64 %p, %now, %cycles;
    @%p bra AGAIN;
    mov.u32 %i, %tid.x;
    mov.u32 %b, %ctaid.x;
    mov.u32 %w, %ntid.x;
    mad.lo.u32 %i, %b, %w, %i;
    ld.param.u32 %rows, [prows];
    setp.ge.u32 %p, %i, %rows;
    @%p bra DONE;
    ld.param.u64 %x, [px];
    ld.param.u64 %y, [py];
    ld.param.u32 %stride, [pstride];
    mul.wide.u32 %at, %i, %stride;
    add.u64 %a, %x, %at;
    ld.global.u8 %v, [%a];
    cvt.rn.f32.u32 %f, %v;
    mul.wide.u32 %at, %i, 4;
    add.u64 %a, %y, %at;
    st.global.f32 [%a], %f;
DONE:
    ret;
}

.visible .entry halt()
{
    trap;
    ret;
}

.visible .entry astray()
{
    .reg .u64 %a;
    .reg .u32 %v;
    mov.u64 %a, 64;
    mov.u32 %v, 1;
    st.global.u32 [%a], %v;
    ret;
}
"""
#: What these answer from then on.
ENDINGS: Final = {"halt": 719, "astray": 700}
_THREADS: Final = 1024
#: Blocks of so many threads that fill a multiprocessor of 2,048.
_BLOCKS: Final = 2
_CALIBRATION_CYCLES: Final = 20_000_000


class Kernels(Protocol):
    """Put on a stream by its handle, with the context current. Addresses are the device's."""

    def twice(self, stream: int, x: int, k: int, y: int, rows: int, width: int) -> None:
        """y = 2 x + k."""
        ...

    def busy(self, stream: int, x: int, y: int, rows: int, stride: int, us: float) -> None:
        """The whole card, for `us`; y[row] = x[row * stride] in the end."""
        ...

    def end(self, stream: int, how: str) -> None:
        """One of `ENDINGS`: the context is beyond use."""
        ...


class _OnCard:
    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        module = driver.made("cuModuleLoadData", PTX)
        self._functions = {
            name: driver.made("cuModuleGetFunction", module, name.encode())
            for name in ("twice", "busy", *ENDINGS)
        }
        self._blocks = _BLOCKS * driver.attribute(MULTIPROCESSORS)
        self._cycles_per_us = self._calibrate()

    def _calibrate(self) -> float:
        """With the clocks up: the first runs raise them."""
        driver = self._driver
        stream, began, ended = driver.stream(), driver.event(), driver.event()
        for _ in range(5):
            driver.check("cuEventRecord", began, stream)
            self._busy(stream, 0, 0, 0, 0, _CALIBRATION_CYCLES)
            driver.check("cuEventRecord", ended, stream)
            driver.check("cuStreamSynchronize", stream)
        per_us = _CALIBRATION_CYCLES / (driver.ms_between(began, ended) * 1000)
        for name, handle in (
            ("cuEventDestroy_v2", began),
            ("cuEventDestroy_v2", ended),
            ("cuStreamDestroy_v2", stream),
        ):
            driver.check(name, handle)
        return per_us

    def twice(self, stream: int, x: int, k: int, y: int, rows: int, width: int) -> None:
        count = rows * width
        given = (c_uint64(x), c_uint64(k), c_uint64(y), c_uint32(width), c_uint32(count))
        self._launch("twice", stream, -(-count // 128), 128, *given)

    def busy(self, stream: int, x: int, y: int, rows: int, stride: int, us: float) -> None:
        self._busy(stream, x, y, rows, stride, int(us * self._cycles_per_us))

    def _busy(self, stream: int, x: int, y: int, rows: int, stride: int, cycles: int) -> None:
        given = (c_uint64(x), c_uint64(y), c_uint32(rows), c_uint32(stride), c_uint64(cycles))
        self._launch("busy", stream, self._blocks, _THREADS, *given)

    def end(self, stream: int, how: str) -> None:
        self._launch(how, stream, 1, 1)

    def _launch(self, name: str, stream: int, blocks: int, threads: int, *given: Any) -> None:
        pointers = (ctypes.c_void_p * len(given))(*[ctypes.addressof(each) for each in given])
        self._driver.check(
            "cuLaunchKernel", self._functions[name], blocks, 1, 1, threads, 1, 1, 0, stream,
            ctypes.cast(pointers, ctypes.c_void_p), None,
        )  # fmt: skip


class _OnFake:
    def __init__(self) -> None:
        from helpers.fakecuda.control import Control, on_device  # noqa: PLC0415

        self._control, self._on_device = Control(), on_device
        self._kept: dict[tuple[Any, ...], Callable[[], int]] = {}

    def twice(self, stream: int, x: int, k: int, y: int, rows: int, width: int) -> None:
        def kernel() -> int:
            shape, at = (rows, width), self._on_device
            at(y, shape, "f4")[...] = 2 * at(x, shape, "f4") + at(k, (rows, 1), "i1")
            return 0

        self._launch(stream, ("twice", x, k, y, rows, width), kernel)

    def busy(self, stream: int, x: int, y: int, rows: int, stride: int, us: float) -> None:
        def kernel() -> int:
            if rows:
                firsts = self._on_device(x, (rows, stride), "u1")[:, 0]
                self._on_device(y, (rows,), "f4")[...] = firsts
            return 0

        self._launch(stream, ("busy", x, y, rows, stride), kernel, us)

    def end(self, stream: int, how: str) -> None:
        self._launch(stream, (how,), lambda: ENDINGS[how])

    def _launch(
        self, stream: int, key: tuple[Any, ...], kernel: Callable[[], int], us: float = -1.0
    ) -> None:
        # The fake keeps each function for good.
        self._control.launch(stream, self._kept.setdefault(key, kernel), us)


_lock = threading.Lock()
_kernels: list[Kernels] = []


def kernels(driver: Driver | None = None) -> Kernels:
    """Those of this process; at the first call the context is current and nothing is captured."""
    with _lock:
        if not _kernels:
            driver = driver or Driver()
            _kernels.append(_OnFake() if driver.fake else _OnCard(driver))
        return _kernels[0]
