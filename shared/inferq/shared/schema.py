"""The types that cross module borders: tensors' shapes, models' signatures, requests, receipts.

They are frozen and free of I/O; `codec` turns them into bytes and back.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from inferq.shared import text
from inferq.shared.errors import InvalidInput, PayloadTooLarge

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

#: The dtypes of numbers that can be sent, by NumPy name. Dates, and objects but for text, cannot.
NUMBERS: Final[Mapping[str, np.dtype[Any]]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
        "float16", "float32", "float64", "complex64", "complex128",
    )
}  # fmt: skip
#: All dtypes that can be sent, by name; ``string`` and ``bytes`` are object arrays (`text`).
DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    **NUMBERS,
    **dict.fromkeys(text.TEXT, text.OBJECT),
}
#: Those of numbers, by their names in messages: ``<f4``, ``|u1``. Text has the same name there.
WIRE_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {dt.str: dt for dt in NUMBERS.values()}

MAX_DIMS: Final = 16
#: Inputs, or outputs, of one model: a decoder of 100 layers has some 200.
MAX_TENSORS: Final = 512
#: Most names, and most inputs, that a message lists.
_TOLD: Final = 64


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a model.

    `shape` holds the size of each dim. A dim that varies has a symbol (dims with the same symbol
    have the same size within one request) or None (it varies freely). The batch, where there is
    one, is dim `batch_axis`.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    batch_axis: int = 0

    @property
    def row_shape(self) -> tuple[int | str | None, ...]:
        """The dims of one row."""
        return self.shape[: self.batch_axis] + self.shape[self.batch_axis + 1 :]

    def __str__(self) -> str:
        dims = ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"


class Signature(msgspec.Struct, frozen=True):
    """A model's inputs and outputs, as read from the model itself."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    #: Inputs that a request may leave out, for the model has a value of its own. They have no rows.
    optional: tuple[TensorSpec, ...] = ()

    @property
    def batch_symbol(self) -> str | None:
        """The symbol that the batch dim of all inputs and outputs is; None: not batchable."""
        firsts = {
            spec.shape[spec.batch_axis] if spec.shape else None
            for spec in self.inputs + self.outputs
        }
        only = firsts.pop() if len(firsts) == 1 else None
        return only if isinstance(only, str) else None

    def __str__(self) -> str:
        inputs = ", ".join([*map(str, self.inputs), *(f"{o} (optional)" for o in self.optional)])
        return f"({inputs}) -> ({', '.join(map(str, self.outputs))})"


class ModelAdvert(msgspec.Struct, frozen=True, kw_only=True):
    """What workers announce of a model in ``model:<m>``; clients check requests against it."""

    name: str
    version: int
    engine: str
    signature: Signature
    max_batch_size: int
    #: If so, a request has 1 … max_batch_size rows; if not, as many as the signature says.
    batchable: bool
    #: Requests; 0 means no limit.
    max_queue_depth: int
    #: Bytes of all input tensors of one request together.
    max_request_bytes: int
    default_priority: int
    #: Milliseconds; 0 means none.
    default_timeout_ms: int
    #: Mean seconds of compute per row with all lanes busy, as last measured; 0: unknown.
    seconds_per_row: float
    #: Symbols of dims that the worker pads.
    padded: tuple[str, ...] = ()
    #: Bytes; 0 means no limit.
    max_queue_bytes: int = 0
    #: Seconds for which results are kept after they are stored.
    result_expires_s: int = 600
    #: True if inputs of another dtype are taken, where the model's holds all that they hold.
    casts: bool = False
    #: What the classes of its outputs are called; empty also if they are many (see the worker).
    labels: tuple[str, ...] = ()


class GpuTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Where one run's time went on the GPU, in ms, by the GPU's clock."""

    h2d_ms: float
    compute_ms: float
    d2h_ms: float


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Where one request's time went, and who served it. Times are in ms; None: not known.

    `queue_ms`: pushed → claimed, by Redis' clock (None for a message without our timestamp).
    `form_ms`: claimed → handed to a lane. `compute_ms`: the engine's run.
    `settle_ms`: computed → result encoded for its MULTI.
    """

    queue_ms: float | None
    form_ms: float
    compute_ms: float
    settle_ms: float
    batch_size: int
    """Rows of all requests in the batch, padding not counted."""
    padding: int
    """Rows of padding added to reach an allowed bucket."""
    requests: int
    """Requests in the batch."""
    worker: str
    engine: str
    model: str
    version: int
    attempt: int
    """1, or 1 + how often a worker died computing this request."""
    gpu_h2d_ms: float | None = None
    """Of `compute_ms`, by the card's own clock: copying the batch to the card."""
    gpu_compute_ms: float | None = None
    gpu_d2h_ms: float | None = None


class Ticket(msgspec.Struct, frozen=True):
    """What is known of a request besides its inputs: who asked, how to answer, until when."""

    id: str
    model: str
    #: Content type of the message, and so of its result.
    content_type: str
    #: The priority step it was claimed from; 0 is the most urgent.
    priority: int = 0
    #: True if JSON inputs came as nested lists: the outputs are then written as lists, too.
    lists: bool = False
    #: The client's reply channel.
    reply: str | None = None
    #: Redis ms.
    sent_ms: float | None = None
    #: Redis ms after which the request ends as DeadlineExceeded.
    deadline_ms: float | None = None
    #: Celery's `expires` in Unix ms, after which it ends as REVOKED.
    expires_ms: float | None = None
    ignore_result: bool = False
    payload_keys: tuple[str, ...] = ()
    #: How often a worker died computing it.
    attempts: int = 0
    #: The whole message, if it has links, a chain or a chord.
    canvas: bytes | None = None
    #: Further fields that Celery writes into its result meta.
    extra: Mapping[str, Any] | None = None
    #: Shown by ``celery inspect`` and Flower.
    kwargsrepr: str = ""
    #: The first request or task of the chain or group that it belongs to.
    root_id: str | None = None
    #: Celery's `eta`: when it was to be computed at the earliest.
    eta: str | None = None
    #: The task's name if it is another than inferq's: it is answered, not computed.
    task: str | None = None


def nbytes(tensors: Tensors) -> int:
    """Bytes of all `tensors` together, as limits count them: of text, as it is on the wire."""
    return sum(
        text.packed_bytes(array) if array.dtype.hasobject else array.nbytes
        for array in tensors.values()
    )


def describe(array: Array) -> str:
    """``<1x3x224x224 float32>``, ``<8 string>``: short, for Flower, logs and messages."""
    dtype = array.dtype
    return _described(array.shape, text.dtype_name(array) if dtype.hasobject else dtype)


@lru_cache(maxsize=1024)
def _described(shape: tuple[int, ...], dtype: np.dtype[Any] | str) -> str:
    name = dtype if isinstance(dtype, str) else dtype.name
    return f"<{'x'.join(map(str, shape)) or 'scalar'} {name}>"


def zeros(dtype: str, shape: Sequence[int]) -> Array:
    """Zeros. Of text these are digits: a model that reads numbers takes no empty string."""
    if not is_text(dtype):
        return np.zeros(shape, dtype)
    return np.full(shape, "0" if dtype == text.STRING else b"0", object)


def is_text(dtype: str) -> bool:
    """Whether tensors of this dtype are object arrays: ``string`` and ``bytes``."""
    return dtype in text.TEXT


def most_bytes(advert: ModelAdvert) -> int:
    """The most bytes that one request's inputs can have, as far as the signature says."""
    total = 0
    required = len(advert.signature.inputs)
    for place, spec in enumerate(advert.signature.inputs + advert.signature.optional):
        dims = list(spec.shape)
        if advert.batchable and place < required:
            dims[spec.batch_axis] = advert.max_batch_size
        sizes = [dim for dim in dims if isinstance(dim, int)]
        if len(sizes) < len(dims) or is_text(spec.dtype):
            return advert.max_request_bytes
        total += math.prod(sizes) * DTYPES[spec.dtype].itemsize
    return min(total, advert.max_request_bytes)


class InputCheck:
    """Checks requests' inputs against one model's advert.

    The client runs it before it pushes, and the worker after it claims.
    """

    def __init__(self, advert: ModelAdvert) -> None:
        self._advert = advert
        self._names = {spec.name for spec in advert.signature.inputs}
        #: (name, dtype, shape after the batch), if nothing else may vary; else None.
        self._plain: list[tuple[str, np.dtype[Any], tuple[object, ...]]] | None = None
        inputs = advert.signature.inputs
        fixed = all(isinstance(d, int) for i in inputs for d in i.shape[1:])
        odd = any(i.batch_axis or is_text(i.dtype) for i in inputs)
        if advert.batchable and fixed and not odd:
            self._plain = [(i.name, DTYPES[i.dtype], i.shape[1:]) for i in inputs]

    def __call__(self, inputs: Tensors) -> int:
        """The request's rows. InvalidInput (naming input, value, expectation), PayloadTooLarge."""
        if self._plain is None or inputs.keys() != self._names:
            return check_inputs(self._advert, inputs)
        rows = size = 0
        for name, dtype, tail in self._plain:
            array = inputs[name]
            shape = array.shape
            if array.dtype != dtype or shape[1:] != tail or not shape or rows not in (0, shape[0]):
                return check_inputs(self._advert, inputs)
            rows = shape[0]
            size += array.nbytes
        if not 1 <= rows <= self._advert.max_batch_size or size > self._advert.max_request_bytes:
            return check_inputs(self._advert, inputs)
        return rows


def check_names(advert: ModelAdvert, inputs: Collection[str]) -> None:
    """InvalidInput unless `inputs` are exactly the names of the model's inputs."""
    specs, optional = advert.signature.inputs, advert.signature.optional
    given, names = set(inputs), {spec.name for spec in specs}
    if given != names:
        missing = sorted(names - given)
        unknown = sorted(given - names - {spec.name for spec in optional})
        if not missing and not unknown:
            return
        problem = "; ".join(
            f"{what} {', '.join(map(repr, which[:_TOLD]))}"
            for what, which in (("missing", missing), ("unknown", unknown))
            if which
        )
        told = [*map(str, specs), *(f"{spec} (optional)" for spec in optional)]
        more = f" and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
        raise InvalidInput(
            f"inputs of model {advert.name!r}: {problem}; expected {', '.join(told[:_TOLD])}{more}",
            model=advert.name,
        )


def check_outputs(advert: ModelAdvert, outputs: object) -> tuple[str, ...] | None:
    """The names of the outputs that a request asks for; None: it wants all. InvalidInput."""
    if outputs is None:
        return None
    names = [spec.name for spec in advert.signature.outputs]
    given = list(outputs) if isinstance(outputs, list | tuple) else []
    if not given or not all(isinstance(name, str) for name in given):
        raise InvalidInput(
            f"outputs is {_brief(outputs)}; expected a list of names, of {_listed(names)}",
            model=advert.name,
        )
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise InvalidInput(
            f"outputs has {unknown[:100]!r}; expected names of outputs of model "
            f"{advert.name!r}: {_listed(names)}",
            model=advert.name,
        )
    wanted = tuple(name for name in names if name in given)
    return None if len(wanted) == len(names) else wanted


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return f"{', '.join(map(repr, names[:_TOLD]))}{more}"


def _brief(value: object) -> str:
    return repr(value)[:100] if isinstance(value, str | int | float) else type(value).__name__


def check_size(advert: ModelAdvert, size: int) -> None:
    """PayloadTooLarge if a request's inputs are more than `max_request_bytes`."""
    if size > advert.max_request_bytes:
        raise PayloadTooLarge(
            f"inputs of model {advert.name!r} are {size} bytes; "
            f"expected at most {advert.max_request_bytes} (max_request_bytes)",
            model=advert.name,
            size=size,
            limit=advert.max_request_bytes,
        )


def check_inputs(advert: ModelAdvert, inputs: Tensors) -> int:
    """Check a request's `inputs` against what a model takes; return its rows.

    Raises InvalidInput (naming input, value and expectation) or PayloadTooLarge.
    """
    specs = advert.signature.inputs
    check_names(advert, inputs)
    symbols: dict[str, tuple[int, str]] = {}
    size = sum(_check_tensor(advert, spec, inputs[spec.name], symbols) for spec in specs)
    for spec in advert.signature.optional:
        if spec.name in inputs:
            size += _check_tensor(advert, spec, inputs[spec.name], symbols)
    rows = 1
    if advert.batchable:
        rows = inputs[specs[0].name].shape[specs[0].batch_axis]
        if not 1 <= rows <= advert.max_batch_size:
            raise InvalidInput(
                f"inputs of model {advert.name!r} have {rows} rows; "
                f"expected 1 to {advert.max_batch_size} (max_batch_size)",
                model=advert.name,
                rows=int(rows),
                limit=advert.max_batch_size,
            )
    check_size(advert, size)
    return int(rows)


def _check_tensor(
    advert: ModelAdvert, spec: TensorSpec, array: Array, symbols: dict[str, tuple[int, str]]
) -> int:
    """The bytes of the tensor, as limits count them."""
    where = f"input {spec.name!r} of model {advert.name!r}"
    if array.dtype.newbyteorder("=") != DTYPES[spec.dtype]:
        raise InvalidInput(
            f"{where}: dtype {text.dtype_name(array)}; expected {spec.dtype}", model=advert.name
        )
    if array.ndim != len(spec.shape):
        raise InvalidInput(
            f"{where}: shape {list(array.shape)} has {array.ndim} dims; expected {spec}",
            model=advert.name,
        )
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(dim, int):
            if size != dim:
                raise InvalidInput(
                    f"{where}: shape {list(array.shape)} has {size} at dim {axis}; "
                    f"expected {dim} as in {spec}",
                    model=advert.name,
                )
        elif isinstance(dim, str):
            seen = symbols.setdefault(dim, (size, spec.name))
            if seen[0] != size:
                raise InvalidInput(
                    f"{where}: dim {axis} ({dim}) is {size}; expected {seen[0]}, "
                    f"as in input {seen[1]!r}",
                    model=advert.name,
                )
        # Any other open dim may have no size yet: that of a decoder's past, at its first step.
        if size == 0 and axis == spec.batch_axis and advert.batchable:
            raise InvalidInput(
                f"{where}: dim {axis} of shape {list(array.shape)} is 0; expected at least 1",
                model=advert.name,
            )
    return _text_bytes(advert, where, spec, array) if is_text(spec.dtype) else array.nbytes


def _text_bytes(advert: ModelAdvert, where: str, spec: TensorSpec, array: Array) -> int:
    try:
        text.check(array, spec.dtype)
        return text.packed_bytes(array)
    except text.NoText as problem:
        raise InvalidInput(f"{where}: {problem}", model=advert.name) from None
